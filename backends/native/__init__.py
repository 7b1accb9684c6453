"""The native library of `ai.microvlm` kernels: where it is, which variants run here, which one is in use.

Needs numpy only for the bare kernels, and neither ONNX Runtime nor torch. The package may be without a library.
"""
