"""One repository on a Hub: its branches and commits, requests that are retried, and downloads."""
