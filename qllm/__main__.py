"""`python -m qllm`: the command line."""

from qllm.cli import main

main()
