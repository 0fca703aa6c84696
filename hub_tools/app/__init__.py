"""See a model: an app in the browser, pages that need no server, and the app as a Space on the Hub.

`page` (the app itself; a Space gets a copy of it), `review` (code that nobody has read yet), `serve` (load, review and
open), `space` (write and push).
"""
