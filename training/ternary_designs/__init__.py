"""Designs of ternary layers, compared by rounding and by a short distillation."""
