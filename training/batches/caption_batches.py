"""Batches of captioned pictures: questions about shown pictures, and episodes that only the memory can answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.config import VisionConfig
from microvlm.errors import UserError
from microvlm.memory.ordinal_questions import ordinal_question
from microvlm.training.batches.batch_share import BatchShare, take_share
from microvlm.training.batches.conversation_rows import ConversationRows, Exchange, Rows
from microvlm.training.batches.picture_views import draw_view, plain_view, view_draws
from microvlm.training.batches.sample_texts import CAPTION_PROMPTS
from microvlm.training.data.caption_data import CaptionSample, Turn
from microvlm.training.recipe import StageConfig

OTHER_PROMPT_SHARE = 0.2
"""Share of the captions that are asked for in other words than the model's own caption prompt."""
MASKED, EMPTY = -2, -1
"""What a row sees of a memory: nothing, or an empty one. A number from 0 is that episode's, of other pictures."""


class View(NamedTuple):
    """A picture that is to be drawn: its file and the numbers that choose its view."""

    content: bytes
    draws: np.ndarray


class Episodes(NamedTuple):
    """n episodes: `steps` pictures are written into a memory one after another, and one question is asked."""

    written: np.ndarray
    """int64 [m, L]: the picture that is written at each step, an index into the captioned pictures of the whole batch;
    -1 for none. The first n are asked; the others are episodes of other processes that rows of this one see."""
    questions: Rows
    """The questions without their answers, int64 [n, S]: what the memory is read with."""
    answers: Rows
    """The questions with their answers, without pictures."""
    noise: Tensor
    """float32 [n, K], standard normal: added to the keys that read, scaled by the stage's variance."""


class CaptionBatch(NamedTuple):
    """One batch of a `captions` stage, or the share of it that one of several processes computes."""

    keys: list[str]
    """Names of the whole batch's samples."""
    pixels: Tensor
    """uint8 [N, 3, S, S]: the pictures of all rows, in the rows' order, then those of episodes alone."""
    rows: Rows
    """int64 [B, S]: questions about shown pictures, with answers."""
    captioned: np.ndarray
    """int64 [C]: the picture of each caption below."""
    caption_row: np.ndarray
    """int64 [C]: the row of each caption, -1 for one that no row asks for."""
    captions: Rows
    """int64 [C, S]: the pictures' caption prompts with their captions: what is written into a memory."""
    caption_texts: list[str]
    """The captions of the whole batch."""
    visible_memory: np.ndarray
    """int64 [B]: MASKED, EMPTY, or the episode whose memory a row sees, which says nothing about its picture."""
    episodes: Episodes | None
    share: BatchShare


NO_SHARE = BatchShare(1, 0, 0, 0, 0, 0, 0, np.zeros(0, np.int64), np.zeros(0, bool))
"""Of a batch that is being drawn, and of one that a process has alone."""


