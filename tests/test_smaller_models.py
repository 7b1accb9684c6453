"""Fewer layers, slots and tokens: what stays computes what it computed, what goes is what is missed least."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import FLOAT, TERNARY, seeded_model, tiny_config
from test_export_command import assert_one_sentence
from test_export_command import export as run_export
from tokenizers import Tokenizer

from microvlm.config import MicroVLMConfig, TextConfig
from microvlm.exporters.smaller.layer_choice import block_influence, choose_layers
from microvlm.exporters.smaller.model_cuts import with_slots, with_tokens, without_layers
from microvlm.exporters.smaller.samples import Facts, Sample
from microvlm.exporters.smaller.slot_choice import keys_of, principal_keys, recall
from microvlm.exporters.smaller.text_costs import compare, divergences
from microvlm.exporters.smaller.text_rows import Reader
from microvlm.exporters.vocabulary.shrink import shrink
from microvlm.exporters.vocabulary.token_map import first_tokens, token_bytes
from microvlm.exporters.vocabulary.token_order import order_merges, scripts_of
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.tokenizer_document import merge_pairs
from microvlm.model.checkpoint import describe_lowered, resolve_checkpoint
from microvlm.model.lowering import lower
from microvlm.sizes.smaller import Smaller
from microvlm.sizes.weight_bytes import lowered_layers, tensor_bytes

DEEP = TextConfig(
    vocab_size=300, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, intermediate_size=96, rope_theta=10_000.0, sub_norm=True, max_position_embeddings=256,
)  # fmt: skip
TEXTS = [
    Sample(text) for text in ("describe the image", "what is this? a red heart", "heart of the image: red")
]


def idle(model, layer):
    """Make a decoder layer add nothing to its input."""
    with torch.no_grad():
        model.decoder.layers[layer].self_attn.o_proj.weight.zero_()
        model.decoder.layers[layer].mlp.down_proj.weight.zero_()
    return model


def run(model, embeds, slot):
    with torch.no_grad():
        return model(embeds, torch.ones(embeds.shape[:2], dtype=torch.int64), slot)


@pytest.fixture
def deep_model():
    return seeded_model(tiny_config(FLOAT, text=DEEP))


def test_a_model_without_a_layer_that_adds_nothing_is_the_same_model(deep_model):
    cut = without_layers(idle(deep_model, 1), [0, 2, 3])
    embeds, latent = torch.randn(2, 5, 64), torch.randn(2, 48)
    with torch.no_grad():
        whole_slot, cut_slot = deep_model.memory_projection(latent), cut.memory_projection(latent)
    for before, after in zip([whole_slot[i] for i in (0, 2, 3)], cut_slot, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(run(deep_model, embeds, whole_slot), run(cut, embeds, cut_slot))
    assert (cut.config.text.num_hidden_layers, deep_model.config.text.num_hidden_layers) == (3, 4)
    assert len(deep_model.decoder.layers) == 4


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_the_rows_of_w_m_are_gathered_at_every_width(deep_model, bits):
    whole = lower(deep_model, WeightFormat(bits))
    cut = without_layers(whole, [3, 1])
    latent = torch.randn(2, 48)
    with torch.no_grad():
        before, after = whole.memory_projection(latent), cut.memory_projection(latent)
    # A matrix product of other sizes may sum in another order.
    for old, new in zip((before[3], before[1]), after, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(old, new, strict=True))


def test_the_layers_that_go_are_those_that_do_nothing(deep_model, tiny_processor):
    idle(idle(deep_model, 2), 0)
    reader = Reader(deep_model, tiny_processor)
    lines = []
    assert choose_layers(reader, TEXTS, 2, lines.append) == [1, 3]
    assert len(lines) == 2
    assert all("KL 0.0000" in line for line in lines)
    rows = [reader.row(sample) for sample in TEXTS]
    influence = block_influence(deep_model, reader, rows, None)
    assert influence[0] == pytest.approx(0, abs=1e-6)
    assert influence[2] == pytest.approx(0, abs=1e-6)
    assert min(influence[1], influence[3]) > 0.01


def test_a_removed_layer_that_does_something_costs_something(deep_model, tiny_processor):
    whole = Reader(deep_model, tiny_processor)
    same = compare(whole, whole, TEXTS)
    assert (same.kl, same.top1) == (0, 1)
    assert same.perplexity_before == same.perplexity_after
    assert same.tokens == sum(len(tiny_processor.text_ids(sample.text)) - 1 for sample in TEXTS)
    cut = compare(whole, Reader(without_layers(deep_model, [0]), tiny_processor), TEXTS)
    assert cut.kl > 0.01
    assert cut.perplexity_before == same.perplexity_before != cut.perplexity_after


def test_divergences_are_those_of_the_formula():
    target = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    guess = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    divergence, same = divergences(target.log(), guess.log(), torch.tensor([0, 1, 1]))
    assert divergence[0] == pytest.approx(0, abs=1e-6)
    assert divergence[1] == pytest.approx(0.1 * math.log(0.1 / 0.9) + 0.9 * math.log(0.9 / 0.1), rel=1e-5)
    assert same.tolist() == [1, 0]


def test_a_rotation_of_all_slots_changes_no_reading():
    model = seeded_model(tiny_config(FLOAT))
    latents = torch.nn.functional.normalize(torch.randn(12, 48), dim=-1).numpy()
    rotated = with_slots(model, principal_keys(model, latents, 16))
    facts = Facts(latents, latents[::-1].copy())
    assert recall(rotated, facts) == recall(model, facts) > 0.9
    assert np.allclose(
        (keys_of(rotated, latents) ** 2).sum(1), (keys_of(model, latents) ** 2).sum(1), atol=1e-5
    )


def test_fewer_slots_keep_the_part_of_the_key_space_that_keys_are_in():
    """Latents of a plane of M_ref: two slots recall them as sixteen do, and two others know none of them."""
    model = seeded_model(tiny_config(FLOAT))
    inverse = model.memory_encoder.pseudo_inverse
    angles = torch.linspace(0, 3, 2)
    cues = (torch.cos(angles)[:, None] * inverse[:, 3] + torch.sin(angles)[:, None] * inverse[:, 11]).numpy()
    facts = Facts(cues, torch.nn.functional.normalize(torch.randn(2, 48), dim=-1).numpy())
    rotation = principal_keys(model, cues, 2)
    cut = with_slots(model, rotation)
    assert cut.memory_prior.shape == (2, 48)
    assert cut.config.memory.slots == 2
    assert recall(model, facts) == recall(cut, facts) == 1
    assert rotation[[3, 11]].square().sum() == pytest.approx(2, abs=1e-4)
    assert np.abs(keys_of(with_slots(model, torch.eye(16)[:, :2]), cues)).max() < 1e-5


@pytest.mark.parametrize("quantization", [FLOAT, TERNARY], ids=["float", "ternary"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4, 1.58])
def test_bytes_of_an_export_are_counted_without_making_it(quantization, bits):
    model = seeded_model(tiny_config(quantization))
    for embedding_bits in (16, 8, 4):
        for packing in ("2bit", "base3"):
            weights = WeightFormat(bits, packing, embedding_bits)
            lowered = lower(model, weights)
            layers = lowered_layers(model.config, describe_lowered(model), weights)
            assert layers == describe_lowered(lowered)
            stored = {name: t.numel() * t.element_size() for name, t in lowered.state_dict().items()}
            assert tensor_bytes(model.config, layers) == stored


# Tokens.


@pytest.fixture(scope="module")
def nano_folder():
    return resolve_checkpoint("nano")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [f"a {color} umbrella on the {place}" for color in ("red", "blue") for place in ("left", "right")]
    path.write_text("".join(json.dumps({"text": f"{line} {n}"}) + "\n" for n in range(10) for line in lines))
    return path


def test_a_corpus_chooses_the_tokens_that_it_uses(nano_folder, corpus):
    config = MicroVLMConfig.load(nano_folder)
    by_merges = shrink(nano_folder, config, Smaller(vocabulary=400))
    by_use = shrink(nano_folder, config, Smaller(vocabulary=400, corpus=corpus))
    assert len(by_merges.old_ids) == len(by_use.old_ids) == 400
    text = "a red umbrella on the left"
    lengths = [
        len(Tokenizer.from_str(cut.documents["tokenizer.json"]).encode(text).ids)
        for cut in (by_merges, by_use)
    ]
    whole = Tokenizer.from_file(str(nano_folder / "tokenizer.json")).encode(text).ids
    assert lengths[1] == len(whole) < lengths[0]
    assert set(whole) <= set(by_use.old_ids)


def test_every_beginning_of_an_order_builds_its_tokens(nano_folder):
    model = json.loads((nano_folder / "tokenizer.json").read_text())["model"]
    uses = {number: number % 97 for number in model["vocab"].values()}
    order = order_merges(model, uses)
    assert sorted(order) == sorted(merge_pairs(model["merges"]))
    built = {token for token in model["vocab"] if len(token) == 1}
    for left, right in order:
        assert {left, right} <= built
        built.add(left + right)


def test_languages_keep_the_tokens_of_their_scripts():
    letters = ["a", "b", "Ð", "°", "±"]  # two letters of Cyrillic are Ð° and Ð±
    merges = [("a", "b"), ("Ð", "°"), ("Ð", "±"), ("Ð°", "Ð±"), ("ab", "Ð°")]
    vocab = {token: number for number, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    model = {"vocab": vocab, "merges": [list(pair) for pair in merges]}
    assert order_merges(model, scripts=scripts_of(["en"])) == [("a", "b")]
    assert order_merges(model, scripts=scripts_of(["ru"])) == merges[1:4]
    assert order_merges(model, scripts=scripts_of(["ru", "de"])) == merges


def test_the_first_token_of_a_dropped_one_is_where_the_smaller_tokenizer_begins(nano_folder):
    config = MicroVLMConfig.load(nano_folder)
    cut = shrink(nano_folder, config, Smaller(vocabulary=700))
    document = json.loads((nano_folder / "tokenizer.json").read_text())
    first = first_tokens(document, cut.old_ids, config.text.vocab_size)
    sizes = token_bytes(document, config.text.vocab_size)
    whole, smaller = (
        Tokenizer.from_str(json.dumps(document)),
        Tokenizer.from_str(cut.documents["tokenizer.json"]),
    )
    dropped = [number for number in range(config.text.vocab_size) if number not in set(cut.old_ids)]
    right = checked = 0
    for number in dropped:
        text = whole.decode([number], skip_special_tokens=False)
        if "\ufffd" in text or whole.encode(text).ids != [number]:
            continue
        ids = smaller.encode(text).ids
        assert sizes[number] == len(text.encode()) == sizes[[cut.old_ids[i] for i in ids]].sum()
        checked += 1
        right += ids[0] == first[number]
    assert checked > 500
    # Of a few words the pieces join in another way than the whole word did.
    assert right > 0.95 * checked


def test_equal_tables_of_fewer_tokens_cost_what_the_missing_tokens_had(tiny_processor):
    """No text has a dropped token: then the divergence is that of the whole model's own mass on them."""
    model = seeded_model(tiny_config(FLOAT))
    kept = list(range(290))  # the table has ten rows that are no tokens
    first = torch.tensor([*kept, *[0] * 10])
    costs = compare(
        Reader(model, tiny_processor), Reader(with_tokens(model, kept), tiny_processor), TEXTS, first
    )
    assert 0 < costs.kl < 1
    assert costs.perplexity_after < costs.perplexity_before
    assert costs.tokens == costs.tokens_after


