"""The statistics of attention and of codes: nulls at their nominal rate, collapsed codes, drift, and plain measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from microvlm.bench.attention.attention_measures import (
    divergence,
    effective_rank,
    mean_length,
    prefix_measures,
)
from microvlm.bench.attention.epps_pulley import (
    epps_pulley,
    holm,
    isotropy,
    one_slice_null,
    swap_test,
)
from microvlm.training.stages.caption_statistics import (
    attention_divergence,
    attention_metrics,
    drift_p_value,
    isotropy_metrics,
    mean_by_picture,
)
from microvlm.training.watching import names

DRAWS = 1000


def rejects_at(level: float, p_values: np.ndarray) -> bool:
    """Whether the share of p-values at or below a level is in the 99.9 % interval of a binomial."""
    rejected = int((p_values <= level).sum())
    return abs(rejected - level * DRAWS) <= 3.29 * (DRAWS * level * (1 - level)) ** 0.5


def test_one_slice_has_the_mean_and_the_quantiles_of_its_null():
    null = one_slice_null()
    assert (round(null.mean, 2), round(null.quantile_95, 1), round(null.quantile_99, 1)) == (1.05, 2.9, 4.6)
    generator = np.random.default_rng(1)
    for samples in (10, 60, 400):
        statistics = epps_pulley(generator.standard_normal((samples, 10 * DRAWS)))
        assert statistics.mean() == pytest.approx(null.mean, abs=4 * statistics.std() / 100)
        assert rejects_at(0.05, np.where(statistics[:DRAWS] > null.quantile_95, 0.0, 1.0))
        assert rejects_at(0.01, np.where(statistics[:DRAWS] > null.quantile_99, 0.0, 1.0))


def test_the_statistic_is_the_integral_that_it_names():
    x = np.random.default_rng(2).standard_normal(50)
    t = np.linspace(-3, 3, 20_001)
    gap = np.abs(np.exp(1j * np.outer(t, x)).mean(1) - np.exp(-(t**2) / 2)) ** 2
    integral = (gap * np.exp(-(t**2) / 2)).sum() * (t[1] - t[0])
    assert epps_pulley(x[:, None])[0] == pytest.approx(50 * integral, rel=0.01)


@pytest.mark.parametrize(("samples", "width"), [(32, 48), (60, 8)])
def test_isotropy_rejects_at_its_nominal_rate_under_its_null(samples, width):
    generator = np.random.default_rng(3)
    p_values = np.array(
        [
            isotropy(generator.standard_normal((samples, width)), slices=64, draws=9999).p_value
            for _ in range(DRAWS)
        ]
    )
    assert rejects_at(0.05, p_values)
    assert rejects_at(0.5, p_values)
    assert rejects_at(0.95, p_values)


def test_isotropy_finds_collapsed_codes_of_each_kind():
    generator = np.random.default_rng(4)
    spread = generator.standard_normal((60, 192))
    one_direction = spread + 3 * generator.standard_normal(192)
    few_dimensions = generator.standard_normal((60, 16)) @ generator.standard_normal((16, 192))
    clusters = spread[np.arange(60) // 4] + 0.1 * generator.standard_normal((60, 192))
    assert isotropy(spread).p_value > 0.05
    for codes in (one_direction, few_dimensions, clusters):
        test = isotropy(codes)
        assert test.p_value == 0.001
        assert test.p_interval[1] < 0.005
        assert test.statistic > test.null_99
    # The quantiles of one slice would call the second one spread evenly.
    assert isotropy(few_dimensions).statistic < one_slice_null().quantile_95


def test_isotropy_looks_at_directions_alone_and_repeats():
    rows = np.random.default_rng(5).standard_normal((20, 16))
    scaled = rows * np.linspace(0.1, 50, 20)[:, None]
    assert isotropy(rows) == isotropy(rows)
    assert isotropy(scaled).statistic == pytest.approx(isotropy(rows).statistic, rel=1e-4)
    assert isotropy(rows, seed=1) != isotropy(rows)
    assert isotropy(np.zeros((20, 16))).p_value == 0.001


@pytest.mark.parametrize("rows", [np.ones((1, 4)), np.ones(4), np.full((4, 4), np.nan)])
def test_isotropy_refuses_what_it_cannot_judge(rows):
    with pytest.raises(ValueError, match="finite features"):
        isotropy(rows)


def test_the_swap_test_rejects_at_its_nominal_rate_when_the_pairs_can_be_swapped():
    generator = np.random.default_rng(6)
    p_values = np.empty(DRAWS)
    for draw in range(DRAWS):
        picture = generator.standard_normal((20, 1)) * generator.standard_normal(12)
        first, second = (picture + generator.standard_t(3, (20, 12)) for _ in range(2))
        p_values[draw] = swap_test([(first, second)], slices=32, swaps=199)[0].p_value
    assert rejects_at(0.05, p_values)
    assert rejects_at(0.5, p_values)
    assert rejects_at(0.95, p_values)


def test_the_swap_test_finds_a_shift_that_is_small_beside_the_pictures_and_says_where():
    generator = np.random.default_rng(7)
    first = generator.standard_normal((40, 10))
    second = first + 0.1 + 0.05 * generator.standard_normal((40, 10))
    mixed = np.where(generator.random((40, 1)) < 0.5, first, second)
    other = first + second - mixed
    test, (shifted, swapped, equal) = swap_test([(first, second), (mixed, other), (first, first)])
    assert test.p_value == shifted.p_value == 1e-4
    assert swapped.p_value > 0.05
    assert (equal.statistic, equal.p_value) == (0.0, 1.0)
    assert shifted.statistic > 5 * shifted.null_mean
    assert shifted.p_interval[0] <= shifted.p_value <= shifted.p_interval[1]


def test_rounding_is_no_drift():
    first = np.random.default_rng(8).random((10, 6), np.float32)
    test, _ = swap_test([(first, first + 1e-7)])
    assert (test.statistic, test.p_value) == (0.0, 1.0)


def test_the_swap_test_refuses_too_few_pairs_other_shapes_and_nan():
    rows = np.ones((6, 2))
    for pair in ((rows[:5], rows[:5]), (rows, rows[:, :1]), (rows, rows * np.nan)):
        with pytest.raises(ValueError, match=r"expected|finite"):
            swap_test([pair])


def test_holms_p_values_hold_together():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_measures_of_even_and_of_sharp_attention():
    even, sharp = prefix_measures(np.full(10, 0.05)), prefix_measures(np.eye(10)[0] * 0.8)
    assert [float(value) for value in even] == pytest.approx([0.5, 0.05, np.log(10), 0.0])
    assert [float(value) for value in sharp] == pytest.approx([0.8, 0.8, 0.0, 0.9], abs=1e-9)
    assert prefix_measures(np.ones((2, 3, 4))).entropy.shape == (2, 3)
    assert float(prefix_measures(np.zeros(4)).entropy) == 0.0


def test_divergence_is_zero_for_equal_attention_and_ln_2_for_disjoint_attention():
    left, right = np.array([0.2, 0.1, 0, 0]), np.array([0, 0, 0.5, 0.5])
    assert divergence(left, 3 * left) == pytest.approx(0, abs=1e-9)
    assert divergence(left, right) == pytest.approx(np.log(2))


def test_mean_length_and_effective_rank_tell_how_codes_collapsed():
    axes = np.eye(8)
    assert mean_length(np.ones((5, 8))) == pytest.approx(1)
    assert effective_rank(np.ones((5, 8))) == pytest.approx(1)
    assert mean_length(np.concatenate([axes, -axes])) == pytest.approx(0)
    assert effective_rank(axes) == pytest.approx(8)


def test_an_evaluation_of_training_logs_the_same_statistics_of_its_held_out_pictures():
    generator = torch.Generator().manual_seed(9)
    weights = [torch.rand(3 + number % 2, 5, generator=generator) / 5 for number in range(16)]
    before, rows = mean_by_picture(weights), torch.cat(weights)
    assert before.shape == (16, 5)
    assert torch.equal(before[1], weights[1].mean(0))
    assert drift_p_value(before, before) == 1.0
    assert drift_p_value(before, before + 0.05) < 0.01
    assert drift_p_value(before[:5], before[:5] + 0.05) is None
    assert drift_p_value(before, before * torch.nan) is None
    assert attention_divergence(rows, rows) == pytest.approx(0, abs=1e-9)
    assert set(attention_metrics(rows)) == {
        names.ATTENTION_MEAN,
        names.ATTENTION_MAX,
        names.ATTENTION_ENTROPY,
        names.ATTENTION_SPARSITY,
    }
    collapsed = torch.ones(16, 8)
    assert isotropy_metrics({names.LEJEPA_IMAGE: collapsed})[names.LEJEPA_IMAGE_P] == 1 / 200
    assert isotropy_metrics({"a": collapsed[:1], "b": collapsed * torch.nan}) == {}
