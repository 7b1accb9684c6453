"""Watching a run: metric names, JSONL and trackers, progress, pictures, and the page of `microvlm-train watch`."""
