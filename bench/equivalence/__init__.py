"""`microvlm-bench equivalence`: whether two backends or precisions are the same model."""
