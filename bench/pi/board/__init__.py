"""Emulates a whole Raspberry Pi, with its memory and a kernel (QEMU's system mode)."""