class CaptionSampler:
    """Samples the batches of one stage. `vision` frames the pictures; `slots`: K of the memory.

    Of `processes`, number `process` gets its share of each batch.
    """

    def __init__(
        self,
        rows: ConversationRows,
        stage: StageConfig,
        vision: VisionConfig,
        slots: int,
        caption_prompt: str,
        process: int = 0,
        processes: int = 1,
    ):
        self.rows, self.stage, self.vision, self.slots = rows, stage, vision, slots
        self.process, self.processes = process, processes
        self.caption_prompt = caption_prompt
        self.options = stage.caption

    def batch(self, samples: Sequence[CaptionSample], rng: np.random.Generator) -> CaptionBatch:
        """The batch of these samples; `rng` draws turns, views, episodes and what rows see of a memory.

        Every process draws the same numbers; each decodes the pictures of its own share alone.
        """
        chosen = [self._choose(sample, rng) for sample in samples]
        shown = [(sample, turn) for sample, turn in chosen if turn.images]
        authored = [(sample, turn) for sample, turn in chosen if not turn.images]
        exchanges: list[Exchange] = []
        views: list[View] = []
        captioned, caption_row, texts = [], [], []
        for row, (sample, turn) in enumerate(shown):
            if turn.question is None and len(turn.images) == 1:
                captioned.append(len(views))
                caption_row.append(row)
                texts.append(turn.answer)
            exchanges.append(Exchange(self._question(turn, rng), turn.answer, len(turn.images)))
            views += [self._view(sample, image, rng) for image in turn.images]
        plans = self._own_episodes(len(captioned), rng, texts)
        for sample, turn in authored:
            written = []
            for image in range(len(sample.images)):
                caption = _caption_of(sample, image)
                if caption is None:
                    continue
                written.append(len(captioned))
                captioned.append(len(views))
                caption_row.append(-1)
                texts.append(caption)
                views.append(self._view(sample, image, rng))
            if written:
                plans.append((written, turn.question or self.caption_prompt, turn.answer))
        if not exchanges:
            # A batch of episodes alone still needs rows that see their picture: the pictures' captions.
            if not captioned:
                raise UserError(
                    f"the samples {', '.join(sample.key for sample in samples[:3])} ask about pictures "
                    "without captions: give each picture of an episode a caption."
                )
            exchanges = [Exchange(self.caption_prompt, text, 1) for text in texts]
            caption_row = list(range(len(texts)))
        rows = self.rows.build(exchanges)
        captions = self.rows.build(
            [Exchange(self.caption_prompt, text, 1) for text in texts]
            or [Exchange(self.caption_prompt, "-", 1)]
        )
        whole = CaptionBatch(
            [sample.key for sample in samples],
            torch.zeros(0),
            rows,
            np.array(captioned, np.int64),
            np.array(caption_row, np.int64),
            captions,
            texts,
            self._visible_memories(exchanges, plans, caption_row, texts, rng),
            self._episodes(plans, rng),
            NO_SHARE,
        )
        shown_pictures = np.array([exchange.images for exchange in exchanges], np.int64)
        numbers, batch = take_share(whole, shown_pictures, self.process, self.processes)
        return batch._replace(pixels=self._draw([views[number] for number in numbers]))

    def _choose(self, sample: CaptionSample, rng: np.random.Generator) -> tuple[CaptionSample, Turn]:
        return sample, sample.turns[int(rng.integers(len(sample.turns)))]

    def _question(self, turn: Turn, rng: np.random.Generator) -> str:
        other = rng.random() < OTHER_PROMPT_SHARE
        wording = CAPTION_PROMPTS[int(rng.integers(len(CAPTION_PROMPTS)))]
        if turn.question is not None:
            return turn.question
        return wording if other and len(turn.images) == 1 else self.caption_prompt

    def _view(self, sample: CaptionSample, image: int, rng: np.random.Generator) -> View:
        if image >= len(sample.images):
            raise UserError(f"sample {sample.key} has no picture {image}: build the data folder again.")
        return View(sample.images[image], view_draws(rng))

    def _draw(self, views: Sequence[View]) -> Tensor:
        """Pixels uint8 [N, 3, S, S]."""
        side = self.vision.image_size
        drawn = [
            draw_view(view.content, self.vision, view.draws, self.stage.augment_strength) for view in views
        ]
        pixels = np.stack(drawn) if drawn else np.zeros((0, side, side, 3), np.uint8)
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    def _own_episodes(
        self, captioned: int, rng: np.random.Generator, texts: list[str]
    ) -> list[tuple[list[int], str, str]]:
        """Episodes over the batch's own captioned pictures: (pictures written, question, answer) each."""
        length = min(self.options.episode_length, captioned)
        count = round(captioned * self.options.episode_share)
        if length < 2 or count < 1:
            return []
        plans = []
        for _ in range(count):
            written = rng.permutation(captioned)[:length]
            step = int(rng.integers(length))
            plans.append((written.tolist(), ordinal_question(step), texts[written[step]]))
        return plans

    def _episodes(self, plans: list[tuple[list[int], str, str]], rng: np.random.Generator) -> Episodes | None:
        noise = rng.standard_normal((len(plans), self.slots)).astype(np.float32)
        if not plans:
            return None
        length = max(len(written) for written, _, _ in plans)
        table = np.full((len(plans), length), -1, np.int64)
        for row, (written, _, _) in enumerate(plans):
            table[row, : len(written)] = written
        return Episodes(
            table,
            self.rows.prompts([question for _, question, _ in plans]),
            self.rows.build([Exchange(question, answer, 0) for _, question, answer in plans]),
            torch.from_numpy(noise),
        )

    def _visible_memories(
        self,
        exchanges: Sequence[Exchange],
        plans: Sequence[tuple[list[int], str, str]],
        caption_row: Sequence[int],
        texts: Sequence[str],
        rng: np.random.Generator,
    ) -> np.ndarray:
        """What each row sees of a memory. A row sees no memory that holds its own picture, or one with its answer."""
        share = self.options.memory_rows if self.options.episode_length else 0.0
        draws, choices = rng.random(len(exchanges)), rng.random(len(exchanges))
        result = np.full(len(exchanges), MASKED, np.int64)
        for row, exchange in enumerate(exchanges):
            if draws[row] >= share:
                continue
            result[row] = EMPTY
            own = {n for n, other in enumerate(caption_row) if other == row or texts[n] == exchange.answer}
            others = [n for n, (written, _, _) in enumerate(plans) if not own.intersection(written)]
            if draws[row] < share / 2 and others:
                result[row] = others[int(choices[row] * len(others))]
        return result


def plain_exchange(
    sample: CaptionSample, turn: Turn, caption_prompt: str, vision: VisionConfig
) -> tuple[Exchange, list[np.ndarray]]:
    """A turn as evaluation asks it, with the pictures that it shows, uint8 [side, side, 3] each."""
    question = caption_prompt if turn.question is None else turn.question
    views = [plain_view(sample.images[image], vision) for image in turn.images]
    return Exchange(question, turn.answer, len(views)), views


def _caption_of(sample: CaptionSample, image: int) -> str | None:
    for turn in sample.turns:
        if turn.question is None and turn.images == (image,):
            return turn.answer
    return None
