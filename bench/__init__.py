"""Benchmarks: speed, equivalence, memory, kernels and the Raspberry Pi, as JSON documents and tables."""

if __name__ != "microvlm.bench":
    raise ImportError("this folder is part of the package microvlm: write 'import microvlm.bench'.")
