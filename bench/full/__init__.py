"""`microvlm-bench full`: a full-size decoder with random weights."""
