"""`microvlm-bench run`: time and memory of every backend, phase by phase."""
