"""The app and its pages: tokens as chips that are coloured by value, by log-probability, by entropy or by log-ratio.

A Space gets a copy of these files, so they import only the standard library, torch, gradio, matplotlib, the remote
code, `sampler_audit` and each other: `palettes`, `token_text` and `stream` (each by itself), `records` (all about each
token), `chips`, `value_lines` and `document` (HTML), `picture` and `exports` (files), `desk` and `audits` (what the app
does), `handlers` (what happens on a click), and `app` (how it looks).
"""
