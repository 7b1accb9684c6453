"""`--json`, `--markdown`, `-o` and `--store`: how a command hands over its document."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from microvlm.atomic import write_file
from microvlm.console import after_saving, echo, note, print_json
from microvlm.errors import UserError

_FILE = click.Path(dir_okay=False, path_type=Path)


@dataclass(frozen=True)
class ReportOutput:
    """Output options of a document."""

    as_json: bool
    markdown: Path | None
    json_file: Path | None
    store: Path | None = None
    """Where the document is added to those of other commits."""

    def deliver(self, document: dict[str, Any]) -> None:
        """Write the files that were asked for, and print the document as tables or as JSON."""
        from microvlm.bench import report

        # Files first: a measurement of an hour is not lost with a terminal or a pipe.
        if self.markdown is not None:
            write_file(self.markdown, report.markdown(document), fallback=True)
        if self.json_file is not None:
            text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
            write_file(self.json_file, text + "\n", fallback=True)
        if self.store is not None:
            from microvlm.bench.gates.result_store import add_result

            if not add_result(self.store, document):
                note(f"{self.store} holds this document already")
        with after_saving() if self.json_file or self.markdown or self.store else nullcontext():
            if self.as_json:
                print_json(document)
            else:
                echo(report.text(document))


def report_flags(function: Callable[..., Any] | None = None, *, stored: bool = True) -> Callable[..., Any]:
    """Adds the flags to a command's function, which gets them as one argument, `output`, a ReportOutput.

    Without `stored` there is no --store: for documents that were not measured.
    """
    if function is None:
        return functools.partial(report_flags, stored=stored)

    @click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on stdout."
    )
    @click.option("--markdown", type=_FILE, help="Write the tables as Markdown to this file.")
    @click.option("-o", "--output", "json_file", type=_FILE, help="Write the JSON document to this file.")
    @functools.wraps(function)
    def with_flags(
        *args: Any,
        as_json: bool,
        markdown: Path | None,
        json_file: Path | None,
        store: Path | None = None,
        **options: Any,
    ) -> Any:
        for path in (markdown, json_file):
            if path is not None and not path.absolute().parent.is_dir():
                # Said now, and not after a measurement of an hour.
                raise UserError(f"{path} cannot be written: its folder does not exist; make it first.")
        if store is not None:
            from microvlm.bench.gates.result_store import check_store

            check_store(store)
        return function(*args, output=ReportOutput(as_json, markdown, json_file, store), **options)

    if not stored:
        return with_flags
    return click.option("--store", type=_FILE, help="Add the document to this history (JSON Lines).")(
        with_flags
    )
