"""Reports of `microvlm-score`: records and tables."""
