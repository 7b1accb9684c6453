"""Which decoder layers a model misses least, by measuring.

ShortGPT (Men et al. 2024, arXiv 2403.03853) removes the layers that change their input least: block influence
1 - E[cos(x_i, x_i+1)]. It says nothing about what later layers make of the change. So here it only names candidates,
and of them the layer goes whose removal moves the model's predictions least, KL(whole || without it); then again for
the next one, on the model that is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.exporters.smaller.model_cuts import without_layers
from microvlm.exporters.smaller.samples import Sample
from microvlm.exporters.smaller.text_costs import divergences
from microvlm.exporters.smaller.text_rows import Reader, Row, picture_features
from microvlm.model.microvlm import MicroVLM

CANDIDATES = 4
"""Layers of least block influence that are tried at each step."""
MOST_LOGITS = 20_000_000
"""Predictions that are held at once, 4 bytes each: texts beyond them are left out."""
Log = Callable[[str], None]


def choose_layers(reader: Reader, samples: Sequence[Sample], keep: int, log: Log) -> list[int]:
    """Indices of the `keep` decoder layers that stay, ascending. `log` gets a line for each that goes."""
    model, processor = reader.model, reader.processor
    rows = _rows(reader, samples)
    features = picture_features(model, processor, samples[: len(rows)])
    target = reader.logits(rows, features).float().log_softmax(-1)
    kept = list(range(model.config.text.num_hidden_layers))
    while len(kept) > keep:
        influence = block_influence(without_layers(model, kept), reader, rows, features)
        order = sorted(range(len(kept)), key=influence.__getitem__)[:CANDIDATES]
        costs = {}
        for place in order:
            rest = [*kept[:place], *kept[place + 1 :]]
            guess = Reader(without_layers(model, rest), processor).logits(rows, features)
            costs[place] = float(divergences(target, guess.float().log_softmax(-1))[0].mean())
        place = min(costs, key=costs.__getitem__)
        log(
            f"layer {kept[place]} goes: block influence {influence[place]:.4f}, KL {costs[place]:.4f} without "
            f"{model.config.text.num_hidden_layers - len(kept) + 1} layers"
        )
        del kept[place]
    return kept


def _rows(reader: Reader, samples: Sequence[Sample]) -> list[Row]:
    rows: list[Row] = []
    room = MOST_LOGITS // reader.model.config.text.vocab_size
    for number, sample in enumerate(samples):
        row = reader.row(sample, number if sample.picture is not None else None)
        room -= len(row.scored)
        if rows and room < 0:
            break
        rows.append(row)
    return rows


@torch.no_grad()
def block_influence(
    model: MicroVLM, reader: Reader, rows: Sequence[Row], features: Tensor | None
) -> list[float]:
    """1 - E[cos(input, output)] of each decoder layer, over the positions that predict a scored token."""
    sums = [0.0] * len(model.decoder.layers)
    count = 0

    def listen(layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(_: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Any]) -> None:
            cosine = F.cosine_similarity(inputs[0], outputs[0], dim=-1)
            sums[layer] += sum(
                float((1 - cosine[number, [index - 1 for index in row.scored]]).sum())
                for number, row in enumerate(rows)
            )

        return hook

    hooks = [layer.register_forward_hook(listen(i)) for i, layer in enumerate(model.decoder.layers)]
    try:
        Reader(model, reader.processor).logits(rows, features)
    finally:
        for handle in hooks:
            handle.remove()
    count = sum(len(row.scored) for row in rows)
    return [value / count for value in sums]
