"""Replay: one model repeats the int8 activations of another, so that rounding ties cannot part them.

`graph_check` replays after an export, `microvlm-bench equivalence` replays between two backends.
"""
