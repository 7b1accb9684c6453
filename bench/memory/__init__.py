"""`microvlm-bench memory`: what the episodic memory remembers and costs."""
