"""Stage `scope`: the scope detector alone, on memories of every size that are made of codes computed once.

The encoder no longer changes, so that a step costs no picture and no decoder: thousands of memories are drawn from a
bank of codes of facts. The objects are ones that no other stage has facts about: keys of new objects are less alike
over views than keys of trained ones, and new objects are what the detector will meet.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question
from microvlm.model.memory_algebra import MemoryState, batch_solution
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_ops import full_precision
from microvlm.model.vision import normalise
from microvlm.training.batches.drawing_sampler import DrawingSampler
from microvlm.training.batches.fact_batches import FactDealer
from microvlm.training.batches.sample_texts import CAPTION_PROMPTS, TextRows
from microvlm.training.data.drawings import load_drawings
from microvlm.training.data.emoji import EmojiData
from microvlm.training.data.memoryset import choose_objects
from microvlm.training.data.scene_drawing import compose_scenes
from microvlm.training.data.scenes import KINDS, sample_question
from microvlm.training.losses.fact_loss import binary_loss, encode, encode_facts
from microvlm.training.recipe import Recipe, StageConfig

CHUNK = 64
"""Facts that are drawn and encoded together: runs of like objects and pairs of questions stay side by side."""
MEMORIES = 24
"""Drawn in a step."""
SIZES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
"""Facts in a memory, as shares of its slots."""
EPISODE_SHARE = 0.15
ASKED = 24
"""Most questions of a kind that a memory is asked."""
STRENGTH = 0.8
NEAREST = 8


class Bank(NamedTuple):
    """Codes [n, C] and keys [n, K], float32, in chunks of `CHUNK` facts; computed once."""

    key: Tensor
    value: Tensor
    query: Tensor
    asked: Tensor
    name: Tensor
    """int64 [n]: facts with equal names have the same object and relation."""
    nearest: Tensor
    """int64 [n, NEAREST]: the facts of other names whose questions' codes are most alike."""
    picture: Tensor
    """[p, C]: what an episode writes for a picture, its caption."""
    ordinal: tuple[Tensor, Tensor]
    """Codes and keys of the questions for the first, the second ... picture."""
    stranger: tuple[Tensor, Tensor]
    """Codes and keys of questions that no memory answers: captions and scenes."""


