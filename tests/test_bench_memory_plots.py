"""Drawings of the memory's document: well-formed SVG that shows the numbers it was given."""

from __future__ import annotations

import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import files_below
from PIL import Image

from microvlm.bench.memory.memory_plots import plots, write_plots
from microvlm.bench.svg_plots import Axis, Line, bars, chart, heatmap
from microvlm.errors import UserError

SVG = "{http://www.w3.org/2000/svg}"
UNIT = Axis("share", 0.0, 1.0, (0.0, 0.5, 1.0))


def document(label: str = "nano-ort") -> dict:
    rows = [
        {
            "facts": count,
            "accuracy": share,
            "ci95": [share - 0.1, min(share + 0.1, 1)],
            "control": 0.0,
            "control_ci95": [0.0, 0.1],
            "nearest_neighbour": 0.9,
        }
        for count, share in ((2, 0.9), (8, 0.8), (16, 0.5))
    ]
    line = [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    gate = {"auroc": 1.0, "roc": line, "residual_auroc": 1.0, "residual_roc": line}
    weights = {"weights": [[0.1, -0.4], [0.0, 0.2], [0.3, 0.3]], "slot_use": [0.25, 0.75]}
    return {"label": label, "slots": 16, "recall": rows, "gate": gate, "addressing": weights}


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_a_documents_four_drawings_are_written_and_say_what_they_show(tmp_path):
    paths = write_plots(document(), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [
        "recall.svg",
        "addressing.svg",
        "slot_use.svg",
        "scope_roc.svg",
    ]
    for path, words in zip(
        paths, (("K/2", "K", "memory reset"), ("slot", "step"), ("1 - U(k,k)",), ("hits",)), strict=True
    ):
        labels = texts(ElementTree.parse(path).getroot())
        assert set(words) <= set(labels), path.name
    several = {"subjects": [document("a"), document("b")]}
    assert len(write_plots(several, tmp_path)) == 8
    assert (tmp_path / "b" / "recall.svg").is_file()
    assert plots({"costs": {}}) == {}


@pytest.mark.posix
def test_a_plot_that_cannot_be_written_whole_stays_as_it_was(tmp_path):
    (path, *_) = write_plots(document(), tmp_path)
    before = path.read_bytes()
    with files_below(1000), pytest.raises(UserError, match=r"recall\.svg cannot be written"):
        write_plots(document(), tmp_path)
    assert path.read_bytes() == before


def test_a_curve_passes_through_its_points_inside_of_its_band():
    root = ElementTree.fromstring(
        chart("t < u", [Line("n & m", (0, 1), (0.5, 1.0), (0.25, 0.75), (0.75, 1.0))], UNIT, UNIT)
    )
    (points,) = [element.get("points") for element in root.iter(f"{SVG}polyline")]
    (first, last) = [tuple(map(float, point.split(","))) for point in points.split()]
    (band,) = [element.get("points") for element in root.iter(f"{SVG}polygon")]
    corners = [tuple(map(float, point.split(","))) for point in band.split()]
    assert (first[0], last[0]) == (corners[0][0], corners[1][0])
    assert corners[0][1] < first[1] < corners[-1][1]
    assert first[1] - last[1] == pytest.approx(corners[-1][1] - corners[0][1])
    assert {"t < u", "n & m"} <= {*texts(root)}


def test_counts_on_a_log_axis_are_evenly_apart():
    axis = Axis("facts", 8, 128, (8, 32, 128), log=True)
    assert [axis.share(value) for value in (8, 32, 128)] == pytest.approx([0, 0.5, 1])


def test_bars_are_as_high_as_their_values():
    root = ElementTree.fromstring(bars("t", [0.25, 0.5, 1.0], "slot", UNIT))
    heights = [float(e.get("height")) for e in root.iter(f"{SVG}rect") if e.get("fill") != "white"]
    assert heights == pytest.approx([75, 150, 300])


def test_a_heatmap_has_one_pixel_a_number_from_dark_to_bright():
    values = np.arange(12.0).reshape(3, 4)
    root = ElementTree.fromstring(heatmap("t", values, "slot", "step", "|w|"))
    data = next(root.iter(f"{SVG}image")).get("href").removeprefix("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), int)
    assert pixels.shape == (3, 4, 3)
    luma = pixels @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luma.reshape(-1)) > 0).all()
    assert {"|w|: 0", "11"} <= {*texts(root)}
