"""Costs of the memory: operations timed on a model, and multiplications counted for any configuration.

The counts are `predicted_`: they say how the work grows with the size, not how long it takes. A timed prompt is one
picture and 16 random tokens, so that a model needs no tokenizer and no training.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from microvlm.bench.speed.phases import clock
from microvlm.bench.stats import median, ratio_of_medians
from microvlm.config import MicroVLMConfig
from microvlm.generation import Prompt, positions_of, prefill, read_slot
from microvlm.memory.in_place import hold
from microvlm.presets import preset
from microvlm.runtime import Runtime

ANSWER_TOKENS = 50
PROMPT_TOKENS = 16
"""Text tokens that a prompt has beside its picture."""
BAR_READ_WRITE = 0.01
BAR_ENCODE = 0.10


def timings(runtime: Runtime, repeats: int, seed: int = 0) -> dict[str, list[float]]:
    """Milliseconds of one row: encode, read, write, forget, prefill, decode_token; `repeats` of each, in turns.

    A backend that holds a state in buffers of its own is timed on it.
    """
    prompt, value = random_prompt(runtime, seed), random_prompt(runtime, seed + 1)
    latent, key = runtime.memory_encode(*prompt)
    fact, _ = runtime.memory_encode(*value)
    held_memory = hold(runtime, runtime.memory_prior())
    off = read_slot(runtime, prompt, None)
    mask = np.concatenate([off.slot_mask[:, None], prompt.attention_mask, np.ones((1, 1), np.int64)], 1)
    position = positions_of(prompt.attention_mask)[:, -1:] + 1
    _, past = prefill(runtime, prompt, off)
    token = np.zeros((1, 1), np.int64)
    actions = {
        "encode": lambda: runtime.memory_encode(*prompt),
        "prefill": lambda: prefill(runtime, prompt, off),
        "read": lambda: runtime.memory_read(key, latent, held_memory.state),
        "write": lambda: held_memory.write(key, fact),
        "forget": lambda: held_memory.forget(key, fact),
        "decode_token": lambda: runtime.decode(runtime.embed_tokens(token), mask, position, past),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            times[name].append(clock(action))
    # The first round opens graphs.
    return {name: values[1:] for name, values in times.items()}


def random_prompt(runtime: Runtime, seed: int = 0) -> Prompt:
    """One picture of noise and 16 random tokens, embedded."""
    rng = np.random.default_rng(seed)
    config = runtime.config
    side = config.vision.image_size
    picture = runtime.encode_image(rng.normal(size=(1, 3, side, side)).astype(np.float32))
    ids = rng.integers(config.text.vocab_size, size=(1, PROMPT_TOKENS))
    embeds = np.concatenate([picture, runtime.embed_tokens(ids)], 1)
    return Prompt(embeds, np.ones(embeds.shape[:2], np.int64))


def latency_ms(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians."""
    return {name: round(median(values), 4) for name, values in times.items()}


def measured_shares(times: dict[str, list[float]]) -> dict[str, Any]:
    """Reading and writing against an answer of 50 tokens, and encoding against the prefill, as ratios of medians."""
    both = [read + write for read, write in zip(times["read"], times["write"], strict=True)]
    answer = [ANSWER_TOKENS * token for token in times["decode_token"]]
    shares: dict[str, Any] = {}
    for name, part, whole in (
        ("read_write_share_of_answer", both, answer),
        ("encode_share_of_prefill", times["encode"], times["prefill"]),
    ):
        ratio = ratio_of_medians(part, whole)
        shares |= {name: ratio.value, f"{name}_ci95": (ratio.low, ratio.high)}
    return shares


def bars(config: MicroVLMConfig, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars for the costs at full size; `met` is None for any other size."""
    is_full = config.text.hidden_size >= preset("full").text.hidden_size
    return [
        {
            "name": name,
            "at_most": limit,
            "value": measured[name],
            "met": measured[name] <= limit if is_full else None,
        }
        for name, limit in (
            ("read_write_share_of_answer", BAR_READ_WRITE),
            ("encode_share_of_prefill", BAR_ENCODE),
        )
    ]


def predicted(config: MicroVLMConfig) -> dict[str, Any]:
    """Multiplications of each part for a prompt of one picture and 16 text tokens, and the same two shares of them."""
    text, memory = config.text, config.memory
    length = config.prefix_tokens + PROMPT_TOKENS
    attention = text.num_attention_heads * text.head_dim
    layer = text.hidden_size * (2 * attention + 2 * text.kv_width + 3 * text.intermediate_size)
    head = text.hidden_size * text.vocab_size

    def scores(queries: int, keys: int) -> int:
        return 2 * queries * keys * attention

    prefilled = text.num_hidden_layers * (length * layer + scores(length, length)) + head
    encoded = memory.encoder_layers * (length * layer + scores(length, length)) + memory.code_size * (
        text.hidden_size + memory.slots
    )
    token = text.num_hidden_layers * (layer + scores(1, length + ANSWER_TOKENS // 2)) + head
    # w M and U w', then two outer products; the reading also passes the scope detector, the readout and W_M.
    write_macs = 2 * memory.slots * (memory.code_size + memory.slots)
    outputs = config.memory_kv_outputs + 2 * 64 + 2 * memory.readout_size
    read_macs = memory.slots * memory.code_size + memory.code_size * outputs
    return {
        "name": config.name,
        "slots": memory.slots,
        "code_size": memory.code_size,
        "predicted_encode_macs": encoded,
        "predicted_prefill_macs": prefilled,
        "predicted_read_macs": read_macs,
        "predicted_write_macs": write_macs,
        "predicted_token_macs": token,
        "predicted_read_write_share_of_answer": (read_macs + write_macs) / (ANSWER_TOKENS * token),
        "predicted_encode_share_of_prefill": encoded / prefilled,
    }
