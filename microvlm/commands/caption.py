"""`microvlm caption`: describe images, or answer a question about each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from microvlm.atomic import new_file
from microvlm.commands.options import (
    check_sampling,
    confidence_options,
    generation_options,
    guess_lines,
    model_options,
    open_model,
    sampling_options,
    show_option,
)
from microvlm.console import BAD_INPUT, describe_os_error, echo, note, note_error, print_json
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.terminal.answer_line import AnswerLine
from microvlm.terminal.pictures import open_pictures
from microvlm.terminal.step_progress import counted
from microvlm.terminal.suggestions import FILE

if TYPE_CHECKING:
    from microvlm.answers.answering import Answer
    from microvlm.backends import LoadedRuntime
    from microvlm.backends.threads import Threads
    from microvlm.commands.heatmap import Table, WordMap
    from microvlm.generation import Prompt
    from microvlm.inputs.processor import Inputs, Processor
    from microvlm.memory.episodic import EpisodicMemory
    from microvlm.sampling import GenerationOptions


class Sureness(NamedTuple):
    """What is asked for about an answer's confidence."""

    min_confidence: float | None = None
    """None: the model's own threshold."""
    guesses: int = 0


class Drawings(NamedTuple):
    """Files that an answer's maps are drawn into; None for none."""

    attention: str | None = None
    evidence: str | None = None


_MODELS_OWN, _NO_DRAWINGS = Sureness(), Drawings()


