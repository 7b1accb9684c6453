"""What a bundle will weigh, before it is made. Needs no torch, but for the command that measures graphs."""
