"""The process of `microvlm serve` that decodes pictures and runs models. It knows no HTTP, and may die."""
