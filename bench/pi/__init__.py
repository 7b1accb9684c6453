"""`microvlm-bench pi`: whether a model runs on a Raspberry Pi, fits its memory, and how fast, with or without a board.

Off the board, instructions are counted on an emulated Cortex-A53 and times are predicted from counts, bytes and a
profile of the board; on an aarch64 machine the same phases are timed.
"""
