"""Hostile graphs through ONNX Runtime: each is refused with a sentence or right, and none ends the process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from microvlm.formats.op_table import OPS

PROGRAM = Path(__file__).with_name("hostile_graphs.py")
MUTANTS, SEED = 600, 1


@pytest.fixture(scope="module")
def outcomes(native_library) -> list[dict]:
    command = [sys.executable, "-P", str(PROGRAM), str(native_library), str(MUTANTS), str(SEED)]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, f"{lines[-1] if lines else ''}\n{result.stderr[-2000:]}"
    decoder = json.JSONDecoder()
    documents = []
    for line in lines:
        case, end = decoder.raw_decode(line)
        documents.append({**case, **json.loads(line[end:])})
    return documents


def test_every_graph_is_refused_or_right_as_the_table_says(outcomes):
    assert [document for document in outcomes if not document["expected"]] == []
    assert {document["outcome"] for document in outcomes} == {"refused", "right"}


def test_every_operator_has_right_and_refused_graphs_with_initializers_and_with_inputs(outcomes):
    counts = Counter(
        (document["case"].split(":")[0], document["outcome"])
        for document in outcomes
        if ", " not in document["case"]
    )
    for op in OPS.values():
        for kind in ("initializers", "inputs"):
            assert counts[f"{op.name} ({kind})", "refused"] >= 40
            assert counts[f"{op.name} ({kind})", "right"] >= 4


def test_a_refusal_is_one_sentence_for_people(outcomes):
    sentences = [document["sentence"] for document in outcomes if document["outcome"] == "refused"]
    assert len(sentences) > 1000
    assert all(sentence.strip() for sentence in sentences)
    text = "\n".join(sentences)
    for part in (
        "x and packed differ in columns",
        "packed does not hold that many rows",
        "multiplier does not fit packed",
        "scale has neither one value nor one a row",
        "the table's operands do not fit each other",
        "the number of rows is negative",
        "x has no columns",
        "an id is outside the table",
        "dimensions, and",
    ):
        assert part in text
