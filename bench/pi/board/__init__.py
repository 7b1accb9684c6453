"""An emulated Raspberry Pi with its memory and kernel (QEMU's system mode)."""
