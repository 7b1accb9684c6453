"""Stage `scope`: trains the scope detector alone, on memories of every size made from latents that are computed once.

The memory encoder no longer changes, so a step costs no picture and no decoder: memories are sampled from a bank of
encoded facts. The bank's objects occur in no other stage's facts: keys of new objects vary more over views than keys of
trained ones, and new objects are what the detector meets in use.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question
from microvlm.model.memory_algebra import batch_solution
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_ops import full_precision
from microvlm.model.vision import normalise
from microvlm.training.batches.sample_texts import CAPTION_PROMPTS
from microvlm.training.emoji.batches.drawing_sampler import DrawingSampler
from microvlm.training.emoji.batches.fact_batches import FactSampler
from microvlm.training.emoji.batches.scope_batches import BankIndex, MemoryDraw, sample_memories
from microvlm.training.emoji.data.drawings import load_drawings
from microvlm.training.emoji.data.emoji import EmojiData
from microvlm.training.emoji.data.memoryset import choose_memory_objects
from microvlm.training.emoji.data.scene_drawing import compose_scenes
from microvlm.training.emoji.data.scenes import KINDS, sample_question
from microvlm.training.emoji.losses.fact_latents import FactLatents, encode_facts, encode_texts
from microvlm.training.emoji.stages.emoji_task import EmojiTask
from microvlm.training.losses.loss_terms import binary_loss
from microvlm.training.stages.task import StageInputs, WholeModelTask

FACTS_PER_CHUNK = 64
"""Facts that are sampled and encoded together: similar objects and questions about one object are neighbours."""
STRENGTH = 0.8
NEAREST = 8


class Bank(NamedTuple):
    """Latents [n, C] and keys [n, K] of n facts and of other questions, float32; computed once."""

    facts: FactLatents
    pictures: Tensor
    """[p, C]: what an episode writes for each picture, its caption's latent."""
    places: tuple[Tensor, Tensor]
    """Latents and keys of the questions for the first, the second, ... picture of an episode."""
    strangers: tuple[Tensor, Tensor]
    """Latents and keys of questions that no memory answers: captions and scene questions."""
    contents: BankIndex


