"""Write what transformers needs to read a bundle: a module with two classes, and their names in its JSON files.

A picture that is stretched is prepared by transformers' own ViTImageProcessor too: the same pixels up to float32
rounding, within 4 levels of 255 above 4 times the side. Its name stays, so that no code need be trusted. What it would
do to a picture that is fitted is wrong, so there the name is this module's class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from microvlm.config import CONFIG, MicroVLMConfig
from microvlm.formats.bundle import TRANSFORMERS_MODULE
from microvlm.inputs.processor_files import OWN_IMAGE_PROCESSOR, PREPROCESSOR, check_documents, read_documents

_MODULE = Path(TRANSFORMERS_MODULE).stem


def write_transformers_files(folder: Path, config: MicroVLMConfig) -> None:
    """Add the module and its names to a bundle whose configuration and processor files are in `folder`."""
    found = read_documents(folder)
    statistics = check_documents(found, config, folder).statistics
    side = config.vision.image_size
    preprocessor: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        **found.get(PREPROCESSOR, {}),
        "do_convert_rgb": True,
        "size": {"height": side, "width": side},
        "rescale_factor": statistics.rescale,
        "image_mean": list(statistics.mean),
        "image_std": list(statistics.std),
        "framing": config.vision.resize,
        "auto_map": {"AutoImageProcessor": f"{_MODULE}.{OWN_IMAGE_PROCESSOR}"},
    }
    if config.vision.resize == "pad":
        preprocessor["image_processor_type"] = OWN_IMAGE_PROCESSOR
    _write(folder / PREPROCESSOR, preprocessor)
    _write(folder / CONFIG, {**config.to_dict(), "auto_map": {"AutoConfig": f"{_MODULE}.MicroVLMConfig"}})
    (folder / TRANSFORMERS_MODULE).write_bytes((Path(__file__).parent / TRANSFORMERS_MODULE).read_bytes())


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
