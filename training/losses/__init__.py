"""Loss functions that the training stages are composed of."""
