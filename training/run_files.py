"""Names of the files and folders in a run's folder, for the trainer and for those who look at a run."""

from __future__ import annotations

CHECKPOINT = "checkpoint"
BEST_CHECKPOINT = "best"
RECIPE = "recipe.json"
RUN = "run.json"
STATUS = "status.json"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
PICTURES = "pictures"
SAMPLES = "samples"
CURVES = "curves.png"
BEST = "best.safetensors"
WEIGHTS = "weights.safetensors"
DONE = "done"
"""Marks the folder of a finished stage."""
