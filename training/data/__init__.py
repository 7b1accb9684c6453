"""Training data: drawings, scenes, facts and the evaluation sets."""
