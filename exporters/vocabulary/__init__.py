"""A smaller vocabulary for a checkpoint, and its tokenizer as mapped tables."""
