"""The scores that `microvlm-score` knows. A new kind of data brings its own: one module and one entry here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from microvlm.errors import UserError
from microvlm.inputs.text_data import is_text_file
from microvlm.temporary_folder import recover
from microvlm.training.data.caption_data import open_data

Log = Callable[[str], None]
PARTS = ("naming", "captions", "tokens", "questions", "episodes")
"""Parts of the scores of captioned pictures; `captions` includes the objects that they name."""


@dataclass(frozen=True)
class ScoreRequest:
    """What a user asks for."""

    model: str
    data: Path
    against: str | None = None
    """A second model."""
    backend: str = "torch"
    baselines: bool = True
    device: str | None = None
    split: str | None = None
    count: int | None = None
    text: Path | None = None
    pictures: Path | None = None
    fit_answers: bool = False
    """Fit the calibration of answers, and write it into the model's config.json."""
    parts: tuple[str, ...] = ()
    """Of PARTS, those that are scored; empty: all."""
    question: str = "what is this?"
    """What labelled pictures are named by."""
    template: bool = False
    """Also score a template with the words of annotated or detected objects."""
    decoder: Path | None = None
    """A GGUF file whose model also writes captions from these words."""
    words: Path | None = None
    """Words of a detector: JSON lines with `key` and `words`."""
    beside: tuple[str, ...] = ()
    """Further models whose scores on texts stand in the same table."""

    def wants(self, part: str) -> bool:
        """Whether a part of the scores is asked for."""
        return not self.parts or part in self.parts


class Scores(NamedTuple):
    """One kind of scores."""

    file: str
    """The file of a data folder by which it is known that these are its scores; empty for those of a text file."""
    function: str
    """Where the function is: (ScoreRequest, Log) -> the document of a report. Raises UserError."""


SCORES = {
    "emoji": Scores("emoji.json", "microvlm.training.emoji.emoji_scores:score"),
    "captions": Scores("dataset.json", "microvlm.training.scoring.caption_scores:score"),
    "answers": Scores("dataset.json", "microvlm.training.honesty.honesty_scores:score"),
    "texts": Scores("", "microvlm.training.scoring.text_scores:score"),
}


def score(request: ScoreRequest, name: str | None, log: Log) -> dict[str, Any]:
    """The document of the scores `name`, or of those that the data folder stands for. Raises UserError."""
    if is_text_file(request.data) and name is None:
        name = "texts"
    if name != "texts":
        recover(request.data)
    if request.fit_answers:
        if name not in (None, "answers"):
            raise UserError(
                f"--fit-answers belongs to the scores 'answers', not '{name}': leave out --scores."
            )
        name = "answers"
    chosen = name or next(
        (n for n, s in SCORES.items() if s.file and (request.data / s.file).is_file()), None
    )
    if chosen is None:
        open_data(request.data)  # which says what is wrong with the folder
        chosen = "captions"
    module, _, attribute = SCORES[chosen].function.partition(":")
    function: Callable[[ScoreRequest, Log], dict[str, Any]] = getattr(
        importlib.import_module(module), attribute
    )
    return function(request, log)
