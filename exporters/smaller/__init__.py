"""Leaves parts of a model out before it is lowered, and measures what that costs."""
