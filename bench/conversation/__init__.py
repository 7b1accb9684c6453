"""`microvlm-bench conversation`: what a long conversation with a memory file costs."""
