"""`--vocabulary N`: what is kept means what it meant, in ids, logits and files."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from test_export_command import assert_one_sentence
from test_export_command import export as run_export
from tokenizers import Tokenizer

from microvlm.backends import get_backend
from microvlm.config import MicroVLMConfig
from microvlm.exporters.bundle_writer import export
from microvlm.exporters.vocabulary.shrink import shrink
from microvlm.exporters.vocabulary.table_builder import probe_texts
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.processor import Processor
from microvlm.sizes.smaller import Smaller

SIZE = 275
"""Kept tokens of the tokenizer's 291: 256 bytes, 5 added tokens, 14 of its 30 merges."""
STOP = 290


@pytest.fixture(scope="module")
def stopping_checkpoint(speaking_checkpoint, tmp_path_factory):
    """A checkpoint whose stop token lies behind all merges, as in Qwen: its id must change."""
    folder = tmp_path_factory.mktemp("stopping") / "checkpoint"
    shutil.copytree(speaking_checkpoint, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"].append({**document["added_tokens"][0], "id": STOP, "content": "<|stop|>"})
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, STOP], "pad_token_id": 0}))
    return folder


@pytest.fixture(scope="module")
def two_bundles(stopping_checkpoint, tmp_path_factory):
    """(whole, cut)."""
    folder = tmp_path_factory.mktemp("vocabulary")
    export(stopping_checkpoint, folder / "whole", WeightFormat(), threads=1)
    export(stopping_checkpoint, folder / "cut", WeightFormat(), smaller=Smaller(vocabulary=SIZE), threads=1)
    return folder / "whole", folder / "cut"


def logits_of(bundle, row):
    runtime = get_backend("ort").load(bundle, 1)
    ids = np.array([row])
    mask = np.ones((1, ids.shape[1] + 1), np.int64)
    mask[0, 0] = 0
    places = np.arange(1, ids.shape[1] + 1)[None]
    embeds = runtime.embed_tokens(ids)
    return embeds, runtime.decode(embeds, mask, places, runtime.empty_slot(1), ids.shape[1])[0]


@pytest.mark.export
def test_kept_rows_give_the_logits_of_the_whole_vocabulary_bit_for_bit(two_bundles, stopping_checkpoint):
    whole, cut = two_bundles
    kept_tokens = shrink(
        stopping_checkpoint, MicroVLMConfig.load(stopping_checkpoint), Smaller(vocabulary=SIZE)
    ).old_ids
    before, after = Processor.from_pretrained(whole), Processor.from_pretrained(cut)
    merged = [number for number in kept_tokens if 260 <= number < STOP]
    prompt = "0".join(before.decode([number]) for number in merged) + " 猫"
    old, new = before.prompt_ids(prompt, 0), after.prompt_ids(prompt, 0)
    assert len(merged) == SIZE - 256 - 5
    assert set(merged) < set(old)
    assert [kept_tokens[number] for number in new] == old
    embeds, logits = logits_of(whole, old)
    cut_embeds, cut_logits = logits_of(cut, new)
    assert np.array_equal(embeds, cut_embeds)
    assert cut_logits.shape[-1] == SIZE
    assert np.array_equal(logits[..., kept_tokens], cut_logits)
    assert kept_tokens[-1] == STOP


def test_texts_of_kept_tokens_are_cut_into_the_same_tokens(nano_folder, tmp_path):
    config = MicroVLMConfig.load(nano_folder)
    smaller = shrink(nano_folder, config, Smaller(vocabulary=1000))
    whole = Tokenizer.from_file(str(nano_folder / "tokenizer.json"))
    cut = Tokenizer.from_str(smaller.documents["tokenizer.json"])
    kept_tokens = set(smaller.old_ids)
    same = 0
    captions = json.loads((nano_folder / "tokenizer.json").read_text())["model"]["vocab"]
    words = [word.replace("Ġ", " ") for word in captions if word.isascii() or "Ġ" in word]
    for text in [*words, *probe_texts(500, ["<image>"])]:
        old, new = whole.encode(text), cut.encode(text)
        assert cut.decode(new.ids, skip_special_tokens=False) == whole.decode(
            old.ids, skip_special_tokens=False
        )
        if kept_tokens.issuperset(old.ids):
            assert new.tokens == old.tokens
            assert [smaller.old_ids[number] for number in new.ids] == old.ids
            same += 1
    assert 500 < same < len(words) + 500


@pytest.fixture
def nano_folder():
    from microvlm.model.checkpoint import resolve_checkpoint

    return resolve_checkpoint("nano")


