"""Executed instructions and weight bytes of a model on an emulated Cortex-A53."""
