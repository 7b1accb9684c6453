"""The part of `ort-arm64` that reaches the ARM64 machine: locally, over ssh or emulated."""
