"""`python -m gptjax` is the `gptjax` command."""

from gptjax.cli import main

main()
