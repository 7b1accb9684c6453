"""`microvlm-score`: what a model says about held-out pictures, beside what people said and beside baselines."""
