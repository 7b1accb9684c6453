"""Batches of emoji, scenes and facts as a function of (seed, stage, step)."""
