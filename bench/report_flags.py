"""How every command hands over its document: on stdout as text or JSON, in a file as JSON or Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from microvlm.console import print_json
from microvlm.errors import UserError


def deliver(document: dict[str, Any], as_json: bool, markdown: Path | None, output: Path | None) -> None:
    from microvlm.bench import report as reports

    if as_json:
        print_json(document)
    else:
        click.echo(reports.text(document))
    if markdown is not None:
        markdown.write_text(reports.markdown(document))
    if output is not None:
        output.write_text(json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_report(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: save a report with -o first.") from None
    except ValueError:
        raise UserError(f"{path} is not JSON: give a file that -o wrote.") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is no report of microvlm-bench.")
    return document
