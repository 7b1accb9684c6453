"""Pretrained parts: encoders and decoders of other makers, read from their files and assembled into a MicroVLM."""
