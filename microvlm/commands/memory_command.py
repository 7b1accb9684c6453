"""`microvlm memory`: the operations of an episodic memory on a file, on any backend. Every command ends with the file
whole: as it was, or with the change in it; two at once on one file come one after the other, and neither is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from microvlm.commands.escaping import printable
from microvlm.commands.model_options import check_sampling, generation_options, model_options, open_model
from microvlm.console import note, print_json
from microvlm.errors import UserError

if TYPE_CHECKING:
    from microvlm.memory.episodic import Entry
    from microvlm.memory.facts import FactMemory


@click.group()
def memory() -> None:
    """Write, read and forget facts in a memory FILE, which chat --memory carries on with."""


def _options(command: Callable) -> Callable:
    json_flag = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
    return click.argument("file", metavar="FILE")(json_flag(model_options(command)))


def _query_options(command: Callable) -> Callable:
    for option in (
        click.option("--image", metavar="PICTURE", help="The picture that the fact is about."),
        click.option("--question", default="", help="How the fact is asked for."),
    ):
        command = option(command)
    return command


@memory.command()
@click.option("--text", required=True, help="The fact.")
@_query_options
@_options
def write(file: str, text: str, question: str, image: str | None, as_json: bool, **model: Any) -> None:
    """Remember a fact: --text as the answer to --question about --image. FILE is made when it is not there.

    An entry that was written under the same question and picture stays, and is named on stderr; overwrite replaces it.
    """
    with _changing(file, image, model, may_be_new=True) as facts:
        entry = facts.write(text, question, image, _label(image))
    older = facts.older(len(facts.entries) - 1)
    if older is not None:
        note(f"entry {older + 1} was written under this question too; use overwrite to replace it")
    _tell(
        f"{len(facts.entries)}. {printable(entry.text)}",
        {"written": _described(len(facts.entries), entry)},
        facts,
        as_json,
    )


@memory.command()
@_query_options
@click.option("--max-new-tokens", type=int, help="Longest answer; the model's default when left out.")
@_options
def read(
    file: str, question: str, image: str | None, max_new_tokens: int | None, as_json: bool, **model: Any
) -> None:
    """Answer --question about --image with the memory; FILE is not changed."""
    check_sampling(max_new_tokens)
    facts = _open(file, image, model)
    facts.load(file)
    found = facts.read(question, image, generation_options(facts.processor, max_new_tokens, 0.0, 1.0, 0))
    where = "from the memory" if found.recalled else "not from the memory"
    _tell(f"{found.answer}\n({where}, scope {found.scope:.2f})", vars(found), facts, as_json)


@memory.command()
@click.option("--entry", type=int, help="Which one, by its number in the list.")
@_query_options
@_options
def forget(
    file: str, entry: int | None, question: str, image: str | None, as_json: bool, **model: Any
) -> None:
    """Forget one fact: --entry, or the newest that was written under --question, in these words, and --image."""
    if (entry is None) == (not question and image is None):
        raise UserError("say what to forget: either --entry or --question and --image.")
    with _changing(file, image, model) as facts:
        index = facts.find(question, image) if entry is None else entry - 1
        gone = facts.forget(index)
    _tell(f"forgotten: {printable(gone.text)}", {"forgotten": _described(index + 1, gone)}, facts, as_json)


@memory.command()
@click.option("--text", required=True, help="The fact as it is now.")
@_query_options
@_options
def overwrite(file: str, text: str, question: str, image: str | None, as_json: bool, **model: Any) -> None:
    """Replace the newest fact that was written under --question, in these words, and --image by --text."""
    with _changing(file, image, model) as facts:
        number = facts.find(question, image) + 1
        old, new = facts.overwrite(text, question, image, _label(image))
    document = {"forgotten": _described(number, old), "written": _described(number, new)}
    _tell(f"{printable(old.text)}\n-> {printable(new.text)}", document, facts, as_json)


@memory.command()
@_options
def reset(file: str, as_json: bool, **model: Any) -> None:
    """Forget everything."""
    with _changing(file, None, model) as facts:
        count = len(facts.entries)
        facts.reset()
    _tell(f"{count} entries forgotten", {"forgotten": count}, facts, as_json)


@memory.command()
@_options
def rebuild(file: str, as_json: bool, **model: Any) -> None:
    """Make the states anew from the log, without the rounding errors of what was forgotten."""
    with _changing(file, None, model) as facts:
        drift = facts.rebuild()
    _tell(
        f"{len(facts.entries)} entries written anew; the state had drifted by {drift:.1e}",
        {"drift": drift},
        facts,
        as_json,
    )


@memory.command("list")
@click.argument("file", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def list_entries(file: str, as_json: bool) -> None:
    """What was written into FILE, oldest first. Needs no model."""
    from microvlm.memory.memory_file import read_memory

    kept, fingerprint = read_memory(file)
    if as_json:
        entries = [_described(number, entry) for number, entry in enumerate(kept.entries, 1)]
        print_json(
            {
                "fingerprint": fingerprint,
                "slots": kept.slots,
                "memories": len(kept.states),
                "entries": entries,
            }
        )
        return
    for line in describe(kept.entries, kept.slots, len(kept.states)):
        click.echo(line)


def count_of_entries(count: int) -> str:
    """As in `2 entries`."""
    return "1 entry" if count == 1 else f"{count} entries"


def describe(entries: list[Entry], slots: int, memories: int) -> list[str]:
    """Lines for a person: how full the memory is, then one line an entry, with its control characters escaped."""
    of = f"a memory of {slots} slots" if memories == 1 else f"{memories} memories of {slots} slots"
    lines = [f"{count_of_entries(len(entries))} in {of}"]
    for number, entry in enumerate(entries, 1):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.time))
        lines.append(f"{number:3}. {when}  {printable(entry.text)}")
    return lines


@contextmanager
def _changing(
    file: str, image: str | None, model: dict[str, Any], may_be_new: bool = False
) -> Iterator[FactMemory]:
    """The facts of `file`, which are saved at the end unless something went wrong; nobody else changes it meanwhile.

    The lock is taken when the model is loaded, so that others wait milliseconds.
    """
    from microvlm.memory.file_lock import locked

    facts = _open(file, image, model, may_be_new)
    with locked(file):
        if not (may_be_new and not Path(file).exists()):
            facts.load(file)
        yield facts
        facts.save(file)


def _open(file: str, image: str | None, model: dict[str, Any], may_be_new: bool = False) -> FactMemory:
    """A model over an empty memory. `file` and the picture are looked at first: a model takes a while to load."""
    from microvlm.inputs.images import check_file
    from microvlm.memory.facts import FactMemory
    from microvlm.memory.memory_file import read_memory

    if not (may_be_new and not Path(file).exists()):
        read_memory(file)
    if image is not None:
        check_file(image)
    runtime, processor, _ = open_model(**model)
    return FactMemory(runtime, processor)


def _label(image: str | None) -> str:
    return "" if image is None else Path(image).name


def _described(number: int, entry: Entry) -> dict[str, Any]:
    return {
        "entry": number,
        "text": entry.text,
        "time": entry.time,
        "image": entry.image,
        "memory": entry.memory,
        "question": entry.question,
        "picture": entry.picture,
    }


def _tell(sentence: str, document: dict[str, Any], facts: FactMemory, as_json: bool) -> None:
    if as_json:
        print_json({**document, "entries": len(facts.entries), "memories": len(facts.memory.states)})
    else:
        click.echo(sentence)
