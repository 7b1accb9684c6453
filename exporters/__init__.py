"""Exporters: a checkpoint becomes a bundle of ONNX graphs."""

if __name__ != "microvlm.exporters":
    raise ImportError("this folder is part of the package microvlm: write 'import microvlm.exporters'.")
