"""`python -m qwen3np` is the command `qwen3np`."""

from qwen3np.cli import main

main()
