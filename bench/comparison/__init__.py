"""`microvlm-bench compare`: whether a difference of speed between two models, libraries or installations is real."""
