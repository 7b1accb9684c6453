"""A smaller vocabulary for a checkpoint, and its tokenizer as tables."""
