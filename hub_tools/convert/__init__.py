"""Checkpoints of other libraries: convert them to packages, and export the policy of a package as a plain GPT-2."""
