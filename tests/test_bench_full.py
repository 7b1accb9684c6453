"""`microvlm-bench full` on a small bundle: the document, bars that scale with the bandwidth, bad input."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from microvlm.bench import report
from microvlm.bench.bench_command import command
from microvlm.bench.full import bundle_sizes, full_bench, random_bundle
from microvlm.bench.speed.speed_bench import bytes_read_per_token
from microvlm.errors import UserError
from microvlm.presets import preset


@pytest.mark.linux
def test_a_decoder_is_timed_beside_the_roofline(tiny_bundle):
    arguments = ["full", str(tiny_bundle), "--rounds", "2", "--new-tokens", "3", "--json"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    figures = document["full"]
    assert figures["prefill"]["repeats"] == 2
    assert figures["decode"]["repeats"] == 2 * 3
    assert figures["prefill_tokens_per_s"] > 0
    assert figures["weight_bytes_per_token"] == bytes_read_per_token(tiny_bundle)
    assert figures["tokenizer_anonymous_bytes"] is None, "this bundle has no tokenizer"
    assert 0 < figures["anonymous_of_model_bytes"] < figures["peak_rss_bytes"]
    assert document["provenance"]["stream_gb_per_s"]["1"] > 0
    assert [bar["name"] for bar in document["bars"]] == [
        "anonymous_of_model_bytes",
        "decode_tokens_per_s",
        "prefill_tokens_per_s",
    ]
    for page in (report.text(document), report.markdown(document)):
        assert "prefill of 64, tokens/s" in page


def test_speeds_are_demanded_in_proportion_to_the_bandwidth():
    figures = {
        "anonymous_of_model_bytes": 60_000_001,
        "decode_tokens_per_s": 60.0,
        "prefill_tokens_per_s": 219.0,
    }
    memory, decode, prefill = full_bench.bars(figures, 1, 20.0)
    assert (decode["at_least"], decode["met"]) == (60.0, True)
    assert (prefill["at_least"], prefill["met"]) == (146.67, True)
    assert memory["met"] is False
    assert full_bench.bars(figures, 1, 30.0)[2]["met"] is False
    assert [bar["name"] for bar in full_bench.bars(figures, 2, 20.0)] == ["anonymous_of_model_bytes"]
    assert full_bench.bars({**figures, "anonymous_of_model_bytes": None}, 2, 20.0)[0]["met"] is None


@pytest.mark.parametrize("flag", ["--threads", "--rounds", "--new-tokens"])
def test_a_count_below_one_is_refused(flag, tiny_bundle):
    result = CliRunner().invoke(command, ["full", str(tiny_bundle), flag, "0"])
    assert isinstance(result.exception, UserError)
    assert f"{flag} is 0" in str(result.exception)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    result = CliRunner().invoke(command, ["full", str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert "neither a bundle" in str(result.exception)


def test_sizes_are_those_of_the_files_and_each_is_compared_with_the_first(tiny_bundle, monkeypatch):
    """The small bundle stands for every variant: an export of the full size takes minutes."""
    variants_built = []
    monkeypatch.setattr(
        bundle_sizes,
        "random_full_bundle",
        lambda log, **variant: variants_built.append(variant) or tiny_bundle,
    )
    variants = ({}, {"vocabulary": 50_000, "packing": "base3"})
    document = bundle_sizes.run(print, variants)
    assert variants_built == list(variants)
    files = [path for path in tiny_bundle.rglob("*") if path.is_file()]
    assert [row["bundle_bytes"] for row in document["bundles"]] == 2 * [
        sum(path.stat().st_size for path in files)
    ]
    document["bundles"][1]["bundle_bytes"] += 1_500_000
    rows = report.read_report(document).tables[0].rows
    assert [row[0] for row in rows[1:]] == ["2bit", "base3"]
    assert [row[5] for row in rows[1:]] == ["+0.0", "+1.5"]


def test_a_variant_has_the_layers_and_slots_that_were_asked_for():
    config = random_bundle._config(20, 256)
    assert (config.text.num_hidden_layers, config.memory.slots) == (20, 256)
    assert random_bundle._config(None, None) == preset("full")
