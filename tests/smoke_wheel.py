"""Does an installed wheel work? Every operator with and without the native library, `==` the table's numpy reference.

Runs where only the wheel and its dependencies are, emulated machines included: `python tests/smoke_wheel.py FOLDER`
with the files of smoke_inputs.py. Prints one JSON document; exit status 1 for a wrong bit, for a backend that leaves
the library unused, for an import of torch.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import microvlm
from microvlm.backends import native
from microvlm.backends.ort import OrtBackend
from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import OPS


def run(model: Path, value: np.ndarray, library: Path | None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: value})[0]


def is_exact(op: OpSpec, folder: Path, library: Path | None) -> bool:
    """Bit for bit."""
    with np.load(folder / f"{op.name}.npz") as arrays:
        value, weights = arrays["input"], [arrays[name] for name in op.weight_names]
        attributes = {name: int(arrays[name]) for name in op.attributes}
    expected = op.reference(value, *weights, **attributes)
    return run(folder / f"{op.name}.onnx", value, library).tobytes() == expected.tobytes()


def main(folder: Path) -> int:
    library = native.library_path()
    if library is None or not library.is_relative_to(Path(microvlm.__file__).resolve().parent):
        print(f"the wheel's own native library is not in use: {library}", file=sys.stderr)
        return 1
    paths = {"native": library, "function body": None}
    wrong = [
        f"{op.name}, {how}"
        for op in OPS.values()
        for how, use in paths.items()
        if not is_exact(op, folder, use)
    ]
    document: dict[str, Any] = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "variants": native.variants(),
        "kernels": OrtBackend().kernels(),
        "operators": len(OPS),
        "wrong": wrong,
        "torch_imported": "torch" in sys.modules,
    }
    print(json.dumps(document))
    runs_native = document["kernels"] == f"native {native.active_variant()}"
    return 0 if runs_native and not wrong and not document["torch_imported"] else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