class ScopeTask:
    """Binary cross-entropy of the scope detector: what was written against what was not, both sides alike."""

    def __init__(self, model: MicroVLM, rows: TextRows, recipe: Recipe, stage: StageConfig, emoji: EmojiData):
        self.model, self.rows, self.stage, self.emoji = model, rows, stage, emoji
        self.module = model
        sampler = DrawingSampler(emoji, recipe.vendor_weights, seen_share=1.0)
        share, drawings = stage.drawing_share, None
        if share:
            others = load_drawings(emoji.folder)
            drawings = others.pixels[others.reserved]
        reserved = reserved_objects(emoji, sampler)
        self.dealer = FactDealer(emoji, sampler, CHUNK, STRENGTH, reserved, drawings, share)
        self.seed = recipe.seed
        self.bank: Bank | None = None
        model.requires_grad_(False)
        model.scope.requires_grad_(True)

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.model.scope.parameters()), "lr": self.stage.learning_rate}]

    def draw(self, generator: torch.Generator) -> int:
        return int(torch.randint(2**31, (1,), generator=generator))

    def loss(self, module: MicroVLM, drawn: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self.bank is None:
            self.bank = self.encode(module, round(self.stage.batch_size))
        rng = np.random.default_rng(drawn)
        known: list[Tensor] = []
        unknown: list[Tensor] = []
        slots = self.model.config.memory.slots
        count = max(1, round(slots * float(rng.choice(SIZES))))
        with full_precision(module.memory_prior.device.type):
            for _ in range(MEMORIES):
                draw = self._episode if rng.random() < EPISODE_SHARE else self._facts
                state, right, wrong = draw(rng, count)
                for found, (code, key) in ((known, right), (unknown, wrong)):
                    shared = (part.expand(len(code), -1, -1) for part in state)
                    found.append(module.memory_read(key, code, *shared)[1])
        written, other = torch.cat(known), torch.cat(unknown)
        loss = 0.5 * (binary_loss(written, 1.0) + binary_loss(other, 0.0))
        opened, closed = (written >= 0.5).float().mean(), (other < 0.5).float().mean()
        return loss, {"opened": opened, "closed": closed}

    def _facts(self, rng: np.random.Generator, count: int) -> tuple[MemoryState, tuple, tuple]:
        """A memory of `count` facts, out of twice as many drawn side by side in the bank or anywhere.

        Asked are also questions that resemble written ones: about objects that look alike, and other questions about
        the same object.
        """
        assert self.bank is not None
        total = len(self.bank.key)
        start = int(rng.integers(total))
        drawn = (start + np.arange(2 * count)) % total if rng.random() < 0.5 else rng.permutation(total)
        drawn = torch.from_numpy(rng.permutation(drawn[: 2 * count].copy()))
        written, others = drawn[:count], drawn[count:]
        others = others[~torch.isin(self.bank.name[others], self.bank.name[written])][:ASKED]
        state = self._state(self.bank.key[written], self.bank.value[written])
        asked = written[:ASKED]
        right = self.bank.query[asked], self.bank.asked[asked]
        near = self.bank.nearest[asked, torch.from_numpy(rng.integers(NEAREST, size=len(asked)))]
        others = torch.cat([others, near[~torch.isin(self.bank.name[near], self.bank.name[written])]])
        return state, right, self._with_strangers(rng, self.bank.query[others], self.bank.asked[others])

    def _episode(self, rng: np.random.Generator, count: int) -> tuple[MemoryState, tuple, tuple]:
        """A memory of pictures in their order; asked for by place, some places beyond the last."""
        assert self.bank is not None
        length = min(count, len(ORDINALS) - 1)
        codes, keys = self.bank.ordinal
        pictures = torch.from_numpy(rng.integers(len(self.bank.picture), size=length))
        state = self._state(keys[:length], self.bank.picture[pictures])
        return (
            state,
            (codes[:length], keys[:length]),
            self._with_strangers(rng, codes[length:], keys[length:]),
        )

    def _with_strangers(self, rng: np.random.Generator, code: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        assert self.bank is not None
        codes, keys = self.bank.stranger
        some = torch.from_numpy(rng.integers(len(codes), size=max(1, len(code) // 4)))
        return torch.cat([code, codes[some]]), torch.cat([key, keys[some]])

    def _state(self, keys: Tensor, values: Tensor) -> MemoryState:
        variance = self.model.config.memory.observation_variance
        return batch_solution(self.model.memory_prior.float(), keys, values, variance)

    @torch.no_grad()
    def encode(self, module: MicroVLM, chunks: int) -> Bank:
        """`chunks` draws of facts as a bank."""
        generator = torch.Generator().manual_seed(self.seed)
        rng = np.random.default_rng(self.seed)
        facts, names, pictures, strangers = [], [], [], []
        device = module.memory_prior.device
        with full_precision(device.type):
            ordinals = encode(
                module, self.rows, [(ordinal_question(n), "") for n in range(len(ORDINALS))], None
            )
            for _ in range(chunks):
                batch = self.dealer.deal(rng, generator)
                prefixes = module.encode_image(normalise(batch.views, self.model.config.vision).to(device))
                facts.append(encode_facts(module, batch, prefixes, self.rows))
                names += [fact.object * 100 + fact.relation for fact in batch.facts]
                asked = prefixes[len(batch.shown) :]
                prompts = [(CAPTION_PROMPTS[n % len(CAPTION_PROMPTS)], "") for n in range(len(asked))]
                strangers.append(encode(module, self.rows, prompts, asked))
                captions = self.emoji.captions
                named = [n for n, fact in enumerate(batch.shown) if fact.object < len(captions)]
                told = [(CAPTION_PROMPTS[0], captions[batch.shown[n].object]) for n in named]
                pictures.append(encode(module, self.rows, told, asked[named])[0])
                strangers.append(self._scenes(module, rng, generator, len(asked) // 2))
        key, value, _, query, asked_key = (torch.cat(part) for part in zip(*facts, strict=True))
        codes, keys = (torch.cat(part) for part in zip(*strangers, strict=True))
        name = torch.tensor(names, device=device)
        near = nearest_of_other_names(query, name)
        return Bank(key, value, query, asked_key, name, near, torch.cat(pictures), ordinals, (codes, keys))

    def _scenes(
        self, module: MicroVLM, rng: np.random.Generator, generator: torch.Generator, count: int
    ) -> tuple[Tensor, Tensor]:
        asked = [sample_question(rng, str(rng.choice(KINDS))) for _ in range(count)]
        scenes = compose_scenes([s for s, _ in asked], self.emoji, generator=generator, strength=1.0)
        prefixes = module.encode_image(
            normalise(scenes, self.model.config.vision).to(module.memory_prior.device)
        )
        return encode(module, self.rows, [(question.text, "") for _, question in asked], prefixes)


def nearest_of_other_names(codes: Tensor, names: Tensor, count: int = NEAREST) -> Tensor:
    """Unit codes [n, C] and names [n] -> int64 [n, count], rows of other names by falling cosine."""
    found = []
    for some, own in zip(codes.split(512), names.split(512), strict=True):
        likeness = (some @ codes.T).masked_fill(own[:, None] == names, float("-inf"))
        found.append(likeness.topk(count, 1).indices)
    return torch.cat(found)


def reserved_objects(emoji: EmojiData, sampler: DrawingSampler) -> np.ndarray:
    """Rows of the held-out emoji that are not among the objects to remember of `microvlm-bench memory`.

    A small set may have none: then any but those objects.
    """
    others = sampler.drawn.copy()
    others[choose_objects(emoji)] = False
    reserved = others & emoji.held_out
    return np.flatnonzero(reserved if reserved.any() else others)
