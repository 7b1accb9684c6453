"""`microvlm-bench pi`: would a model still run on a Raspberry Pi, fit there, and how fast, with or without one.

Off the board, instructions are counted on an emulated Cortex-A53 and times are predicted from counts, bytes and a
profile of the board; on an aarch64 machine the same phases are timed.
"""
