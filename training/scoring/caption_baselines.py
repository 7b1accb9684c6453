"""Captions without a look at the picture: words of a detector in a template, and sentences of a language model.

The words come from a file of any detector's, else from the pictures' annotations, which stand for a perfect detector.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from microvlm.config import MemoryConfig, MicroVLMConfig, PromptConfig
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.training.scoring.caption_scores import Scored, differences, enter_captions, load_model
from microvlm.training.scoring.held_out import Picture
from microvlm.training.scoring.registry import Log, ScoreRequest

MOST_WORDS = 12
"""Different words that one caption is made of, in the order of the detector."""
NEW_TOKENS = 32
_BATCH = 8
_EXAMPLES = (
    (("dog", "person", "frisbee"), "A dog jumps for a frisbee that a man has thrown."),
    (("pizza", "dining table", "cup"), "A pizza on a table next to a cup of coffee."),
    (("bus", "car", "traffic light"), "A bus and some cars wait at a traffic light."),
    (("cat", "couch"), "A cat is sleeping on a couch."),
)
"""Written for this purpose; of no data set."""


class DetectedWords(msgspec.Struct, frozen=True):
    """A line of `--words`."""

    key: str
    words: list[str]


def score_baselines(
    request: ScoreRequest, pictures: list[Picture], scored: Scored, log: Log
) -> list[dict[str, Any]]:
    """A row for each baseline: its scores, and the model's minus its own, paired by picture. Raises UserError.

    Pictures without words get an empty caption.
    """
    words = object_words(request.words, pictures)
    source = "annotated objects" if request.words is None else "detected words"
    captions = {}
    if request.template:
        captions[f"{source} in a template"] = [template_caption(row) for row in words]
    if request.decoder is not None:
        log(f"writing captions with {request.decoder.name}")
        captions[f"{source}, written out by {request.decoder.stem}"] = written_captions(
            request.decoder, words, request.device
        )
    rows = []
    for name, answers in captions.items():
        baseline = Scored({"name": name}, {}, {}, [])
        enter_captions(answers, pictures, baseline)
        rows.append({**baseline.document, "differences": differences(scored, baseline)})
    return rows


def object_words(file: Path | None, pictures: Sequence[Picture]) -> list[list[str]]:
    """The different words of each picture, at most MOST_WORDS. Raises UserError for a file without a picture's key."""
    if file is None:
        rows = [list(picture.objects) for picture in pictures]
        if not any(rows):
            raise UserError("no picture has annotated objects: give a detector's words with --words FILE.")
    else:
        by_key = _read_words(file)
        missing = [picture.key for picture in pictures if picture.key not in by_key]
        if missing:
            raise UserError(f"{file} has no words for the picture {missing[0]} and {len(missing) - 1} more.")
        rows = [by_key[picture.key] for picture in pictures]
    return [list(dict.fromkeys(row))[:MOST_WORDS] for row in rows]


def _read_words(file: Path) -> dict[str, list[str]]:
    try:
        lines = documents.read_file(file).splitlines()
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; give JSON lines of key and words.") from None
    rows = [
        documents.parse(line, DetectedWords, f"{file}:{number}", "write lines of key and words")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    return {row.key: row.words for row in rows}


def template_caption(words: Sequence[str]) -> str:
    """`["dog", "apple"]` -> "a photo of a dog and an apple"; without words empty."""
    if not words:
        return ""
    named = [f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}" for word in words]
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f"a photo of {listed}"


def writer_template(prompt: PromptConfig) -> str:
    """A language model's own template with four answered turns before the question: words, and a caption of them."""
    own = prompt.template.replace(prompt.image_token, "").replace("<image>", "")
    turns = [
        f"{own.replace('{prompt}', ', '.join(words))}{caption}{prompt.eos_token}\n"
        for words, caption in _EXAMPLES
    ]
    return "".join([*turns, own.replace("{prompt}", "<image>{prompt}")])


def written_captions(decoder: Path, words: Sequence[Sequence[str]], device: str | None) -> list[str]:
    """What the language model of a GGUF file writes about each picture's words. Raises UserError.

    Its decoder runs in an assembled model, whose encoder sees no picture.
    """
    from microvlm.model.pretrained.assembly import assemble_checkpoint
    from microvlm.model.pretrained.decoder_tokenizer import read_decoder_tokenizer
    from microvlm.model.pretrained.parts import find_part

    encoder, part = find_part("nano", "vision"), find_part(decoder, "decoder")
    text = part.text_config()
    base = MicroVLMConfig(
        vision=encoder.vision_config(), text=text, memory=MemoryConfig(slots=1, code_size=text.hidden_size)
    )
    template = writer_template(read_decoder_tokenizer(part.files, None).prompt)
    with tempfile.TemporaryDirectory() as folder:
        assembled = Path(folder) / "writer"
        assemble_checkpoint(encoder, part, base, assembled, template=template)
        loaded = load_model(str(assembled), "torch", device)
        captions: list[str] = []
        for start in range(0, len(words), _BATCH):
            prompts = [", ".join(row) or "nothing" for row in words[start : start + _BATCH]]
            captions += loaded.generate(prompts=prompts, max_new_tokens=NEW_TOKENS)
    first_lines = [(caption.strip().splitlines() or [""])[0] for caption in captions]
    return [line if row else "" for row, line in zip(words, first_lines, strict=True)]
