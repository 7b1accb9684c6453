"""Sizes of vision encoders, layer by layer."""
