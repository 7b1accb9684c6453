"""`python -m microvlm` is the command `microvlm`."""

from microvlm.cli import main

main()
