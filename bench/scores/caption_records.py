"""The records of a report of `microvlm-score` about captioned pictures."""

from __future__ import annotations

import msgspec

from microvlm.bench.records import Estimate, Figure, Provenance
from microvlm.formats.documents import Count

NAMING_ROWS = ("label", "synonym", "right", "parent", "right_or_parent", "wrong", "declined")
"""Outcomes of naming, in the order of the table."""
EVERY_SPLIT = "all"


class ScoredData(msgspec.Struct, frozen=True):
    """The samples that were scored, and how many the split has."""

    name: str
    split: str
    samples: Count
    available: Count

    @property
    def split_words(self) -> str:
        """The split as a remark names it."""
        return "all splits" if self.split == EVERY_SPLIT else f"{self.split} split"


class CaptionScores(msgspec.Struct, frozen=True):
    """Greedy captions against all captions of a picture; `different`: how many of them differ from each other."""

    pictures: Count
    references: Count
    different: Count
    exact_match: Estimate
    word_f1: Estimate
    bleu4: Estimate
    cider_d: Estimate | None = None


class ObjectScores(msgspec.Struct, frozen=True):
    """Objects that captions name: recall of all that is there, of what people mention, and CHAIR."""

    pictures: Count
    object_recall: Estimate
    mentioned_recall: Estimate
    chair_i: Estimate
    chair_s: Estimate


class NamedShare(msgspec.Struct, frozen=True):
    """A share of named pictures with its Wilson interval."""

    count: Count
    value: Figure
    low: Figure
    high: Figure


class NamingScores(msgspec.Struct, frozen=True):
    """What labelled pictures were called; `rows` by outcome."""

    question: str
    pictures: Count
    classes: Count
    rows: dict[str, NamedShare]
    with_synonyms: Count = 0

    def __post_init__(self) -> None:
        missing = [name for name in NAMING_ROWS if name not in self.rows]
        if missing:
            raise ValueError(f"rows lacks {', '.join(missing)}")


class TokenRow(msgspec.Struct, frozen=True):
    """Loss in nats per token."""

    loss: Estimate
    perplexity: Figure
    accuracy: Estimate


class TokenScores(msgspec.Struct, frozen=True):
    """Teacher forcing: `rows` of the model, with shuffled pictures and of words alone."""

    count: Count
    rows: dict[str, TokenRow]
    picture_gain: Estimate | None = None
    """Loss with shuffled pictures minus loss."""

    def __post_init__(self) -> None:
        if "model" not in self.rows:
            raise ValueError("rows lacks the model's")


class QuestionKind(msgspec.Struct, frozen=True):
    """Questions of one kind; `commonest`: what one answer to all of them gives."""

    kind: str
    count: Count
    exact_match: Estimate
    commonest: Figure
    commonest_answer: str


class QuestionScores(msgspec.Struct, frozen=True):
    """Questions about shown pictures; `left_out`: longer than the model's positions."""

    count: Count
    left_out: Count = 0
    exact_match: Estimate | None = None
    kinds: list[QuestionKind] = []


class MemoryScores(msgspec.Struct, frozen=True):
    """Answers with one state of the memory."""

    exact_match: Estimate
    word_f1: Estimate


class EpisodeScores(msgspec.Struct, frozen=True):
    """Questions about pictures that are gone from view."""

    kind: str
    episodes: Count
    questions: Count
    memory: MemoryScores
    empty: MemoryScores


class TextScore(msgspec.Struct, frozen=True):
    """Perplexity of the decoder alone on a plain text."""

    file: str
    tokens: Count
    perplexity: Figure


class ModelScores(msgspec.Struct, frozen=True, kw_only=True):
    """The scores of one model."""

    model: str
    naming: NamingScores | None = None
    captions: CaptionScores | None = None
    objects: ObjectScores | None = None
    tokens: TokenScores | None = None
    questions: QuestionScores | None = None
    episodes: list[EpisodeScores] = []
    text: TextScore | None = None


class OtherScores(ModelScores, frozen=True, kw_only=True):
    """The scores of the model that another is compared with, and the paired differences, first minus this."""

    differences: dict[str, Estimate]


class CaptionBaseline(msgspec.Struct, frozen=True, kw_only=True):
    """Captions that were made of words alone, and the model's scores minus theirs, paired by picture."""

    name: str
    captions: CaptionScores
    objects: ObjectScores | None = None
    differences: dict[str, Estimate]


class CaptionReport(ModelScores, frozen=True, kw_only=True):
    """The whole document."""

    backend: str
    data: ScoredData
    provenance: Provenance
    against: OtherScores | None = None
    caption_baselines: list[CaptionBaseline] = []
