"""Whether a model knows what it knows: calibration of its answers, and how it is measured."""
