"""What the memory costs: operations timed on this model, and multiplications counted for any configuration.

The counts are `predicted_`: they say how the work grows with the size, not how long it takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from microvlm.bench.memory_scores import Encoded
from microvlm.bench.memory_subject import Subject
from microvlm.bench.phases import clock
from microvlm.bench.stats import median
from microvlm.config import MicroVLMConfig
from microvlm.generation import positions_of, prefill, recall

ANSWER_TOKENS = 50
PROMPT_TOKENS = 16
"""Text tokens that a predicted prompt has beside its picture."""


def latencies(subject: Subject, encoded: Encoded, repeats: int) -> dict[str, float]:
    """Median milliseconds of one row: encode, read, write, forget, prefill, decode_token. Timed in turns.

    A backend that holds a state in buffers of its own (`hold_memory`) is timed on it.
    """
    runtime = subject.runtime
    prompt = subject.prompt(encoded.asked[:1])
    state = runtime.memory_prior()
    key, code, value = encoded.keys[:1], encoded.codes[:1], encoded.values[:1]
    held = runtime.hold_memory(state) if hasattr(runtime, "hold_memory") else None
    off = recall(runtime, prompt, None)
    mask = np.concatenate([off.slot_mask[:, None], prompt.attention_mask, np.ones((1, 1), np.int64)], 1)
    position = positions_of(prompt.attention_mask)[:, -1:] + 1
    _, past = prefill(runtime, prompt, off)
    token = np.full((1, 1), subject.processor.eos_id, np.int64)
    actions = {
        "encode": lambda: runtime.memory_encode(*prompt),
        "read": lambda: held.read(key, code) if held else runtime.memory_read(key, code, state),
        "write": lambda: held.write(key, value) if held else runtime.memory_write(key, value, state),
        "forget": lambda: held.forget(key, value) if held else runtime.memory_forget(key, value, state),
        "prefill": lambda: prefill(runtime, prompt, off),
        "decode_token": lambda: runtime.decode(runtime.embed_tokens(token), mask, position, past),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            times[name].append(clock(action))
    # The first round opens graphs.
    return {name: round(median(values[1:]), 4) for name, values in times.items()}


def measured_shares(latency_ms: dict[str, float]) -> dict[str, float]:
    """Reading and writing against an answer of 50 tokens, and encoding against the prefill, as times."""
    answer = ANSWER_TOKENS * latency_ms["decode_token"]
    return {
        "read_write_share_of_answer": (latency_ms["read"] + latency_ms["write"]) / answer,
        "encode_share_of_prefill": latency_ms["encode"] / latency_ms["prefill"],
    }


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
    # w M and U w', then two outer products; the reading also passes the scope detector and W_M.
    written = 2 * memory.slots * (memory.code_size + memory.slots)
    read = memory.slots * memory.code_size + memory.code_size * (config.memory_kv_outputs + 2 * 64)
    return {
        "name": config.name,
        "slots": memory.slots,
        "code_size": memory.code_size,
        "predicted_encode_macs": encoded,
        "predicted_prefill_macs": prefilled,
        "predicted_read_macs": read,
        "predicted_write_macs": written,
        "predicted_token_macs": token,
        "predicted_read_write_share_of_answer": (read + written) / (ANSWER_TOKENS * token),
        "predicted_encode_share_of_prefill": encoded / prefilled,
    }
