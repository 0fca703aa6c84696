"""Look at a package without running any of it: where it is, its JSON, the headers of its weights."""
