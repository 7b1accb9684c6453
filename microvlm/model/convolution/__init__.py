"""The convolutional vision encoder in whole numbers."""
