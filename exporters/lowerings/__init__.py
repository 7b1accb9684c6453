"""Products in ONNX Runtime's or ONNX's own operators: `--lowering matmulnbits` and `--lowering qdq`."""
