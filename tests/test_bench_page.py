"""`microvlm-bench report --html`: one page without scripts or other files, of right documents and of strangers'."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from microvlm.bench.bench_command import command
from microvlm.bench.evalset_reader import load_evalset
from microvlm.bench.gates.result_store import add_result
from microvlm.bench.page import gallery, word_maps
from microvlm.bench.page.html_page import html_page
from microvlm.bench.photograph_reader import read_photographs
from microvlm.bench.report import report_of_file
from microvlm.bench.svg_plots import Axis, Line, Points, scatter, stacked
from microvlm.errors import UserError

RESULTS = Path(__file__).parent.parent / "docs" / "results"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Elements(HTMLParser):
    """Tags with their attributes and all text, and whether every tag is closed in its order."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    return html_page([RESULTS])


def test_the_page_needs_no_script_no_network_and_no_other_file(page: str):
    elements = Elements(page)
    assert "script" not in {tag for tag, _ in elements.tags}
    for tag, attributes in elements.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), (tag, value)
    style = page.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|http", style)
    keys = {attributes["id"] for _, attributes in elements.tags if attributes.get("id")}
    links = {attributes["href"] for tag, attributes in elements.tags if tag == "a"}
    assert links <= {f"#{key}" for key in keys}


def test_every_document_is_in_the_page_with_every_table_and_remark(page: str):
    text = Elements(page).text
    for path in sorted(RESULTS.glob("*.json")):
        report = report_of_file(path)
        assert report.head in text, path
        for table in report.tables:
            assert all(cell in text for row in table.rows for cell in row), (path, table.name)
        assert all(remark in text for remark in report.remarks), path


def test_every_chart_is_drawn_well_formed_and_named(page: str):
    drawings = re.findall(r"<svg .*?</svg>", page, re.S)
    titles = [ElementTree.fromstring(drawing)[0].text for drawing in drawings]
    for title in (
        "Latency by phase, photo-1.58bit",
        "Size and quality",
        "Roofline, 1 thread",
        "Risk over coverage",
    ):
        assert titles.count(title) == 1, titles
    assert titles.count("Predicted against published") == 1
    assert "Facts written once, asked for with another view" in titles
    patterns = re.findall(r'<pattern id="([^"]+)"', page)
    assert len(patterns) == len(set(patterns)) > 5


def equivalence_with_examples(folder: Path) -> Path:
    """nano's document with what newer versions write: examples, quantiles, a near-tie."""
    document = json.loads((RESULTS / "equivalence-nano.json").read_text())
    example = {"prompt": "what <is> this?", "right": "a cat", "reference": "cat", "candidate": "<b>dog</b>"}
    names = [read_photographs()[0].file, "../../../etc/passwd", "/etc/passwd"]
    document["examples"] = [{"picture": name, **example} for name in names]
    document["kl_quantiles"] = [[0, 0.0], [50, 1e-6], [100, 2e-3]]
    document["margin_quantiles"] = [[0, 1e-3], [50, 3.0], [100, 9.0]]
    document["flipped_margins"] = [0.002]
    (folder / "equivalence.json").write_text(json.dumps(document))
    return folder / "equivalence.json"


def test_pictures_have_the_answers_of_both_backends_beside_them(tmp_path: Path):
    page = html_page([equivalence_with_examples(tmp_path)])
    elements = Elements(page)
    images = [attributes for tag, attributes in elements.tags if tag == "img"]
    assert [image["alt"] for image in images] == ["a cat"]  # files that are not the package's are not shown
    assert images[0]["src"].startswith("data:image/jpeg;base64,")
    assert "nano-1.58bit on torch" in elements.text
    assert "nano-1.58bit on ort" in elements.text
    assert "<b>dog</b>" in elements.text
    assert "<b>" not in page
    assert "1 positions whose likeliest token differs" in elements.text
    assert "KL divergence of 454 positions" in elements.text


def attention_with_examples(folder: Path, examples: list[dict[str, Any]]) -> Path:
    """nano's document with these examples."""
    document = json.loads((RESULTS / "attention-nano.json").read_text())
    document |= {"examples": examples, "stretch": True}
    (folder / "attention.json").write_text(json.dumps(document))
    return folder / "attention.json"


def looked(picture: str, *words: dict[str, Any]) -> dict[str, Any]:
    return {"picture": picture, "right": "a cat", "answer": "cat", "maps": list(words)}


