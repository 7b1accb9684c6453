"""Opens a serialised ONNX model whose weights are in the files of a bundle. Needs ONNX Runtime, not onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"


def open_session(model: bytes, folder: Path, options: Any) -> Any:
    """An InferenceSession on the CPU. `folder` holds the external data; `options`: SessionOptions, which it changes."""
    import onnxruntime

    options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(folder.resolve()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
