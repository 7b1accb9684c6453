"""Mixtures: every epoch is complete, shares are those of the weights, and the order depends on the seed alone."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from drawn_emoji import ROWS, run, write_packages

from microvlm.errors import UserError
from microvlm.inputs.images import load_square
from microvlm.training.data.caption_data import CaptionData, CaptionSample, Turn, open_data
from microvlm.training.data.mixture import BLOCK, GROUP, EpochOrder, Mixture, permutation
from microvlm.training.emoji.data.drawing_sources import TRAIN_VENDORS


class Numbers(CaptionData):
    """A source whose samples are their own numbers."""

    def __init__(self, name: str, shard_sizes: list[int]):
        self.folder, self.name, self._sizes = Path(name), name, np.array(shard_sizes, dtype=np.int64)

    def shard_sizes(self, split):
        return self._sizes if split == "train" else self._sizes[:0]

    def sample(self, split, index):
        return CaptionSample(f"{self.name}-{index}", (b"",), (Turn(str(index)),))

    def texts(self, split):
        return iter(())


def test_each_epoch_visits_every_sample_once_in_an_order_of_its_own():
    order = EpochOrder(np.array([5, 1, 9] * 20), (3, 0))
    epochs = [[order.sample_number(e * 300 + i) for i in range(300)] for e in range(3)]
    assert all(sorted(epoch) == list(range(300)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    fresh = EpochOrder(np.array([5, 1, 9] * 20), (3, 0))
    assert [fresh.sample_number(i) for i in range(600, 900)] == epochs[2]
    assert [EpochOrder(np.array([5, 1, 9] * 20), (4, 0)).sample_number(i) for i in range(300)] != epochs[0]


def test_an_epoch_reads_group_after_group_of_shards():
    order = EpochOrder(np.full(100, 10), (1, 0))
    shards = [order.sample_number(i) // 10 for i in range(1000)]
    for start in range(0, 1000, GROUP * 10):
        group = shards[start : start + GROUP * 10]
        assert len(set(group)) == len(group) // 10
        assert group != sorted(group)


def test_twelve_million_samples_have_an_order_at_once():
    order = EpochOrder(np.full(12_000, 1000), (1, 0))
    numbers = [order.sample_number(12_000_000 * 3 + i) for i in range(0, 12_000_000, 1_000_003)]
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) < 12_000_000


def test_shares_of_every_block_are_those_of_the_weights_and_sources_are_not_in_turn():
    sources = [Numbers("a", [100]), Numbers("b", [40, 3]), Numbers("c", [2000])]
    mixture = Mixture([(sources[0], 6), (sources[1], 3), (sources[2], 1)], seed=5)
    names = [mixture.sample(p).key.split("-")[0] for p in range(3 * BLOCK)]
    for start in range(0, len(names), BLOCK):
        counts = Counter(names[start : start + BLOCK])
        assert abs(counts["a"] / BLOCK - 0.6) < 1e-3 > abs(counts["b"] / BLOCK - 0.3)
    assert names[:BLOCK] != names[BLOCK : 2 * BLOCK]
    assert mixture.epoch_length == 2143
    seen = Counter(mixture.sample(p).key for p in range(BLOCK))
    b = [seen[f"b-{i}"] for i in range(43)]
    assert max(b) - min(b) <= 1


def test_a_tiny_weight_still_has_its_place_in_each_block():
    mixture = Mixture([(Numbers("a", [10]), 1.0), (Numbers("b", [10]), 1e-9)], seed=0)
    assert mixture.quotas.tolist() == [BLOCK - 1, 1]
    many = Mixture([(Numbers(str(n), [1]), 1e-9 if n else 1.0) for n in range(500)], seed=0)
    assert many.quotas.tolist() == [BLOCK - 499] + [1] * 499


def test_a_position_is_a_pure_function_of_the_seed_also_in_another_process():
    def make(seed):
        return Mixture([(Numbers("a", [50, 50]), 2), (Numbers("b", [70]), 1)], seed)

    mixture = make(7)
    in_order = [mixture.sample(p).key for p in range(6000)]
    copy = pickle.loads(pickle.dumps(mixture))
    assert [copy.sample(p).key for p in range(5999, -1, -7)] == in_order[5999::-7]
    assert [make(7).sample(p).key for p in (5000, 3, 4100)] == [in_order[p] for p in (5000, 3, 4100)]
    assert [make(8).sample(p).key for p in range(100)] != in_order[:100]


def test_the_order_is_the_same_with_every_version_of_numpy():
    assert permutation(10, 1, 2).tolist() == [7, 1, 3, 0, 4, 8, 9, 2, 6, 5]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(UserError, match="give a number above 0"):
        Mixture([(Numbers("a", [1]), weight)], 0)


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match=r"a has no samples to use \(split test\)"):
        Mixture([(Numbers("a", [3]), 1)], 0, "test")


def test_an_emoji_folder_is_a_data_set_like_others(tmp_path):
    write_packages(tmp_path / "packages")
    folder = tmp_path / "emoji"
    built = run("emoji", "-o", folder, "--packages", tmp_path / "packages", "--size", "96")
    assert built.exit_code == 0, built.stderr
    data = open_data(folder)
    assert data.count("train") + data.count("validation") > 5 * 48
    assert data.count("test") == len(ROWS)
    captions = {caption for _, caption in ROWS}
    keys = set()
    for index in range(data.count("train")):
        key, pictures, turns = data.sample("train", index)[:3] if index < 5 else ("", (b"",), ())
        keys.add(key.rsplit("-", 1)[0])
        if index < 5:
            assert turns[0].answer in captions
            assert turns[0].question is None
            pixels = np.asarray(load_square(pictures[0], 96))
            assert (pixels[0] == 255).all()
            assert (pixels[48, 48] < 255).any()
    assert keys - {""} <= set(TRAIN_VENDORS)
    assert set(data.texts("train")) <= captions
    assert pickle.loads(pickle.dumps(data)).sample("test", 3) == data.sample("test", 3)
