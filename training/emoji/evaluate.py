"""Scores a model as users run it, on drawings of a vendor that no training uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from microvlm.backends import base as backends
from microvlm.backends.base import LoadedRuntime
from microvlm.bench.provenance import describe_model, provenance
from microvlm.generation import GenerationOptions, embed_prompt, generate
from microvlm.inputs.processor import Processor
from microvlm.memory.conversation import Chat
from microvlm.memory.ordinal_questions import ordinal_question
from microvlm.runtime import Runtime
from microvlm.training.emoji.data.drawing_sources import STRESS_VENDOR, TEST_VENDOR
from microvlm.training.emoji.data.emoji import EmojiData, read_test_emoji
from microvlm.training.emoji.data.scene_drawing import compose_scenes
from microvlm.training.emoji.data.scenes import KINDS, Scene, sample_question
from microvlm.training.emoji.data.views import plain_emoji, to_uint8

BATCH = 64
BOOTSTRAPS = 10_000
EPISODE_LENGTHS = (2, 4, 8)
Log = Callable[[str], None]


def answer(
    runtime: Runtime, processor: Processor, prompts: Sequence[str], images: Sequence[np.ndarray]
) -> list[str]:
    """Greedy answers, one prompt for each image, uint8 [H, W, 3]."""
    options = GenerationOptions(max_new_tokens=24, stop_tokens=processor.stop_tokens)
    answers = []
    for start in range(0, len(prompts), BATCH):
        inputs = processor(prompts[start : start + BATCH], [[i] for i in images[start : start + BATCH]])
        prompt = embed_prompt(runtime, *inputs, processor.image_id)
        answers += [processor.decode(tokens) for tokens in generate(runtime, prompt, options).tokens]
    return answers


def caption_rows(emoji: EmojiData, vendor: str) -> tuple[list[str], list[np.ndarray]]:
    """Captions and plain views, uint8 [S, S, 3], of every test emoji that `vendor` draws."""
    present = emoji.present(vendor)
    rows = [row for row in (emoji.index(code) for code, _ in read_test_emoji()) if present[row]]
    views = plain_emoji(torch.from_numpy(np.array(emoji.images(vendor)[rows])))
    return [emoji.captions[row] for row in rows], list(to_uint8(views))


def score_model(source: str | Path, emoji: EmojiData, backend: str, log: Log) -> dict[str, Any]:
    """All scores of one model on one backend: `captions`, `captions_stress`, `scenes`, `episodes`; and `provenance`."""
    runtime = backends.load(backend, source)
    processor = Processor.from_pretrained(runtime.directory)
    log(f"scoring {source} on {backend}: captions")
    captions = score_captions(runtime, processor, emoji)
    stress = score_captions(runtime, processor, emoji, STRESS_VENDOR)
    log("scene questions")
    scenes = score_scenes(runtime, processor, emoji)
    log("episodes")
    episodes = score_episodes(runtime, processor, emoji)
    return {
        "captions": captions,
        "captions_stress": stress,
        "scenes": scenes,
        "episodes": episodes,
        "provenance": provenance(describe_model(runtime.directory), None),
    }


def score_captions(
    runtime: Runtime, processor: Processor, emoji: EmojiData, vendor: str = TEST_VENDOR
) -> dict[str, Any]:
    """Caption scores: `exact_match`, `count`, and `correct` (0 or 1 for each emoji, for paired comparisons)."""
    captions, views = caption_rows(emoji, vendor)
    prompts = [runtime.config.prompt.caption_prompt] * len(captions)
    answers = answer(runtime, processor, prompts, views)
    correct = [int(a == b) for a, b in zip(answers, captions, strict=True)]
    return {"exact_match": float(np.mean(correct)), "count": len(correct), "correct": correct}


def score_scenes(
    runtime: Runtime,
    processor: Processor,
    emoji: EmojiData,
    per_kind: int = 400,
    vendor: str = TEST_VENDOR,
    seed: int = 1,
) -> dict[str, dict[str, float]]:
    """Scores by kind of scene question: `accuracy`, `majority` (the commonest answer's share), `count` and `twins`, the
    share of scenes answered rightly both as they are and with their two objects swapped.

    Scenes contain only pairs of objects that training never composes.
    """
    result: dict[str, dict[str, float]] = {}
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng([seed, number])
        sampled = [sample_question(rng, kind, test=True, direct=True) for _ in range(per_kind)]
        scenes, questions = [scene for scene, _ in sampled], [question for _, question in sampled]
        right = _ask(runtime, processor, emoji, vendor, scenes, questions)
        counts = Counter(question.answer for question in questions)
        result[kind] = {
            "accuracy": float(right.mean()),
            "majority": counts.most_common(1)[0][1] / per_kind,
            "count": per_kind,
        }
        if kind in ("what", "where"):
            twins = [_twin(scene, kind, question.text) for scene, question in sampled]
            both = right & _ask(runtime, processor, emoji, vendor, [s.swapped() for s in scenes], twins)
            result[kind]["twins"] = float(both.mean())
    return result


def score_episodes(
    runtime: LoadedRuntime, processor: Processor, emoji: EmojiData, count: int = 60, seed: int = 2
) -> dict[str, dict[str, float]]:
    """Scores by episode length: images are captioned and written one after another, then each is asked for by place.

    `accuracy` compares with the true caption, `consistent` with the model's own caption of the image; `memory_off` is
    the accuracy of the same questions with an empty memory.
    """
    captions, views = caption_rows(emoji, TEST_VENDOR)
    rng = np.random.default_rng(seed)
    result = {}
    for length in EPISODE_LENGTHS:
        right, same, blind, total = 0, 0, 0, 0
        for _ in range(max(1, count // length)):
            rows = rng.permutation(len(captions))[:length]
            chat = Chat(runtime, processor)
            own_captions = [
                chat.ask(runtime.config.prompt.caption_prompt, views[row], new_image=True).answer
                for row in rows
            ]
            for step, row in enumerate(rows):
                reply = chat.ask(ordinal_question(step)).answer
                right += reply == captions[row]
                same += reply == own_captions[step]
                blind += Chat(runtime, processor).ask(ordinal_question(step)).answer == captions[row]
                total += 1
        result[str(length)] = {
            "accuracy": right / total,
            "consistent": same / total,
            "memory_off": blind / total,
            "count": total,
        }
    return result


def _twin(scene: Scene, kind: str, text: str) -> Any:
    """The same question about the swapped scene."""
    return next(question for question in scene.swapped().questions(kind) if question.text == text)


def _ask(
    runtime: Runtime,
    processor: Processor,
    emoji: EmojiData,
    vendor: str,
    scenes: list[Scene],
    questions: list[Any],
) -> np.ndarray:
    """bool [n]: which questions about which scenes are answered rightly."""
    pixels = list(to_uint8(compose_scenes(scenes, emoji, [vendor] * len(scenes))))
    answers = answer(runtime, processor, [question.text for question in questions], pixels)
    return np.array([a == question.answer for a, question in zip(answers, questions, strict=True)])


def paired_difference(a: Sequence[int], b: Sequence[int], seed: int = 0) -> dict[str, float]:
    """Mean of a - b over the same items, with its 95 % confidence interval by a paired bootstrap."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(difference), (BOOTSTRAPS, len(difference)))
    means = difference[draws].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"difference": float(difference.mean()), "ci95_low": float(low), "ci95_high": float(high)}
