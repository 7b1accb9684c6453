"""A small float checkpoint as `microvlm assemble` leaves one: no SubLN yet, and a tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from conftest import FLOAT, seeded_model, tiny_config

from microvlm.inputs.processor import Processor


def assembled_start(folder: Path, tokenizer: Any) -> Path:
    """Write the checkpoint into a new folder."""
    config = tiny_config(FLOAT)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, sub_norm=False))
    model = seeded_model(config)
    with torch.no_grad():
        # A random decoder's distribution is nearly uniform, and nothing could be learnt from it.
        model.get_parameter("embedding.weight").mul_(12)
    model.save_pretrained(folder)
    Processor(tokenizer, config).save(folder)
    return folder
