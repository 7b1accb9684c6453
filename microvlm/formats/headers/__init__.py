"""Headers of weight files: GGUF and safetensors, read without their tensors."""
