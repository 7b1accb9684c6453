"""Where a command's document goes: tables or JSON on stdout, Markdown and JSON to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from microvlm.cli_support import print_json


def deliver(document: dict[str, Any], as_json: bool, markdown: Path | None, output: Path | None) -> None:
    """`markdown` and `output` are the files of --markdown and -o, or None. Raises OSError."""
    from microvlm.bench import report as reports

    if as_json:
        print_json(document)
    else:
        click.echo(reports.text(document))
    if markdown is not None:
        markdown.write_text(reports.markdown(document))
    if output is not None:
        output.write_text(json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
