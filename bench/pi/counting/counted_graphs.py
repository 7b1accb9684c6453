"""Counts single graphs: `python -m microvlm.bench.pi.counting.counted_graphs REQUEST`, with REQUEST in JSON.

Each graph has one input `x`; it runs once unmarked and once between marks, on one thread.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import numpy as np

from microvlm.bench.pi.counting.count_marks import mark


def run(request: dict[str, Any]) -> dict[str, Any]:
    """The region of each graph's run."""
    import onnxruntime

    from microvlm.backends import native

    x = np.random.default_rng(0).standard_normal((1, request["width"]), np.float32)
    gc.disable()
    regions = []
    for number, graph in enumerate(request["graphs"], 1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        for key, value in request["entries"].items():
            options.add_session_config_entry(key, value)
        if request["native"]:
            options.register_custom_ops_library(str(native.library_path()))
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": x})
        mark(number)
        session.run(None, {"x": x})
        mark(0)
        regions.append([number])
    return {"regions": regions}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
