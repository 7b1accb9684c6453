"""A checkpoint's model card goes into its bundle, as a page that needs no other file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import CARD

from microvlm.errors import UserError
from microvlm.exporters.model_card import MODEL_CARD, copy_card, stand_alone
from microvlm.formats.manifest import read_manifest, sha256

ROOT = Path(__file__).parent.parent


def test_an_exported_bundle_has_the_card_and_its_manifest_and_page_name_it(speaking_bundle):
    card = speaking_bundle / MODEL_CARD
    entry = read_manifest(speaking_bundle).files[MODEL_CARD]
    assert (entry.bytes, entry.sha256) == (card.stat().st_size, sha256(card))
    assert f"| [`{MODEL_CARD}`]({MODEL_CARD}) |" in (speaking_bundle / "README.md").read_text()


def test_the_card_of_a_bundle_keeps_words_tables_and_web_addresses_and_no_other_link(speaking_bundle):
    text = (speaking_bundle / MODEL_CARD).read_text()
    assert text == (
        "# tiny\n\nIt knows nothing, as [the paper](https://example.org/paper) says: [scores](#scores).\n\n"
        "## Scores\n\n|  | tiny |\n| --- | ---: |\n| right | 0.000 [0.000, 0.037] |\n"
    )
    assert len(re.findall(r"\]\(", CARD)) == 4


def test_a_checkpoint_without_a_card_gives_a_bundle_without_one(tiny_bundle):
    assert MODEL_CARD not in read_manifest(tiny_bundle).files
    assert MODEL_CARD not in (tiny_bundle / "README.md").read_text()


def test_the_bundled_model_has_the_card_of_the_docs_whose_bundle_holds_no_broken_link():
    page = ROOT / "docs" / "model-card.md"
    assert (ROOT / "microvlm" / "checkpoints" / "photo" / MODEL_CARD).read_bytes() == page.read_bytes()
    text = stand_alone(page.read_text(encoding="utf-8"))
    assert "<!--" not in text
    assert re.findall(r"\]\((?!https?:)", text) == []


def test_a_page_of_brackets_alone_takes_no_time_and_a_picture_in_a_link_leaves_nothing():
    assert stand_alone("[" * 1_000_000) == "[" * 1_000_000
    assert stand_alone("![" * 500_000 + "](") == "![" * 500_000 + "]("
    assert stand_alone("a [![badge](badge.svg)](builds) b\n") == "a  b\n"


@pytest.mark.parametrize(
    ("content", "words"), [(b"\xff\xfe# a card", "is not text in UTF-8"), (b"a" * 1_000_001, "too many")]
)
def test_what_is_no_page_is_one_sentence(content, words, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / MODEL_CARD).write_bytes(content)
    with pytest.raises(UserError, match=rf"{MODEL_CARD}.*{words}"):
        copy_card(tmp_path, tmp_path / "bundle")
    assert list((tmp_path / "bundle").iterdir()) == []
