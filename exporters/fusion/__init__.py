"""Fused nodes of a traced decoder: what is joined, and what each means in standard ONNX."""
