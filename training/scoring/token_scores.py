"""Caption loss by teacher forcing: the model's, with the pictures shuffled among the captions, and of words alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from microvlm.bench.stats import log_softmax
from microvlm.generation import MemorySlot, Prompt, place_images, read_slot, teacher_force
from microvlm.loaded_model import LoadedModel
from microvlm.training.batches.conversation_rows import ConversationRows, Exchange
from microvlm.training.batches.sample_texts import IGNORED
from microvlm.training.data.caption_data import CaptionData
from microvlm.training.scoring.held_out import Picture

PICTURES = 8
"""Pictures that are encoded together, and among whose captions they are shuffled."""
MOST_LOGITS = 20_000_000
"""Logits that are held at once, 4 bytes each."""
MOST_CAPTIONS, MOST_READ = 20_000, 500_000
"""Captions of the training split that are counted, spread over this many of its first samples."""
COLUMNS = 3
"""Of a row of scores: nats, tokens, tokens whose most probable candidate was right."""


class CaptionTokens(NamedTuple):
    """One caption as the decoder is trained on it."""

    head: np.ndarray
    """int64 [S]: the prompt, with the picture's place."""
    tail: np.ndarray
    """int64 [n]: the caption and the end token."""


class TokenScores(NamedTuple):
    """Scores of the captions of each picture, float64 [pictures, COLUMNS]."""

    model: np.ndarray
    shuffled: np.ndarray | None
    """With another picture of the split; None where there is no other."""


class Unigram(NamedTuple):
    """Probabilities of tokens without any context: what frequencies of words alone give."""

    nats: np.ndarray
    """float64 [V]"""

    def scores(self, captions: Sequence[Sequence[CaptionTokens]]) -> np.ndarray:
        """float64 [pictures, COLUMNS], as `score_tokens` gives them."""
        best = int(self.nats.argmin())
        tails = [np.concatenate([caption.tail for caption in group]) for group in captions]
        return np.array(
            [[self.nats[tail].sum(), len(tail), (tail == best).sum()] for tail in tails], np.float64
        )


def tokenize(loaded: LoadedModel, pictures: Sequence[Picture]) -> list[list[CaptionTokens]]:
    """The tokens of each picture's captions, as training has them: cut at its limit."""
    rows = ConversationRows(loaded.processor)
    prompt = loaded.config.prompt.caption_prompt
    return [[_tokens(rows, prompt, caption) for caption in picture.captions] for picture in pictures]


def count_tokens(loaded: LoadedModel, data: CaptionData) -> Unigram:
    """The unigram distribution of the training split's captions.

    Tokens that were not seen share what Witten and Bell (1991) leave them: as much as there are different seen ones.
    """
    rows = ConversationRows(loaded.processor)
    prompt = loaded.config.prompt.caption_prompt
    counts: Counter[int] = Counter()
    for caption in _training_captions(data):
        counts.update(_tokens(rows, prompt, caption).tail.tolist())
    vocabulary = loaded.config.text.vocab_size
    probabilities = np.zeros(vocabulary)
    probabilities[list(counts)] = list(counts.values())
    unseen = probabilities == 0
    different = len(counts)
    if unseen.any():
        probabilities[unseen] = max(different, 1) / unseen.sum()
    return Unigram(-np.log(probabilities / probabilities.sum()))


def score_tokens(
    loaded: LoadedModel,
    pictures: Sequence[Picture],
    captions: Sequence[Sequence[CaptionTokens]],
    shuffle: bool,
    progress: Callable[[int], None],
) -> TokenScores:
    """Run the decoder over all captions, on any backend, with the memory off. `progress` gets the pictures done."""
    runtime, vision = loaded.runtime, loaded.config.vision
    shuffle = shuffle and len(pictures) > 1
    scores = np.zeros((1 + shuffle, len(pictures), COLUMNS))
    for start, end in _batches(len(pictures)):
        pixels = np.stack([loaded.processor.pixels(picture.view(vision)) for picture in pictures[start:end]])
        features = runtime.encode_image(pixels)
        for number, seen in enumerate((features, np.roll(features, 1, 0))[: 1 + shuffle]):
            rows = [(at, seen[at], caption) for at in range(end - start) for caption in captions[start + at]]
            for at, values in _score_rows(loaded, rows):
                scores[number, start + at] += values
        progress(end)
    return TokenScores(scores[0], scores[1] if shuffle else None)


def _score_rows(
    loaded: LoadedModel, rows: list[tuple[int, np.ndarray, CaptionTokens]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Rows (picture, features [k, H], caption) -> (picture, [nats, tokens, right])."""
    longest = max(len(caption.tail) for _, _, caption in rows)
    size = max(1, MOST_LOGITS // (longest * loaded.config.text.vocab_size))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        # One prompt, so all heads are equally long; what follows a caption cannot change what comes before it.
        ids = np.stack([caption.head for _, _, caption in part])
        length = max(len(caption.tail) for _, _, caption in part)
        answers = np.full((len(part), length), loaded.processor.pad_id)
        for row, (_, _, caption) in enumerate(part):
            answers[row, : len(caption.tail)] = caption.tail
        embeds = loaded.runtime.embed_tokens(ids)
        embeds = place_images(
            embeds, ids, loaded.processor.image_id, np.stack([features for _, features, _ in part])
        )
        prompt = Prompt(embeds, np.ones_like(ids))
        slot: MemorySlot = read_slot(loaded.runtime, prompt, None)
        logits = teacher_force(loaded.runtime, prompt, answers, slot)
        for row, (picture, _, caption) in enumerate(part):
            count = len(caption.tail)
            own = logits[row, :count]
            nats = -log_softmax(own)[np.arange(count), caption.tail]
            yield picture, np.array([nats.sum(), count, (own.argmax(-1) == caption.tail).sum()])


def _tokens(rows: ConversationRows, prompt: str, caption: str) -> CaptionTokens:
    built = rows.build([Exchange(prompt, caption, 1)])
    labels = built.labels[0].numpy()
    labelled = np.flatnonzero(labels != IGNORED)
    return CaptionTokens(built.ids[0, : labelled[0] + 1].numpy(), labels[labelled])


def _batches(count: int) -> Iterator[tuple[int, int]]:
    """Parts of PICTURES each; none has a single picture, unless there is no other."""
    starts = list(range(0, count, PICTURES))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    yield from zip(starts, [*starts[1:], count], strict=True)


def _training_captions(data: CaptionData) -> Iterator[str]:
    """Captions of the training split; an even share of the samples where there are many."""
    read = min(data.count("train"), MOST_READ)
    for turns in islice(data.turns("train"), 0, read, -(-read // MOST_CAPTIONS) or 1):
        yield from (turn.answer for turn in turns if turn.question is None)
