"""`python -m hub_tools`: the `gpt2-value` command, where the console script is not installed."""

from .cli import main

main()
