"""Write what onnxruntime-genai and optimum's ORTModelForCausalLM need to run a bundle's decoder, and check it.

| file | for |
|---|---|
| `onnx/model.onnx` | text: the decoder under the name that optimum looks for |
| `onnx/decoder_genai.onnx` | text behind pictures and a memory slot, and a prompt's latent, for onnxruntime-genai |
| `genai_config.json` | onnxruntime-genai, with the first of the two |
| `onnx/config.json`, `onnx/generation_config.json` | optimum |

The graphs refer to the weights of the bundle's own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto

from microvlm.config import CONFIG, MicroVLMConfig
from microvlm.exporters.contract import kv_names
from microvlm.exporters.elsewhere.text_decoder import DECODE, EMBED, ENCODE, text_decoder
from microvlm.exporters.graph_check import Check, compare_output, session_options
from microvlm.generation import place_images, positions_of
from microvlm.inputs.processor import Processor
from microvlm.inputs.processor_files import GENERATION

GENAI_CONFIG = "genai_config.json"
TEXT, PREFIXED = "model", "decoder_genai"
GRAPHS = (EMBED, DECODE, ENCODE)
"""The graphs that the decoders are made from."""


def write_genai_files(folder: Path, graphs: Mapping[str, ModelProto], threads: int) -> list[Check]:
    """Write the files into a bundle that has graphs, configuration and tokenizer -> comparisons with its own graphs.

    graphs : the saved ones of `GRAPHS`.
    """
    processor = Processor.from_pretrained(folder)
    config, image_id = processor.config, processor.image_id
    for name in (TEXT, PREFIXED):
        decoder = text_decoder(config, image_id, graphs, text_only=name == TEXT)
        (folder / "onnx" / f"{name}.onnx").write_bytes(decoder.SerializeToString())
    _write(folder / GENAI_CONFIG, _genai_config(processor))
    _write(folder / "onnx" / CONFIG, _decoder_config(processor))
    generation = {**_token_ids(processor), "do_sample": False, "max_new_tokens": processor.max_new_tokens}
    _write(folder / "onnx" / GENERATION, generation)
    return _check(folder / "onnx", config, image_id, threads)


def _token_ids(processor: Processor) -> dict[str, Any]:
    # No model here begins a text with a token of its own, and genai requires the key.
    return {
        "bos_token_id": processor.eos_id,
        "eos_token_id": list(processor.stop_tokens),
        "pad_token_id": processor.pad_id,
    }


def _positions(config: MicroVLMConfig) -> int:
    """Positions of text: the memory slot has one."""
    return config.text.max_position_embeddings - 1


def _genai_config(processor: Processor) -> dict[str, Any]:
    config = processor.config
    text, positions = config.text, _positions(config)
    cache = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"onnx/{TEXT}.onnx",
        "head_size": text.head_dim,
        "hidden_size": text.hidden_size,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "inputs": {**{name: name for name in ("input_ids", "attention_mask", "position_ids")}, **cache},
        "outputs": {"logits": "logits", **present},
    }
    model = {
        "type": "qwen2",
        "context_length": positions,
        "vocab_size": text.vocab_size,
        **_token_ids(processor),
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": positions, "num_beams": 1, "past_present_share_buffer": False}
    return {"model": model, "search": search}


def _decoder_config(processor: Processor) -> dict[str, Any]:
    """The decoder in transformers' words. SubLN has no word there, and only the graph computes it."""
    text = processor.config.text
    family = "qwen2" if text.attention_bias else "llama"
    return {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "max_position_embeddings": _positions(processor.config),
        "tie_word_embeddings": True,
        **_token_ids(processor),
    }


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


