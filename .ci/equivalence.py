"""`microvlm-bench equivalence` of a bundle, twice at once: with the native kernels, and on stock ONNX Runtime, where
the operators' function bodies run. Arguments after the bundle are passed on to both.
"""

from __future__ import annotations

import sys

from side_by_side import side_by_side

STOCK = {"MICROVLM_NATIVE": "0"}

if __name__ == "__main__":
    command = ["microvlm-bench", "equivalence", *sys.argv[1:]]
    sys.exit(side_by_side([command, command], [{}, STOCK]))
