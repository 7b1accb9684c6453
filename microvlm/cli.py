"""Entry point of the console script `microvlm`."""

from microvlm.commands.main import cli, main

__all__ = ["cli", "main"]