@pytest.mark.export
def test_the_files_of_a_cut_bundle_agree(two_bundles):
    _, cut = two_bundles
    manifest = json.loads((cut / "manifest.json").read_text())
    assert manifest["vocabulary"] == {"tokens": SIZE, "of": 300, "merges": SIZE - 256 - 5}
    assert MicroVLMConfig.load(cut).text.vocab_size == SIZE
    processor = Processor.from_pretrained(cut)
    assert processor.tokenizer.description == "tables"
    assert processor.tokenizer.vocab_size == SIZE
    generation = json.loads((cut / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [processor.eos_id, SIZE - 1]
    assert processor.stop_tokens == (processor.eos_id, SIZE - 1)
    assert processor.decode([SIZE - 1]) == ""
    assert generation["pad_token_id"] == processor.pad_id
    library = Tokenizer.from_file(str(cut / "tokenizer.json"))
    for text in probe_texts(200, list(processor.tokenizer.added_tokens), seed=3):
        assert processor.tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.export
def test_a_whole_bundle_says_so(two_bundles):
    assert json.loads((two_bundles[0] / "manifest.json").read_text())["vocabulary"] is None


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("100", "too few: the bytes and the tokens of the prompt take 260"),
        ("300", "not fewer than the 300 tokens"),
        ("-1", "too few"),
        ("many", "many"),
    ],
)
def test_a_bad_size_is_one_sentence(size, words, speaking_checkpoint, tmp_path, capsys):
    arguments = [speaking_checkpoint, "-o", tmp_path / "b", "--vocabulary", size]
    assert_one_sentence(run_export(arguments, capsys), words)
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_without_a_byte_level_tokenizer_is_one_sentence(
    tiny_checkpoint, speaking_checkpoint, tmp_path, capsys
):
    arguments = [tiny_checkpoint, "-o", tmp_path / "b", "--vocabulary", "280"]
    assert_one_sentence(run_export(arguments, capsys), "tokenizer.json")
    other = tmp_path / "other"
    shutil.copytree(speaking_checkpoint, other)
    path = other / "tokenizer.json"
    document = json.loads(path.read_text())
    for change, words in (
        ({"model": {**document["model"], "type": "Unigram"}}, "is Unigram and not BPE"),
        ({"model": {**document["model"], "byte_fallback": True}}, "byte_fallback"),
        ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
        ({"model": 3}, "(its model): the document must be an object, not a whole number"),
    ):
        path.write_text(json.dumps({**document, **change}))
        assert_one_sentence(run_export([other, "-o", tmp_path / "b", "--vocabulary", "280"], capsys), words)


def test_tokens_that_any_file_speaks_of_are_kept_and_renumbered(speaking_checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(speaking_checkpoint, folder)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    added = ("<bos>", "<tool>", "<unspoken>")
    for offset, content in enumerate(added):
        document["added_tokens"].append(
            {**document["added_tokens"][0], "id": 290 + offset, "content": content}
        )
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [290], "tokens": ["<bos>"]}},
    }
    path.write_text(json.dumps(document))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 291], "bos_token_id": null}')
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": {"content": "<|end|>"},
                "additional_special_tokens": ["<image>", "<unspoken>"],
                "added_tokens_decoder": {"290": {"content": "<bos>"}, "292": {"content": "<unspoken>"}},
            }
        )
    )
    smaller = shrink(folder, MicroVLMConfig.load(folder), Smaller(vocabulary=280))
    cut = Tokenizer.from_str(smaller.documents["tokenizer.json"])
    bos, tool = cut.token_to_id("<bos>"), cut.token_to_id("<tool>")
    assert (smaller.old_ids[bos], smaller.old_ids[tool]) == (290, 291)
    assert cut.token_to_id("<unspoken>") is None
    assert cut.encode("a").ids[0] == bos
    assert json.loads(smaller.documents["generation_config.json"]) == {
        "eos_token_id": [cut.token_to_id("<|end|>"), tool],
        "bos_token_id": None,
    }
    settings = json.loads(smaller.documents["tokenizer_config.json"])
    assert settings["additional_special_tokens"] == ["<image>"]
    assert settings["added_tokens_decoder"] == {str(bos): {"content": "<bos>"}}


@pytest.mark.parametrize("embedding_bits", [16, 8, 4])
def test_a_table_that_is_packed_already_keeps_its_bytes(ternary_model, embedding_bits):
    from microvlm.exporters.smaller.model_cuts import with_tokens
    from microvlm.model.lowering import lower

    kept_tokens = [0, 3, 7, 299]
    whole = lower(ternary_model, WeightFormat(embedding_bits=embedding_bits))
    cut = with_tokens(whole, kept_tokens)
    assert cut.config.text.vocab_size == len(kept_tokens)
    before, after = whole.embedding.state_dict(), cut.embedding.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor[kept_tokens] == after[name]).all(), name
