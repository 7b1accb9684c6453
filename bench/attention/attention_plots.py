"""Heatmaps of `microvlm-bench attention`: text tokens x prefix embeddings, a PNG for each layer. Needs Pillow only."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from microvlm.atomic import write_file
from microvlm.bench.attention.attention_bench import Measured
from microvlm.bench.attention.attention_maps import ModelAttention
from microvlm.commands.heatmap import Table, draw_table


def write_plots(measured: Measured, folder: Path) -> list[Path]:
    """Draw `layer-00.png` and so on into `folder`, which is created; for two models also the second and the difference.

    Maps are means over pictures and heads; a difference is the second model's map less the first's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = str(measured.document["model"]["model"])
    first = _means(measured.model)
    sheets = [
        (f"layer-{layer:02d}.png", f"{name}, layer {layer}", values) for layer, values in enumerate(first)
    ]
    if measured.against is not None:
        other = str(measured.document["comparison"]["against"]["model"])
        for layer, values in enumerate(_means(measured.against)):
            sheets.append((f"layer-{layer:02d}-against.png", f"{other}, layer {layer}", values))
            title = f"{other} less {name}, layer {layer}"
            sheets.append((f"layer-{layer:02d}-difference.png", title, values - first[layer]))
    columns = f"{measured.model.shape[2]} prefix embeddings, in order"
    paths = []
    for file, title, values in sheets:
        content = io.BytesIO()
        draw_table(Table(title, measured.model.tokens.labels, values, columns)).save(content, "PNG")
        write_file(folder / file, content.getvalue())
        paths.append(folder / file)
    return paths


def _means(model: ModelAttention) -> list[np.ndarray]:
    return [layer.mean((0, 1)) for layer in model.prefix]