class ScopeTask(EmojiTask, WholeModelTask):
    """Binary cross-entropy of the scope detector on known against unknown questions, both weighted alike."""

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        self.module = self.model
        sampler = DrawingSampler(self.emoji, self.recipe.vendor_weights, seen_share=1.0)
        share, drawings = self.stage.drawing_share, None
        if share:
            others = load_drawings(self.emoji.folder)
            drawings = others.pixels[others.reserved]
        reserved = reserved_objects(self.emoji, sampler)
        self.fact_sampler = FactSampler(
            self.emoji, sampler, FACTS_PER_CHUNK, STRENGTH, reserved, drawings, share
        )
        self._bank: Bank | None = None
        self.model.requires_grad_(False)
        self.model.scope.requires_grad_(True)

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.model.scope.parameters()), "lr": self.stage.learning_rate}]

    def prepare(self) -> None:
        """Encode the bank, `batch_size` chunks of facts."""
        self._bank = self.encode_bank(round(self.stage.batch_size))

    @property
    def bank(self) -> Bank:
        assert self._bank is not None, "prepare() comes first"
        return self._bank

    def draw(self, generator: torch.Generator) -> list[MemoryDraw]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        return sample_memories(rng, self.bank.contents, self.config.memory.slots)

    def loss(self, module: MicroVLM, batch: list[MemoryDraw]) -> tuple[Tensor, dict[str, Tensor]]:
        with full_precision(module.memory_prior.device.type):
            scopes = [self._read(module, memory) for memory in batch]
        known_scopes, unknown = (torch.cat(parts) for parts in zip(*scopes, strict=True))
        loss = 0.5 * (binary_loss(known_scopes, 1.0) + binary_loss(unknown, 0.0))
        opened, closed = (known_scopes >= 0.5).float().mean(), (unknown < 0.5).float().mean()
        return loss, {"opened": opened, "closed": closed}

    def _read(self, module: MicroVLM, memory: MemoryDraw) -> tuple[Tensor, Tensor]:
        """Write one memory and ask it: the scope detector's outputs for known and for unknown questions."""
        bank = self.bank
        written_rows, known_rows, unknown, strangers = (torch.from_numpy(part) for part in memory[1:])
        if memory.episode:
            latents, keys = bank.places
            write_keys, values = keys[: len(written_rows)], bank.pictures[written_rows]
        else:
            latents, keys = bank.facts.query, bank.facts.query_key
            write_keys, values = bank.facts.write_key[written_rows], bank.facts.value[written_rows]
        variance = self.config.memory.observation_variance
        state = batch_solution(module.memory_prior.float(), write_keys, values, variance)

        def scope(latent: Tensor, key: Tensor) -> Tensor:
            shared = (part.expand(len(latent), -1, -1) for part in state)
            return module.memory_read(key, latent, *shared)[1]

        known_scope = scope(latents[known_rows], keys[known_rows])
        latent, key = (
            torch.cat([part[unknown], other[strangers]])
            for part, other in zip((latents, keys), bank.strangers, strict=True)
        )
        return known_scope, scope(latent, key)

    @torch.no_grad()
    def encode_bank(self, chunks: int) -> Bank:
        """Sample and encode `chunks` times `FACTS_PER_CHUNK` facts, their pictures' captions, and other questions."""
        module, captions = self.model, self.emoji.captions
        generator = torch.Generator().manual_seed(self.recipe.seed)
        rng = np.random.default_rng(self.recipe.seed)
        facts, names, pictures, strangers = [], [], [], []
        device = module.memory_prior.device
        with full_precision(device.type):
            questions = [(ordinal_question(step), "") for step in range(len(ORDINALS))]
            places = encode_texts(module, self.rows, questions, None)
            for _ in range(chunks):
                batch = self.fact_sampler.sample(rng, generator)
                prefixes = module.encode_image(normalise(batch.views, self.config.vision).to(device))
                facts.append(encode_facts(module, batch, prefixes, self.rows))
                names += [fact.object * 100 + fact.relation for fact in batch.facts]
                views = prefixes[len(batch.pictured) :]
                prompts = [(CAPTION_PROMPTS[n % len(CAPTION_PROMPTS)], "") for n in range(len(views))]
                strangers.append(encode_texts(module, self.rows, prompts, views))
                captioned = [n for n, fact in enumerate(batch.pictured) if fact.object < len(captions)]
                captions_written = [
                    (CAPTION_PROMPTS[0], captions[batch.pictured[n].object]) for n in captioned
                ]
                pictures.append(encode_texts(module, self.rows, captions_written, views[captioned])[0])
                strangers.append(self._encode_scene_questions(rng, generator, len(views) // 2))
        fact_latents = FactLatents(*(torch.cat(part) for part in zip(*facts, strict=True)))
        latents, keys = (torch.cat(part) for part in zip(*strangers, strict=True))
        near = nearest_of_other_names(fact_latents.query, torch.tensor(names, device=device))
        picture_latents = torch.cat(pictures)
        contents = BankIndex(
            np.array(names), near.cpu().numpy(), len(picture_latents), len(ORDINALS), len(latents)
        )
        return Bank(fact_latents, picture_latents, places, (latents, keys), contents)

    def _encode_scene_questions(
        self, rng: np.random.Generator, generator: torch.Generator, count: int
    ) -> tuple[Tensor, Tensor]:
        """Latents and keys of `count` questions about random scenes."""
        scene_questions = [sample_question(rng, str(rng.choice(KINDS))) for _ in range(count)]
        scenes = compose_scenes(
            [scene for scene, _ in scene_questions], self.emoji, generator=generator, strength=1.0
        )
        device = self.model.memory_prior.device
        prefixes = self.model.encode_image(normalise(scenes, self.config.vision).to(device))
        prompts = [(question.text, "") for _, question in scene_questions]
        return encode_texts(self.model, self.rows, prompts, prefixes)


def nearest_of_other_names(latents: Tensor, names: Tensor, count: int = NEAREST) -> Tensor:
    """Unit latents [n, C] and names [n] -> int64 [n, count]: rows of other names by falling cosine."""
    nearest = []
    for chunk, own in zip(latents.split(512), names.split(512), strict=True):
        likeness = (chunk @ latents.T).masked_fill(own[:, None] == names, float("-inf"))
        nearest.append(likeness.topk(count, 1).indices)
    return torch.cat(nearest)


def reserved_objects(emoji: EmojiData, sampler: DrawingSampler) -> np.ndarray:
    """Rows of the held-out emoji that `microvlm-bench memory` does not test; if there are none, of any other emoji."""
    others = sampler.drawn.copy()
    others[choose_memory_objects(emoji)] = False
    reserved = others & emoji.held_out
    return np.flatnonzero(reserved if reserved.any() else others)
