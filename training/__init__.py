"""Training: recipes, stages, losses, batches and data."""

if __name__ != "microvlm.training":
    raise ImportError("this folder is part of the package microvlm: write 'import microvlm.training'.")
