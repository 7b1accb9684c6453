"""`microvlm memory`: write, read and forget facts in a memory file, on any backend.

A command that fails leaves the file unchanged. Commands that change the same file at the same time wait for each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from microvlm.commands.memory_plot import plot
from microvlm.commands.options import (
    WholeNumber,
    check_sampling,
    generation_options,
    model_options,
    open_model,
)
from microvlm.console import after_saving, echo, note, print_json
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.terminal.suggestions import FILE

if TYPE_CHECKING:
    from microvlm.memory.episodic import Entry
    from microvlm.memory.facts import FactMemory, FactReading


_JSON_KEYS = {"from_memory": "recalled"}
"""Fields of `FactReading` that have another key in the JSON document."""


@click.group()
def memory() -> None:
    """Write, read and forget facts in a memory FILE, which chat --memory can continue.

    \b
    Example: microvlm memory list facts.mem
    """


memory.add_command(plot)


def _options(command: Callable) -> Callable:
    json_flag = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
    return click.argument("file", type=FILE, metavar="FILE")(json_flag(model_options(command)))


def _query_options(command: Callable) -> Callable:
    for option in (
        click.option("--image", type=FILE, metavar="PICTURE", help="The picture that the fact is about."),
        click.option("--question", default="", help="The question that asks for the fact."),
    ):
        command = option(command)
    return command


@memory.command()
@click.option("--text", required=True, help="The fact.")
@_query_options
@_options
def write(file: str, text: str, question: str, image: str | None, as_json: bool, **model: Any) -> None:
    """Remember a fact: --text as the answer to --question about --image. FILE is created if missing.

    An older entry that was written under the same question and picture stays, and is named on stderr; overwrite
    replaces it.

    \b
    Example: microvlm memory write facts.mem --image cat.jpg --question "whose is this?" --text anna
    """
    with _change(file, image, model, may_be_new=True) as facts:
        entry = facts.write(text, question, image, _label(image))
    older = facts.older(len(facts.entries) - 1)
    if older is not None:
        note(f"entry {older + 1} was written under this question too; use overwrite to replace it")
    number = len(facts.entries)
    _print_change(
        f"{number}. {printable(entry.text)}", {"written": _entry_document(number, entry)}, facts, as_json
    )


@memory.command()
@_query_options
@click.option(
    "--from",
    "source",
    type=click.Choice(("entry", "decoder")),
    default="entry",
    show_default=True,
    help="Say the text of the entry that the reading points at, or what the decoder says from the reading alone.",
)
@click.option(
    "--max-new-tokens",
    type=WholeNumber(1),
    help="Longest answer of --from decoder; the model's default when left out.",
)
@_options
def read(
    file: str,
    question: str,
    image: str | None,
    source: Literal["entry", "decoder"],
    max_new_tokens: int | None,
    as_json: bool,
    **model: Any,
) -> None:
    """Answer --question about --image with the memory; FILE is not changed.

    The answer is the text of one entry, or "not in this memory".

    \b
    Example: microvlm memory read facts.mem --image cat.jpg --question "who owns this?"
    """
    check_sampling(max_new_tokens)
    facts = _open(file, image, model)
    facts.load(file)
    options = generation_options(facts.processor, max_new_tokens, 0.0, 1.0, 0)
    reading = facts.read(question, image, options, source)
    document = {_JSON_KEYS.get(name, name): value for name, value in vars(reading).items()}
    document["entry"] = None if reading.entry is None else reading.entry + 1
    _print_result(f"{reading.answer}\n({_describe(reading)})", document, facts, as_json)


def _describe(reading: FactReading) -> str:
    """Where an answer is from, and how sure that is."""
    if reading.source == "decoder":
        visible = "seen" if reading.from_memory else "not seen"
        return f"from the decoder, the reading {visible}, scope {reading.scope:.2f}"
    if reading.entry is None:
        return f"confidence {reading.confidence:.2f}"
    return f"from the memory, entry {reading.entry + 1}, confidence {reading.confidence:.2f}"


@memory.command()
@click.option("--entry", type=int, help="The fact's number in the list.")
@_query_options
@_options
def forget(
    file: str, entry: int | None, question: str, image: str | None, as_json: bool, **model: Any
) -> None:
    """Forget one fact: --entry, or the newest that was written under these words of --question and --image.

    \b
    Example: microvlm memory forget facts.mem --entry 2
    """
    if (entry is None) == (not question and image is None):
        raise UserError("say what to forget: --entry, or --question and, if the fact has one, --image.")
    with _change(file, image, model) as facts:
        index = facts.find(question, image) if entry is None else entry - 1
        entry_before = facts.forget(index)
    document = {"forgotten": _entry_document(index + 1, entry_before)}
    _print_change(f"forgotten: {printable(entry_before.text)}", document, facts, as_json)


@memory.command()
@click.option("--text", required=True, help="The new fact.")
@_query_options
@_options
def overwrite(file: str, text: str, question: str, image: str | None, as_json: bool, **model: Any) -> None:
    """Replace the newest fact that was written under these words of --question and --image by --text.

    \b
    Example: microvlm memory overwrite facts.mem --question "whose is this?" --text eva
    """
    with _change(file, image, model) as facts:
        number = facts.find(question, image) + 1
        old, new = facts.overwrite(text, question, image, _label(image))
    document = {"forgotten": _entry_document(number, old), "written": _entry_document(number, new)}
    _print_change(f"{printable(old.text)}\n-> {printable(new.text)}", document, facts, as_json)


@memory.command()
@_options
def reset(file: str, as_json: bool, **model: Any) -> None:
    """Forget all facts.

    \b
    Example: microvlm memory reset facts.mem
    """
    with _change(file, None, model) as facts:
        count = len(facts.entries)
        facts.reset()
    _print_change(f"{count} entries forgotten", {"forgotten": count}, facts, as_json)


@memory.command()
@_options
def rebuild(file: str, as_json: bool, **model: Any) -> None:
    """Rebuild the memory from its log, without the rounding errors of forgotten facts.

    \b
    Example: microvlm memory rebuild facts.mem
    """
    with _change(file, None, model) as facts:
        drift = facts.rebuild()
    _print_change(
        f"{len(facts.entries)} entries written again; the state had drifted by {drift:.1e}",
        {"drift": drift},
        facts,
        as_json,
    )


@memory.command("list")
@click.argument("file", type=FILE, metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def list_entries(file: str, as_json: bool) -> None:
    """List the facts in FILE, oldest first. Needs no model.

    \b
    Example: microvlm memory list facts.mem --json
    """
    from microvlm.memory.memory_file import read_memory

    content, fingerprint = read_memory(file)
    if as_json:
        entries = [_entry_document(number, entry) for number, entry in enumerate(content.entries, 1)]
        print_json(
            {
                "fingerprint": fingerprint,
                "slots": content.slots,
                "memories": content.state_count,
                "entries": entries,
            }
        )
        return
    for line in describe(content.entries, content.slots, content.state_count):
        echo(line)


def count_of_entries(count: int) -> str:
    """The number of entries in words, such as `2 entries`."""
    return "1 entry" if count == 1 else f"{count} entries"


def describe(entries: list[Entry], slots: int, memories: int) -> list[str]:
    """Lines of text: how full the memory is, then one line per entry with control characters escaped."""
    capacity = f"a memory of {slots} slots" if memories == 1 else f"{memories} memories of {slots} slots"
    lines = [f"{count_of_entries(len(entries))} in {capacity}"]
    for number, entry in enumerate(entries, 1):
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.time))
        lines.append(f"{number:3}. {date}  {printable(entry.text)}")
    return lines


@contextmanager
def _change(
    file: str, image: str | None, model: dict[str, Any], may_be_new: bool = False
) -> Iterator[FactMemory]:
    """Load the facts of `file`, save them at the end unless there was an error, and lock the file in between.

    The lock is taken after the model was loaded, so that other processes wait only milliseconds.
    """
    from microvlm.memory.file_lock import locked

    facts = _open(file, image, model, may_be_new)
    with locked(file):
        if not (may_be_new and not Path(file).exists()):
            facts.load(file)
        yield facts
        facts.save(file)


def _open(file: str, image: str | None, model: dict[str, Any], may_be_new: bool = False) -> FactMemory:
    """Load the model with an empty memory. File and image are checked first, because loading takes time."""
    from microvlm.inputs.images import check_file
    from microvlm.memory.facts import FactMemory
    from microvlm.memory.memory_file import read_memory

    if not (may_be_new and not Path(file).exists()):
        read_memory(file, say=lambda _: None)  # which is said when the facts are loaded
    if image is not None:
        check_file(image)
    runtime, processor, _ = open_model(**model)
    return FactMemory(runtime, processor)


def _label(image: str | None) -> str:
    return "" if image is None else Path(image).name


def _entry_document(number: int, entry: Entry) -> dict[str, Any]:
    return {
        "entry": number,
        "text": entry.text,
        "time": entry.time,
        "image": entry.image,
        "memory": entry.memory,
        "question": entry.question,
        "picture": entry.picture,
    }


def _print_change(text: str, document: dict[str, Any], facts: FactMemory, as_json: bool) -> None:
    """`_print_result` for a change of the file, which is made whether or not it can be printed."""
    with after_saving():
        _print_result(text, document, facts, as_json)


def _print_result(text: str, document: dict[str, Any], facts: FactMemory, as_json: bool) -> None:
    if as_json:
        print_json({**document, "entries": len(facts.entries), "memories": len(facts.memory.states)})
    else:
        echo(text)