# The command.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "0"], "--layers 0 leaves no decoder layers: give at least 1."),
        (["--layers", "-3"], "--layers -3 leaves no decoder layers"),
        (["--layers", "2"], "--layers 2 is not fewer than the 2 decoder layers that the model has."),
        (["--layers", "9"], "--layers 9 is not fewer than the 2 decoder layers"),
        (["--slots", "0"], "--slots 0 leaves no memory slots"),
        (["--slots", "16"], "--slots 16 is not fewer than the 16 memory slots"),
        (["--corpus", "texts.txt"], "--corpus chooses which tokens stay: say how many with --vocabulary."),
        (["--vocabulary", "280", "--corpus", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--language", "xx"], "--language xx is not known; choose of"),
        (["--calibrate", "texts.txt"], "--calibrate has nothing to calibrate here"),
        (["--layers", "1", "--calibrate", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--layers", "one"], "one"),
    ],
)
def test_what_cannot_be_made_smaller_is_one_sentence(options, words, speaking_checkpoint, tmp_path, capsys):
    result = run_export([speaking_checkpoint, "-o", tmp_path / "b", *options], capsys)
    assert_one_sentence(result, words)
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_without_a_tokenizer_has_nothing_to_measure_on(tiny_checkpoint, tmp_path, capsys):
    result = run_export([tiny_checkpoint, "-o", tmp_path / "b", "--layers", "1"], capsys)
    assert_one_sentence(result, "has no tokenizer.json, so nothing can be measured")


@pytest.mark.export
def test_a_smaller_bundle_runs_and_says_what_it_saved_and_cost(speaking_checkpoint, corpus, tmp_path, capsys):
    from microvlm import load

    options = [
        "--layers",
        "1",
        "--slots",
        "9",
        "--vocabulary",
        "280",
        "--corpus",
        corpus,
        "--threads",
        "1",
        "--json",
    ]
    status, stdout, _ = run_export([speaking_checkpoint, "-o", tmp_path / "b", *options], capsys)
    assert status == 0
    cuts = json.loads(stdout)["cuts"]
    assert [(cut["what"], cut["before"], cut["after"]) for cut in cuts] == [
        ("layers", 2, 1), ("slots", 16, 9), ("vocabulary", 300, 280),
    ]  # fmt: skip
    assert all(cut["predicted_saved_bytes"] > 0 and cut["measured_on"] == "corpus.jsonl" for cut in cuts)
    assert cuts[0]["kept"] in ([0], [1])
    assert {"kl", "top1", "perplexity_before", "perplexity_after"} <= cuts[0]["costs"].keys()
    assert 0 <= cuts[1]["costs"]["recall_after"] <= 1
    loaded = load(tmp_path / "b", "ort")
    config = loaded.config
    assert (config.text.num_hidden_layers, config.memory.slots, config.text.vocab_size) == (1, 9, 280)
    assert isinstance(loaded.generate(np.zeros((32, 32, 3), np.uint8)), str)


@pytest.mark.export
def test_without_costs_nothing_is_measured(speaking_checkpoint, tmp_path, capsys):
    options = ["--vocabulary", "280", "--no-costs", "--threads", "1"]
    status, stdout, _ = run_export([speaking_checkpoint, "-o", tmp_path / "b", *options], capsys)
    assert status == 0
    line = next(line for line in stdout.splitlines() if line.startswith("vocabulary"))
    assert line == "vocabulary 300 -> 280: 0.00 MB of weights less"