def pixels_of(image: dict[str, str | None]) -> np.ndarray:
    data = base64.b64decode((image["src"] or "").removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"), np.float32)


def test_a_word_has_a_map_that_needs_no_colour_beside_the_answers_of_the_backends(tmp_path: Path):
    (tmp_path / "more").mkdir()
    weights = [[0.0] * 4 for _ in range(4)]
    weights[3][0] = 0.2
    flat = [[0.01] * 4] * 4
    words = [
        {"word": "<b>cat</b>", "note": "20% here, 70% whole", "weights": weights},
        {"word": "flat", "note": "16% here, 70% whole", "weights": flat},
    ]
    example = looked(read_photographs()[0].file, *words)
    files = [equivalence_with_examples(tmp_path / "more"), attention_with_examples(tmp_path, [example])]
    page = html_page(files)
    elements = Elements(page)
    images = [attributes for tag, attributes in elements.tags if tag == "img"]
    # The prompt differs from the other document's, so the picture stands twice: with answers, and with maps.
    assert [image["alt"] for image in images] == [
        "a cat",
        "a cat",
        "\u201c<b>cat</b>\u201d looked most at the bottom left",
        "\u201cflat\u201d looked most at the top left",
    ]
    assert "20% here, 70% whole" in elements.text
    assert "Where nano on torch looked" in elements.text
    assert "20.0" in elements.text
    assert "<b>" not in page
    # In grey: only its place of the first map is bright, and nothing of the second.
    first, second = pixels_of(images[2]), pixels_of(images[3])
    height, width = first.shape
    place = (slice(height * 3 // 4 + 5, height - 5), slice(5, width // 4 - 5))
    assert first[place].mean() > second[place].mean() + 60
    assert first[: height // 2, width // 2 :].mean() == pytest.approx(
        second[: height // 2, width // 2 :].mean(), abs=12
    )
    framed = first[-4:, : width // 4].min(0)
    assert framed.mean() < 60 < second[-4:, : width // 4].min(0).mean() + 60


def test_pictures_and_maps_of_documents_of_any_length_are_bounded(tmp_path: Path):
    word = {"word": "cat", "note": "", "weights": [[0.1] * 8] * 8}
    names = [image.file for image in load_evalset().images]
    examples = [looked(name, *[word] * 3) for name in names]
    assert len(names) > gallery.MOST_PICTURES or 3 * len(names) > word_maps.MOST_MAPS
    page = html_page([attention_with_examples(tmp_path, examples)])
    shown = page.count("looked most at") // 2
    assert shown == word_maps.MOST_MAPS // 3 * 3
    assert "their maps are left out" in page
    assert len(page) < 6_000_000


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ([[0.1, 0.1], [0.1]], "different lengths"),
        ([[-0.1]], "weights"),
        ([[float(2**60)]], "weights"),
        ([], "weights"),
        ([[0.0] * 65], "weights"),
    ],
)
def test_a_map_that_is_none_is_refused_with_the_name_of_the_field(
    tmp_path: Path, weights: list[list[float]], complaint: str
):
    word = {"word": "cat", "note": "", "weights": weights}
    file = attention_with_examples(tmp_path, [looked(read_photographs()[0].file, word)])
    with pytest.raises(UserError, match=complaint):
        html_page([file])


def test_maps_over_a_file_of_a_strangers_choice_are_not_drawn(tmp_path: Path):
    word = {"word": "cat", "note": "", "weights": [[0.1]]}
    examples = [
        looked(name, word) for name in ("../../../etc/passwd", "/etc/passwd", str(tmp_path / "a.png"))
    ]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    elements = Elements(html_page([attention_with_examples(tmp_path, examples)]))
    assert "img" not in {tag for tag, _ in elements.tags}


def test_a_strangers_words_are_text_and_nothing_else(tmp_path: Path):
    document = json.loads((RESULTS / "run-nano.json").read_text())
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[31m"
    for entry in document["results"]:
        entry["label"] = evil
    document["provenance"]["cpu"] = evil
    (tmp_path / "run.json").write_text(json.dumps(document))
    elements = Elements(html_page([tmp_path / "run.json"]))
    assert not {"script", "img"} & {tag for tag, _ in elements.tags}
    assert "<script>alert(1)</script>" in elements.text
    assert "\x1b" not in elements.text


def test_the_history_of_a_store_is_a_table_and_a_curve(tmp_path: Path):
    store = tmp_path / "results.jsonl"
    document = json.loads((RESULTS / "run-photo.json").read_text())
    for factor in (1.0, 0.9):
        changed = copy.deepcopy(document)
        for entry in changed["results"]:
            for times in entry["phases"].values():
                times["median_ms"] *= factor
        add_result(store, changed)
    text = Elements(html_page([RESULTS / "run-photo.json"], store)).text
    assert "Times of photo-1.58bit, measured" in text
    assert text.count(document["provenance"]["commit"]["hash"][:10]) >= 3
    assert "ort, decode" in text


def test_the_command_prints_the_path_of_the_page(tmp_path: Path):
    out = tmp_path / "report.html"
    arguments = ["report", str(RESULTS / "run-nano.json"), "--html", str(out)]
    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert result.stdout == f"{out}\n"
    assert out.read_text() == html_page([RESULTS / "run-nano.json"])
    refused = CliRunner().invoke(command, [*arguments, "--pages"], standalone_mode=False)
    assert "--html writes one page" in str(refused.exception)


def test_other_json_files_of_a_folder_are_left_out_and_none_is_an_error(tmp_path: Path):
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(UserError, match="there is no document to show"):
        html_page([tmp_path])
    with pytest.raises(UserError, match="not a report that this version knows"):
        html_page([tmp_path / "package.json"])
    with pytest.raises(UserError, match="does not exist"):
        html_page([tmp_path / "none.json"])


def test_points_and_bars_are_where_their_values_are():
    axis = Axis("x", 1, 100, (1, 10, 100), log=True)
    drawing = scatter("p", [Points("a", [10], [10], ["here"])], axis, axis, [Line("one", (1, 100), (1, 100))])
    circles = [node for node in ElementTree.fromstring(drawing).iter() if node.tag.endswith("circle")]
    middle = next(node for node in circles if node.get("r") == "4")
    assert float(middle.get("cx", 0)) == pytest.approx(64 + (640 - 84) / 2)
    bars = ElementTree.fromstring(stacked("s", {"one": {"a": 1, "b": 3}, "two": {"b": 2}}, "ms"))
    widths = [
        float(node.get("width", 0))
        for node in bars.iter()
        if node.get("stroke") == "white" and node.tag.endswith("rect")
    ]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.02)
    assert widths[2] == pytest.approx(2 * widths[0], abs=0.02)
    fills = [
        node.get("fill")
        for node in bars.iter()
        if node.get("stroke") == "white" and node.tag.endswith("rect")
    ]
    assert fills[0] != fills[1] == fills[2]
