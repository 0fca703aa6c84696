"""Load a package that somebody else made: in a fresh interpreter first, then here, and its tokenizer likewise."""
