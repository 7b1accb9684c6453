"""The decode loop: batches, sampling, stopping, memory, and its pieces, on a small model with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from microvlm.errors import UserError
from microvlm.generation import (
    Chooser,
    GenerationOptions,
    Prompt,
    embed_prompt,
    generate,
    log_probability,
    nucleus,
    prefill,
    read_slot,
    teacher_force,
)
from microvlm.model.torch_runtime import TorchRuntime
from microvlm.runtime import MemoryArrays

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8) for _ in range(3)]
PROMPTS = ["describe the image", "what?", "tell me a longer story about this heart"]
ROWS = [[PICTURES[0]], [PICTURES[1], PICTURES[2]], []]


@pytest.fixture(scope="module")
def runtime(ternary_model) -> TorchRuntime:
    return TorchRuntime(ternary_model)


def ready(runtime, processor, prompts=PROMPTS, rows=ROWS) -> Prompt:
    return embed_prompt(runtime, *processor(prompts, rows), processor.image_id)


def memory_with_a_fact(runtime, prompt: Prompt) -> MemoryArrays:
    """A memory that holds the first row's latent."""
    latent, key = runtime.memory_encode(*prompt)
    return runtime.memory_write(key[:1], latent[:1], runtime.memory_prior())


@pytest.mark.parametrize(
    "choice", [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 1.5, "top_p": 0.7, "seed": 2}]
)
def test_a_batch_gives_each_row_the_tokens_it_gets_alone(choice, runtime, tiny_processor):
    options = GenerationOptions(max_new_tokens=8, **choice)
    together = generate(runtime, ready(runtime, tiny_processor), options).tokens
    for prompt, row, tokens in zip(PROMPTS, ROWS, together, strict=True):
        assert generate(runtime, ready(runtime, tiny_processor, [prompt], [row]), options).tokens == [tokens]


def test_two_samplings_with_one_seed_agree_and_with_another_differ(runtime, tiny_processor):
    prompt = ready(runtime, tiny_processor)

    def sample(seed):
        return generate(
            runtime, prompt, GenerationOptions(max_new_tokens=8, temperature=1.0, seed=seed)
        ).tokens

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_stop_token_ends_its_row_and_is_not_in_the_answer(runtime, tiny_processor):
    prompt = ready(runtime, tiny_processor)
    free = generate(runtime, prompt, GenerationOptions(max_new_tokens=8))
    stop = free.tokens[0][3]
    calls: list[tuple[int, int]] = []
    options = GenerationOptions(max_new_tokens=8, stop_tokens=(stop,))
    result = generate(runtime, prompt, options, on_token=lambda row, token: calls.append((row, token)))
    for row, tokens in enumerate(free.tokens):
        expected = tokens[: tokens.index(stop)] if stop in tokens else tokens
        assert result.tokens[row] == expected
        assert result.stopped[row] == (stop in tokens)
        assert [token for at, token in calls if at == row] == expected


@pytest.mark.parametrize(
    "choice", [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 2.5, "top_p": 0.7, "seed": 2}]
)
def test_log_probabilities_are_log_softmax_of_the_logits_whatever_the_sampling(
    choice, runtime, tiny_processor
):
    prompt = ready(runtime, tiny_processor)
    result = generate(runtime, prompt, GenerationOptions(max_new_tokens=6, **choice))
    logits = teacher_force(runtime, prompt, np.asarray(result.tokens), read_slot(runtime, prompt, None))
    by_torch = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    for row, tokens in enumerate(result.tokens):
        expected = [by_torch[row, step, token].item() for step, token in enumerate(tokens)]
        assert np.allclose(result.log_probabilities[row], expected, rtol=0, atol=1e-5)
        assert result.log_probability(row) == sum(result.log_probabilities[row])


def test_an_answer_has_the_log_probabilities_that_it_has_alone_with_its_stop_token(runtime, tiny_processor):
    prompt = ready(runtime, tiny_processor)
    free = generate(runtime, prompt, GenerationOptions(max_new_tokens=8))
    options = GenerationOptions(max_new_tokens=8, stop_tokens=(free.tokens[0][3],))
    together = generate(runtime, prompt, options)
    assert together.stopped[0]
    assert len(together.log_probabilities[0]) == len(together.tokens[0]) + 1
    assert together.log_probabilities[0] == free.log_probabilities[0][: len(together.tokens[0]) + 1]
    for row, (question, pictures) in enumerate(zip(PROMPTS, ROWS, strict=True)):
        alone = generate(runtime, ready(runtime, tiny_processor, [question], [pictures]), options)
        assert np.allclose(alone.log_probabilities[0], together.log_probabilities[row], rtol=0, atol=1e-5)


def test_the_log_probability_of_a_token_by_hand_also_where_exp_overflows():
    assert log_probability(np.log(np.array([0.25, 0.5, 0.25], np.float32)), 1) == pytest.approx(
        np.log(0.5), abs=1e-7
    )
    assert log_probability(np.array([0, 0], np.float32), 1) == -np.log(2.0)
    assert log_probability(np.array([2000, 0], np.float32), 0) == 0
    assert log_probability(np.array([2000, 0], np.float32), 1) == -2000
    assert log_probability(np.array([-3e38, 0, -3e38], np.float32), 1) == 0


