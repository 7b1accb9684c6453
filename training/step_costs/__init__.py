"""A training step of each variant in a process of its own, which `microvlm-bench train` asks for times and bytes."""
