"""The `microvlm` command line."""
