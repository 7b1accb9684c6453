"""Drawings, scenes, facts and the evaluation sets made of emoji."""
