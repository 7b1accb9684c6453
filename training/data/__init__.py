"""Training data of any kind: pictures with captions, their sources and their splits."""
