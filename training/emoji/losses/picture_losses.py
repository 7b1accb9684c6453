"""Losses on what a picture shows: names of objects in patches, prefix embeddings and attention, and whole pictures."""

from __future__ import annotations

from math import isqrt

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.config import MicroVLMConfig
from microvlm.inputs.processor import Processor
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.emoji.batches.emoji_grids import scene_labels
from microvlm.training.emoji.data.scenes import Question, Scene, read_scene_objects
from microvlm.training.emoji.losses.attention_guidance import ANSWER_LAYER, WORD_LAYER, AttentionTap, Lookups

PATCH_WEIGHT, CLASSIFY_WEIGHT = 1.0, 0.3


def name_tokens(processor: Processor) -> np.ndarray:
    """int64 [objects]: the first token of each scene object's name inside a question ("where is the lion?").

    The name is encoded behind a blank; the processor itself would strip a text's leading blank.
    """
    words = [processor.tokenizer.encode(" " + caption)[0] for _, caption in read_scene_objects()]
    return np.array(words, np.int64)


def object_cells(scenes: list[Scene], config: MicroVLMConfig) -> np.ndarray:
    """int64 [B, cells]: 1 + the scene object under each prefix embedding of the picture's grid, 0 for the ground."""
    grid = isqrt(config.prefix_tokens - config.vision.num_leading_tokens)
    return scene_labels(scenes, np.arange(len(read_scene_objects())), grid)


def prefix_naming_loss(module: MicroVLM, prefixes: Tensor, scenes: list[Scene], tokens: np.ndarray) -> Tensor:
    """Cross-entropy of the tied head on prefix embeddings [B, k, H] over objects, against the objects' name `tokens`.

    A place in the picture then resembles the word for it, so that a question's word can find it.
    """
    under = object_cells(scenes, module.config)
    image, cell = np.nonzero(under)
    names = torch.from_numpy(tokens[under[image, cell] - 1]).to(prefixes.device)
    leading = module.config.vision.num_leading_tokens
    over_objects = prefixes[torch.from_numpy(image), torch.from_numpy(leading + cell)]
    logits = module.embedding.head(over_objects)
    return F.cross_entropy(logits.float(), names)


def question_lookups(
    rows: TextRows,
    scene_questions: list[tuple[Scene, Question]],
    first_row: int,
    tokens: np.ndarray,
    config: MicroVLMConfig,
) -> tuple[Lookups, Lookups]:
    """Attention targets of scene questions whose objects are in the picture; their batch rows start at `first_row`.

    The first: from the word for an object to the prefix embeddings over it. The second, for `where` questions: from the
    position that predicts the answer to that word.
    """
    leading = config.vision.num_leading_tokens
    under = object_cells([scene for scene, _ in scene_questions], config)
    prompts = [rows.prompt_ids(question.text, True) for _, question in scene_questions]
    width = max((len(ids) for ids in prompts), default=0)
    words, answers = [], []
    for index, ((scene, question), ids) in enumerate(zip(scene_questions, prompts, strict=True)):
        for placed in scene.objects:
            word_positions = np.flatnonzero(np.array(ids) == tokens[placed.object])
            cells = np.flatnonzero(under[index] == 1 + placed.object)
            if len(word_positions) and len(cells):
                row, position = first_row + index, int(word_positions[-1])
                words.append((row, position, leading + cells))
                if question.kind == "where":
                    answers.append((row, len(ids) - 1, word_positions[-1:]))
    return Lookups.build(words, width), Lookups.build(answers, width)


def guidance_loss(tap: AttentionTap, word: Lookups, answer: Lookups, device: torch.device) -> Tensor:
    """Sum of the attention losses of both look-ups; 0 where a batch has none."""
    loss = tap.loss(WORD_LAYER, word.to(device)) if len(word) else torch.zeros((), device=device)
    return loss + tap.loss(ANSWER_LAYER, answer.to(device)) if len(answer) else loss


def recognition_loss(
    patch_logits: Tensor, patch_targets: np.ndarray, image_logits: Tensor, image_targets: np.ndarray
) -> Tensor:
    """Weighted cross-entropies of the object under each patch [B, P, 1 + classes] and of the emoji [n, classes].

    Targets are int64 [B, P] and [n]; pictures with an ignored target (-100) do not count.
    """
    device = patch_logits.device
    patches = F.cross_entropy(
        patch_logits.float().flatten(0, 1), torch.from_numpy(patch_targets).to(device).flatten()
    )
    images = F.cross_entropy(
        image_logits.float(), torch.from_numpy(image_targets).to(device), label_smoothing=0.1
    )
    return PATCH_WEIGHT * patches + CLASSIFY_WEIGHT * images
