"""The part of `ort-arm64` that runs on the ARM64 machine."""