def test_teacher_forcing_gives_the_logits_of_free_running(runtime, tiny_processor):
    prompt = ready(runtime, tiny_processor, ["what?"], [[PICTURES[0]]])
    tokens = generate(runtime, prompt, GenerationOptions(max_new_tokens=6)).tokens
    logits = teacher_force(runtime, prompt, np.asarray(tokens), read_slot(runtime, prompt, None))
    assert logits.shape == (1, 6, 300)
    assert logits.argmax(-1).tolist() == tokens


def test_a_masked_memory_leaves_the_logits_as_they_are_without_one(runtime, tiny_processor):
    prompt = ready(runtime, tiny_processor)
    memory = memory_with_a_fact(runtime, prompt)
    with_memory = read_slot(runtime, prompt, memory)
    masked = with_memory._replace(slot_mask=np.zeros(3, np.int64))
    logits, _ = prefill(runtime, prompt, masked)
    assert np.array_equal(logits, prefill(runtime, prompt, read_slot(runtime, prompt, None))[0])
    open_slot = with_memory._replace(slot_mask=np.ones(3, np.int64))
    assert np.abs(prefill(runtime, prompt, open_slot)[0] - logits).max() > 1e-3


def test_the_scope_threshold_decides_row_by_row(ternary_model, runtime, tiny_processor):
    prompt = ready(runtime, tiny_processor)
    memory = memory_with_a_fact(runtime, prompt)
    reading = read_slot(runtime, prompt, memory).reading
    threshold = float(np.sort(reading.scope)[1])
    config = ternary_model.config
    gated = TorchRuntime(ternary_model)
    gated.config = type(config)(
        **{
            **vars(config),
            "memory": type(config.memory)(**{**vars(config.memory), "scope_threshold": threshold}),
        }
    )
    mask = read_slot(gated, prompt, memory).slot_mask
    assert mask.tolist() == (reading.scope >= threshold).astype(int).tolist()
    assert sorted(mask.tolist()) == [0, 1, 1]


def test_a_memory_for_another_number_of_rows_is_refused(runtime, tiny_processor):
    prompt = ready(runtime, tiny_processor)
    two = MemoryArrays(*(np.repeat(part, 2, 0) for part in runtime.memory_prior()))
    with pytest.raises(UserError, match="2 states for 3 prompts"):
        read_slot(runtime, prompt, two)


def test_an_answer_longer_than_the_positions_is_refused(runtime, tiny_processor):
    with pytest.raises(UserError, match="--max-new-tokens"):
        generate(runtime, ready(runtime, tiny_processor), GenerationOptions(max_new_tokens=250))


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    order, cumulative = nucleus(logits, 1.0, 0.7)
    assert order.tolist() == [1, 3]
    assert np.allclose(cumulative, [0.5, 0.75])
    assert nucleus(logits, 1.0, 0.4)[0].tolist() == [1]
    assert len(nucleus(logits, 1.0, 1.0)[0]) == 4


def test_sampling_follows_the_probabilities():
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    choose = Chooser(GenerationOptions(temperature=1.0, seed=0))
    share = np.bincount([choose(logits) for _ in range(4000)], minlength=3) / 4000
    # Four standard deviations of a share of one half over 4,000 draws.
    assert np.abs(share - [0.1, 0.6, 0.3]).max() < 4 * (0.25 / 4000) ** 0.5


def test_logits_that_are_no_numbers_are_one_sentence():
    with pytest.raises(UserError, match="not numbers"):
        Chooser(GenerationOptions())(np.array([0.0, np.nan], np.float32))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_a_bad_option_is_named_as_its_flag(options, flag):
    with pytest.raises(UserError, match=flag):
        GenerationOptions(**options)


def test_the_public_generate_takes_pictures_prompts_and_memory(ternary_model, tiny_processor):
    from microvlm.model.memory_algebra import MemoryState

    answers = ternary_model.generate(
        images=[PICTURES[0], [PICTURES[1], PICTURES[2]]],
        prompts=["what?", "and?"],
        processor=tiny_processor,
        max_new_tokens=4,
    )
    assert len(answers) == 2
    single_answer = ternary_model.generate(
        images=[PICTURES[0]], prompts=["what?"], processor=tiny_processor, max_new_tokens=4
    )
    assert single_answer == answers[:1]
    state = ternary_model.memory_reset()
    assert isinstance(state, MemoryState)
    assert len(ternary_model.generate(prompts=["what?"], memory=state, processor=tiny_processor)) == 1
    captions = ternary_model.generate(images=[PICTURES[0]], processor=tiny_processor, max_new_tokens=4)
    answers = ternary_model.generate(
        images=[PICTURES[0]], prompts=["describe the image"], processor=tiny_processor, max_new_tokens=4
    )
    assert captions == answers


def test_generate_leaves_the_model_ready_to_train(ternary_model, tiny_processor):
    ternary_model.generate(prompts=["what?"], processor=tiny_processor, max_new_tokens=2)
    assert all(parameter.requires_grad for parameter in ternary_model.parameters())
    assert not torch.is_inference_mode_enabled()
