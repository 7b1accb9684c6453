"""Writes composed training pictures with captions, questions and answers, one a file, for models that learn captions.

The pictures are of the kinds that the preset `photo` is trained on, of the split `train` alone. `microvlm-data images`
reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from microvlm.atomic import new_file
from microvlm.training.photo.batches.picture_questions import Asked, Questioner, caption
from microvlm.training.photo.data.composer import Composer, Description
from microvlm.training.photo.data.sources import Sources
from microvlm.training.photo.language import answers
from microvlm.training.photo.language.english import with_article

KINDS = {
    "photo": 54, "tiles": 12, "single": 12, "scene": 12, "stranger": 3, "clutter": 3, "unnamed": 4,
}  # fmt: skip
"""Kind of picture -> its share, per cent: photographs first, since these models are for photographs."""
NAME_QUESTION = "what is this?"
_MEDIUM = {"photo": "photo", "single": "drawing"}
_QUALITY = 92


def write_captioned(
    sources: Sources,
    folder: Path,
    count: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write FOLDER/captions.jsonl and `count` pictures of 256 px in FOLDER/pictures/ -> their number.

    Picture `n` and what is said about it are a function of (seed, n). `progress` is called with the number of written
    pictures and `count`. Raises UserError where there is nothing to
    compose.
    """
    composer = Composer(sources, "train")
    shown = {photo.label for photo in composer.labelled} | {drawing.name for drawing in composer.named}
    questioner = Questioner(sorted(name.lower() for name in shown if name is not None))
    kinds, shares = list(KINDS), np.array(list(KINDS.values())) / sum(KINDS.values())
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        sample = composer.sample(kinds[int(rng.choice(len(kinds), p=shares))], rng)
        path = f"pictures/{number:06d}.jpg"
        with new_file(folder / path) as temporary:
            Image.fromarray(sample.pixels).save(temporary, format="JPEG", quality=_QUALITY)
        lines.append(json.dumps({"image": path, **record(sample.description, questioner, rng)}) + "\n")
        progress(number + 1, count)
    with new_file(folder / "captions.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return count


def record(description: Description, questioner: Questioner, rng: np.random.Generator) -> dict[str, Any]:
    """What a line says of a picture: its caption, what it is where it shows one thing, and an answer to a question."""
    if caption(description) == answers.UNKNOWN_THING:
        return {"declines": description.kind}
    turns: list[dict[str, Any]] = [{"answer": sentence(description)}]
    if len(description.things) == 1:
        turns.append({"question": NAME_QUESTION, "answer": sentence(description, with_medium=False)})
    asked: Asked = questioner.ask(description, rng)
    if asked.kind not in ("describe", "what"):
        turns.append({"question": asked.question, "answer": asked.answer.lower()})
    return {"turns": turns}


def sentence(description: Description, with_medium: bool = True) -> str:
    """The caption with an article where it names one thing: "a photo of a cat", or "a cat"; "a cat left of a dog"."""
    words = caption(description).lower()
    if len(description.things) != 1:
        return words
    medium = _MEDIUM.get(description.kind)
    return f"a {medium} of {with_article(words)}" if medium and with_medium else with_article(words)
