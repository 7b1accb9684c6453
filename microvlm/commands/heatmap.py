"""Heatmaps of the decoder's attention: for every generated word, which parts of the image it attended to.

The attention of a word to prefix embedding j is averaged over heads and the second half of the layers, at the positions
that chose the word's tokens. The adapter's pooling weights then distribute embedding j over the image's patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from microvlm.generation import Prompt, positions_of, read_slot
from microvlm.inputs.images import ImageSource, load_square
from microvlm.inputs.processor import Inputs, Processor
from microvlm.memory.conversation import with_answer
from microvlm.runtime import Memories

if TYPE_CHECKING:
    from microvlm.model.torch_runtime import TorchRuntime

PANEL_PX = 224
_TEXT_PX, _MARGIN_PX, _COLUMNS = 28, 8, 6
# From dark to bright, so that the map is readable in grey too: (position, red, green, blue).
_COLOURS = np.array(
    [(0.0, 0, 0, 4), (0.25, 87, 16, 110), (0.5, 188, 55, 84), (0.75, 249, 142, 9), (1.0, 252, 255, 164)]
)


class WordMap(NamedTuple):
    """The attention of one generated word to the image."""

    word: str
    weights: np.ndarray
    """float32 [grid, grid]: each patch's share of the word's attention to the image. Sums to 1."""


def word_maps(
    runtime: TorchRuntime,
    processor: Processor,
    inputs: Inputs,
    prompt: Prompt,
    tokens: list[int],
    memory: Memories | None = None,
) -> list[WordMap]:
    """One map per word of the answer `tokens` to `prompt`, for batch 1 with one image."""
    import torch

    model = runtime.model
    turn = with_answer(runtime, prompt, tokens[:-1])
    memory_slot = read_slot(runtime, prompt, memory)
    mask = np.concatenate([memory_slot.slot_mask[:, None], turn.attention_mask], 1)
    with torch.inference_mode():
        device = model.memory_prior.device
        embeds, attention_mask, positions = (
            torch.from_numpy(array).to(device)
            for array in (turn.inputs_embeds, mask, positions_of(turn.attention_mask))
        )
        layers = model.decoder.attention_maps(embeds, attention_mask, positions, memory_slot.slot)
        late = torch.stack(layers[len(layers) // 2 :]).mean((0, 2))[0]
        features = model.vision(torch.from_numpy(inputs.pixel_values).to(device))
        pooling = model.adapter.pooling_weights(features)[0, :, model.config.vision.num_leading_tokens :]
        # Column 0 is the memory slot. The row before a token's own row chose it.
        columns = torch.from_numpy(np.flatnonzero(inputs.input_ids[0] == processor.image_id) + 1).to(device)
        choices = late[inputs.input_ids.shape[1] - 1 :][: len(tokens)]
        spread = (choices[:, columns] @ pooling).cpu().numpy()
    side = model.config.vision.image_size // model.config.vision.patch_size
    maps = []
    for word, members in split_words(processor, tokens):
        weights = spread[members].mean(0)
        maps.append(WordMap(word, (weights / weights.sum()).reshape(side, side)))
    return maps


def split_words(processor: Processor, tokens: list[int]) -> list[tuple[str, list[int]]]:
    """Group token positions into words: a token whose text starts with white space starts a word."""
    words: list[tuple[str, list[int]]] = []
    stream, text = processor.stream(), ""
    for index, token in enumerate(tokens):
        piece = stream.feed(token)
        if not words or (piece[:1].isspace() and text.strip()):
            words.append(("", []))
            text = ""
        text += piece
        words[-1] = (text.strip(), [*words[-1][1], index])
    return [(word, members) for word, members in words if word]


def draw(image: ImageSource, maps: list[WordMap], caption: str) -> Image.Image:
    """Draw the image, then one panel per word, six in a row. Each map is scaled to its own range of weights."""
    picture = load_square(image, PANEL_PX)
    panels = [(picture, caption)] + [(_overlay(picture, m.weights), m.word) for m in maps]
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width, height = PANEL_PX + _MARGIN_PX, PANEL_PX + _TEXT_PX + _MARGIN_PX
    sheet = Image.new("RGB", (columns * width + _MARGIN_PX, rows * height + _MARGIN_PX), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for index, (panel, text) in enumerate(panels):
        left, top = _MARGIN_PX + index % columns * width, _MARGIN_PX + index // columns * height
        sheet.paste(panel, (left, top))
        pen.text((left, top + PANEL_PX + 4), _fit(text, font), font=font, fill="black")
    return sheet


def _overlay(picture: Image.Image, weights: np.ndarray) -> Image.Image:
    span = max(float(weights.max() - weights.min()), 1e-12)
    grey = Image.fromarray(((weights - weights.min()) / span * 255).astype(np.uint8))
    heat = np.asarray(grey.resize(picture.size, Image.Resampling.BICUBIC), np.float32) / 255
    colours = np.stack([np.interp(heat, _COLOURS[:, 0], _COLOURS[:, c]) for c in (1, 2, 3)], -1)
    return Image.blend(picture.convert("RGB"), Image.fromarray(colours.astype(np.uint8)), 0.6)


def _fit(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Cut text to the width of a panel."""
    label = text
    while len(text) > 1 and font.getlength(label) > PANEL_PX:
        text = text[:-1]
        label = text.rstrip() + "…"
    return label