@click.command()
@click.argument("images", type=FILE, nargs=-1, required=True, metavar="IMAGE...")
@click.option("--prompt", help="What to ask; the model's captioning prompt when left out.")
@click.option(
    "--memory",
    "memory_file",
    type=FILE,
    help="A memory file, as chat and memory write it: a fact in it answers first, but for drawings. It is not changed.",
)
@click.option(
    "--attention",
    type=FILE,
    metavar="FILE.png",
    help="Draw where each word looked (one image, backend torch).",
)
@click.option(
    "--evidence",
    type=FILE,
    metavar="FILE.png",
    help="Draw which parts of the picture each word rests on (one image, any backend, the time of 82 prompts).",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@show_option
@confidence_options
@sampling_options
@model_options
def caption(
    images: tuple[str, ...],
    prompt: str | None,
    memory_file: str | None,
    attention: str | None,
    evidence: str | None,
    as_json: bool,
    show: bool | None,
    min_confidence: float | None,
    guesses: bool,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    model: str,
    backend: str | None,
    threads: Threads,
    target: str | None,
) -> int:
    """Describe each IMAGE, or answer a question about it; a model that is not sure enough says so.

    Of several images those that cannot be read are named on stderr, and the others are described; the exit status is
    then 2.

    \b
    Example: microvlm caption cat.jpg --prompt "what is this?" --evidence evidence.png
    """
    from microvlm.answers.answering import GUESSES, check_min_confidence, check_share
    from microvlm.memory.memory_file import open_memory

    check_sampling(max_new_tokens, temperature, top_p, seed)
    check_share(min_confidence)
    pictures = open_pictures(False if show is None and as_json else show)
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty: write a question, or leave it out for a caption.")
    errors = _unreadable(images)
    if attention is not None and evidence is not None and Path(attention) == Path(evidence):
        raise UserError(f"--attention and --evidence are both {attention}; give two names.")
    for flag, file in (("--attention", attention), ("--evidence", evidence)):
        if file is not None:
            _check_drawing(flag, file, images)
    if attention is not None:
        backend = _attention_backend(backend)
    runtime, processor, load_ms = open_model(model, backend, threads, target)
    options = generation_options(processor, max_new_tokens, temperature, top_p, seed)
    check_min_confidence(runtime.config.answers, min_confidence)
    sureness = Sureness(min_confidence, GUESSES if guesses else 0)
    memory = None if memory_file is None else open_memory(memory_file, runtime)
    results: list[dict[str, Any]] = []
    for image in images:
        prefix = "" if len(images) == 1 else f"{printable(image)}: "
        answer_line = None
        if not as_json:
            answer_line = AnswerLine.on_terminal(processor.stream(), prefix, runtime.config.answers is None)
        try:
            if image in errors:
                raise UserError(errors[image])
            drawings = Drawings(attention, evidence)
            if pictures is not None and drawings == _NO_DRAWINGS:
                pictures.show(image)
            result = caption_one(
                runtime, processor, image, prompt, options, memory, sureness, drawings, answer_line
            )
        except (UserError, OSError) as error:
            if answer_line is not None:
                answer_line.close()
            sentence = describe_os_error(error) if isinstance(error, OSError) else str(error)
            if len(images) == 1:
                raise UserError(sentence) from None
            errors[image] = sentence
            note_error(sentence)
            results.append({"image": image, "error": sentence})
            continue
        if pictures is not None:
            for drawing in filter(None, drawings):
                pictures.show(drawing, is_sheet=True)
        result["timings_ms"] = {"load": load_ms, **result["timings_ms"]}
        results.append({"image": image, **result})
        if not as_json:
            _print_answer(result, None if answer_line is not None else prefix)
    if as_json:
        for result in results:
            if result.get("guesses") is not None:
                result["guesses"] = [guess._asdict() for guess in result["guesses"]]
        single = {key: value for key, value in results[0].items() if key != "image"}
        print_json(single if len(images) == 1 else {"results": results})
    return BAD_INPUT if errors else 0


def _print_answer(result: dict[str, Any], prefix: str | None) -> None:
    """Print an answer after `prefix`, or None where it was shown already, where it is from, and the guesses."""
    if prefix is not None:
        echo(f"{prefix}{result['caption']}")
    if result["memory"] is not None:
        note("(from the memory, entry {entry}, confidence {confidence:.2f})".format(**result["memory"]))
    for guess in guess_lines(result["guesses"]):
        echo(guess)


def _unreadable(images: Sequence[str]) -> dict[str, str]:
    """Image -> why its file cannot be read. Raises UserError when that is true of all, before a model is loaded."""
    from microvlm.inputs.images import check_file

    errors = {}
    for image in images:
        try:
            check_file(image)
        except UserError as error:
            errors[image] = str(error)
    if len(errors) == len(set(images)):
        for sentence in list(errors.values())[:-1]:
            note_error(sentence)
        raise UserError(list(errors.values())[-1])
    return errors


def caption_one(
    runtime: LoadedRuntime,
    processor: Processor,
    image: str,
    prompt: str | None,
    options: GenerationOptions,
    memory: EpisodicMemory | None,
    sureness: Sureness = _MODELS_OWN,
    drawings: Drawings = _NO_DRAWINGS,
    line: AnswerLine | None = None,
) -> dict[str, Any]:
    """Caption one image -> `caption`, `tokens` (ids), `confidence`, `declined`, `guesses`, `memory` and `timings_ms`.

    `memory` is the number of the entry whose text is the caption, and the confidence that it answers; None where the
    model looked at the image. The answer is also shown on `line`, as it comes.
    """
    from microvlm.answers.answering import answer_prompt
    from microvlm.generation import Timings, embed_prompt
    from microvlm.memory.pointing.encoded_query import encode_query
    from microvlm.memory.pointing.pointer import find_entry
    from microvlm.memory.query import Query

    start, timings = time.perf_counter(), Timings()
    question = processor.config.prompt.caption_prompt if prompt is None else prompt
    with timings.phase("preprocess"):
        query = None if memory is None else Query.build(processor, question, image)
        inputs = processor([question], [[image]]) if query is None else query.inputs(processor)
    embedded = embed_prompt(runtime, *inputs, processor.image_id, timings)
    if memory is not None and query is not None:
        with timings.phase("memory_read"):
            encoded = encode_query(runtime, processor, query, embedded, to_read=True)
            pointing = find_entry(runtime, memory, encoded)
        entry = None if pointing.entry is None else memory.entries[pointing.entry]
        # What the model said of an image before adds nothing to the image.
        if entry is not None and entry.told and drawings == _NO_DRAWINGS:
            timings.milliseconds["total"] = (time.perf_counter() - start) * 1e3
            if line is not None:
                line.finish(entry.value)
            return {
                "caption": entry.value,
                "tokens": processor.text_ids(entry.value),
                "confidence": None,
                "declined": False,
                "guesses": None,
                "memory": {"entry": (pointing.entry or 0) + 1, "confidence": pointing.confidence},
                "timings_ms": timings.milliseconds,
            }
    (answer,) = answer_prompt(
        *(runtime, processor, embedded, options, None, sureness.guesses, sureness.min_confidence, timings),
        on_token=None if line is None else line.feed,
    )
    timings.milliseconds["total"] = (time.perf_counter() - start) * 1e3
    if line is not None:
        line.finish(answer.text)
    if drawings != _NO_DRAWINGS:
        _draw(runtime, processor, image, inputs, embedded, answer, drawings)
    return {
        "caption": answer.text,
        "tokens": answer.tokens,
        "confidence": answer.confidence,
        "declined": answer.declined,
        "guesses": answer.guesses,
        "memory": None,
        "timings_ms": timings.milliseconds,
    }


def _draw(
    runtime: LoadedRuntime,
    processor: Processor,
    image: str,
    inputs: Inputs,
    embedded: Prompt,
    answer: Answer,
    drawings: Drawings,
) -> None:
    """Draw where the model looked for each of its own words, and what each rests on."""
    tokens, text, (attention, evidence) = answer.tokens, answer.own_text, drawings
    stretch = runtime.config.vision.resize == "stretch"
    if attention is not None:
        from microvlm.commands import attention_reading
        from microvlm.model.torch_runtime import TorchRuntime

        if not isinstance(runtime, TorchRuntime):
            raise UserError(_NO_ATTENTION.format("this one"))
        reading = attention_reading.read_attention(runtime, processor, inputs, embedded, tokens)
        side = runtime.config.vision.image_size // runtime.config.vision.patch_size
        legend = attention_reading.LEGEND
        _save(attention, image, reading.maps, text, 1 / side**2, legend, reading.table, stretch)
    if evidence is not None:
        from microvlm.commands.evidence import FLOOR, LEGEND, read_evidence

        maps = read_evidence(runtime, processor, inputs, tokens, None, counted("pictures scored"))
        _save(evidence, image, maps, text, FLOOR, LEGEND, stretch=stretch)


def _save(
    path: str,
    image: str,
    maps: list[WordMap],
    text: str,
    floor: float,
    legend: str,
    table: Table | None = None,
    stretch: bool = False,
) -> None:
    from microvlm.commands.heatmap import draw, words_of

    sheet = draw(image, maps, text, floor, legend, table, stretch)
    with new_file(path) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=words_of(maps, text))


_NO_ATTENTION = (
    "--attention needs --backend torch, which runs the same bundle: graphs on {} give no attention weights; "
    "--evidence draws which parts of the picture each word rests on, on any backend."
)


def _attention_backend(backend: str | None) -> str:
    """The backend that gives attention weights. Raises UserError if another was asked for."""
    if backend not in (None, "torch"):
        raise UserError(_NO_ATTENTION.format(f"'{backend}'"))
    return "torch"


def _check_drawing(flag: str, file: str, images: Sequence[str]) -> None:
    """Raise UserError for a file that no drawing can be written to, or more than one image."""
    path = Path(file)
    if path.suffix.lower() != ".png":
        raise UserError(f"{flag} {file} is not a .png; give a file name that ends in .png.")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{flag} {file} cannot be written: its folder must exist and it must be a file.")
    if len(images) != 1:
        raise UserError(f"{flag} draws one image and {len(images)} were given; caption them one by one.")
    if path.exists() and Path(images[0]).exists() and path.samefile(images[0]):
        raise UserError(f"{flag} {file} would replace the picture itself; give another name.")
