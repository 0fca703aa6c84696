"""One package, a folder: save it, inspect it without running it, verify that it loads, load it."""
