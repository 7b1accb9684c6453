"""Training batches as a function of (seed, stage, step)."""
