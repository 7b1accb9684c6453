"""Losses on scenes and facts."""
