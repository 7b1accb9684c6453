"""`microvlm-data models`: fetches or checks the public parts that a MicroVLM is assembled from."""

from __future__ import annotations

from pathlib import Path

import click

from microvlm.console import after_saving, echo, print_json
from microvlm.errors import UserError
from microvlm.training.data.download.hub_files import HubUnreachable
from microvlm.training.data.download.model_parts import BOTH, PARTS, ModelPart, PartRecord, by_hand, provide

_ROLES = {"decoder": BOTH[:1], "vision": BOTH[1:], "both": BOTH}
_BY_NAME = {part.name: part for part in PARTS}


@click.command()
@click.option(
    "--model",
    "choices",
    type=click.Choice([*_ROLES, *(name for name in _BY_NAME)]),
    multiple=True,
    default=("both",),
    show_default=True,
    help="A role, or one part by its name; may be given several times.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the parts.")
@click.option("--revision", help="A commit, branch or tag of the one part that is fetched.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def models(choices: tuple[str, ...], output: Path, revision: str | None, as_json: bool) -> None:
    """Fetch Qwen2.5-0.5B and DeiT-Tiny from the Hugging Face hub, or check them where they are.

    Revisions are pinned, hashes are recorded in SOURCES.json and compared by every later run. Files that you put into
    the folders by hand are checked and accepted.

    \b
    Example: microvlm-data models -o parts
    """
    names = dict.fromkeys(name for choice in choices for name in _ROLES.get(choice, (choice,)))
    parts = [_BY_NAME[name] for name in names]
    if revision is not None and len(parts) != 1:
        raise UserError("--revision belongs to one part: give its name with --model.")
    try:
        records = {part.name: provide(part, output, revision) for part in parts}
    except HubUnreachable as error:
        raise UserError(
            f"{error}: run the same command again, or {by_hand(parts, output)} by hand and run it then."
        ) from None
    with after_saving():
        if as_json:
            documents = {name: _describe(record) for name, record in records.items()}
            print_json({"output": str(output), "models": documents})
            return
        for part in parts:
            record = records[part.name]
            size = sum(file.bytes for file in record.files.values())
            echo(
                f"{output / part.name}: {len(record.files)} files, {size:,} bytes, as recorded in SOURCES.json"
            )
            echo(f"  {part.repository}, revision {_revision(record)}, licence {part.licence}")
        echo(f"next: {_next_step(parts, output)}")


def _describe(record: PartRecord) -> dict:
    return {
        "repository": record.repository,
        "revision": record.revision,
        "pin": record.pin,
        "licence": record.licence,
        "bytes": sum(file.bytes for file in record.files.values()),
        "files": {name: file.sha256 for name, file in record.files.items()},
    }


def _revision(record: PartRecord) -> str:
    if record.revision is None:
        return "unknown (put there by hand)"
    return f"{record.revision} ({'pinned at ' if record.pin == 'first use' else ''}{record.pin})"


def _next_step(parts: list[ModelPart], output: Path) -> str:
    """The command that assembles what is there; the part that was not asked for has its usual name."""
    decoder, vision = (
        next((part.name for part in parts if part.role == role), name)
        for role, name in zip(("decoder", "vision"), BOTH, strict=True)
    )
    return f"microvlm assemble --vision {output / vision} --decoder {output / decoder} -o start"
