"""`microvlm-bench paths`: the operators that ONNX Runtime really runs for each product of a bundle."""
