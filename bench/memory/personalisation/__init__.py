"""Personalisation of a model by its memory: named concepts, strangers and look-alikes, and thousands of facts."""