def _check(folder: Path, config: MicroVLMConfig, image_id: int, threads: int) -> list[Check]:
    """Run both decoders and the bundle's graphs on two prompts, of which the second is padded, and on a next token."""
    text, k = config.text, config.prefix_tokens
    random = np.random.default_rng(0)
    ids = random.integers(0, text.vocab_size, (2, k + 4))
    ids[ids == image_id] = 0 if image_id else 1
    with_image = ids.copy()
    with_image[0, 1 : k + 1] = image_id
    mask = np.ones_like(ids)
    mask[1, :2] = 0
    features = random.standard_normal((1, k, text.hidden_size), np.float32)
    shape = (2, text.num_key_value_heads, 1, text.head_dim)
    names = kv_names("memory_kv", text.num_hidden_layers)
    slot = [random.standard_normal(shape, np.float32) for _ in names]
    run = _runner(folder, threads)
    embeds = run(EMBED, {"input_ids": ids})["inputs_embeds"]
    checks = _compare_steps(run, TEXT, (ids, embeds, mask), {}, ([np.zeros_like(each) for each in slot], 0))
    marked = run(EMBED, {"input_ids": with_image})["inputs_embeds"]
    prefixed = place_images(marked, with_image, image_id, features)
    inputs: dict[str, np.ndarray] = {
        "image_features": features,
        "memory_visible": np.ones((2, 1), np.int64),
        "encode_memory": np.ones(1, np.int64),
        **dict(zip(names, slot, strict=True)),
    }
    checks += _compare_steps(run, PREFIXED, (with_image, prefixed, mask), inputs, (slot, 1))
    return checks


_Run = Callable[[str, dict[str, Any]], dict[str, np.ndarray]]


def _runner(folder: Path, threads: int) -> _Run:
    """(graph, inputs by name) -> its outputs by name. Sessions are opened when they are first used."""

    @functools.cache
    def session(graph: str) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(folder / f"{graph}.onnx"), session_options(threads))

    def run(graph: str, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
        names = [output.name for output in session(graph).get_outputs()]
        return dict(zip(names, session(graph).run(names, feeds), strict=True))

    return run


def _compare_steps(
    run: _Run,
    decoder: str,
    prompt: tuple[np.ndarray, np.ndarray, np.ndarray],
    inputs: dict[str, np.ndarray],
    slot: tuple[list[np.ndarray], int],
) -> list[Check]:
    """Compare a decoder with the bundle's graphs on a prompt (ids, embeddings, mask) and one further token.

    `inputs`: the decoder's beside ids, mask, positions and cache; `slot`: keys and values, and whether they are seen.
    """
    ids, embeds, mask = prompt
    layers = len(slot[0]) // 2
    past, present = kv_names("past_key_values", layers), kv_names("present", layers)
    own = dict(zip(past, slot[0], strict=True))
    cache = {name: value[:, :, :0] for name, value in own.items()}
    checks = []
    for first, last in ((0, ids.shape[1]), (ids.shape[1], ids.shape[1] + 1)):
        # The further token is the prompt's last once more.
        new_ids, new_embeds = (ids, embeds) if first == 0 else (ids[:, -1:], embeds[:, -1:])
        seen = np.pad(mask, ((0, 0), (0, last - mask.shape[1])), constant_values=1)
        positions = positions_of(seen)[:, first:]
        found = run(
            decoder,
            {"input_ids": new_ids, "attention_mask": seen, "position_ids": positions - 1, **cache, **inputs},
        )
        expected = run(
            DECODE,
            {
                "inputs_embeds": new_embeds,
                "attention_mask": np.pad(seen, ((0, 0), (1, 0)), constant_values=slot[1]),
                "position_ids": positions,
                "num_logits_to_keep": np.array(last - first if decoder == TEXT else 1),
                **own,
            },
        )
        checks.append(compare_output(decoder, "logits", found["logits"], expected["logits"]))
        if decoder == PREFIXED and first == 0:
            latent = run(ENCODE, {"inputs_embeds": embeds, "attention_mask": mask})
            checks += [compare_output(decoder, name, found[name], value) for name, value in latent.items()]
        cache = {name: found[new] for name, new in zip(past, present, strict=True)}
        own = {name: expected[new] for name, new in zip(past, present, strict=True)}
    return checks
