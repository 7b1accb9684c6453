"""`microvlm-data examples`: photographs to start with, for people without pictures of their own and for CI."""

from __future__ import annotations

from pathlib import Path

import click

from microvlm.console import after_saving, echo, note, print_json
from microvlm.terminal.step_progress import step


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--packages", type=click.Path(path_type=Path, exists=True), help="A folder with downloaded packages."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def examples(output: Path, packages: Path | None, as_json: bool) -> None:
    """Write some 230 captioned photographs under free licences, out of scikit-image and Debian's GCompris.

    pip and apt-get download the packages; nothing is installed. LICENCES names every picture's author and terms.

    \b
    Example: microvlm-data examples -o photographs
    """
    from microvlm.training.data.examples.photographs import write_examples

    step("downloading packages and copying their photographs")
    result = write_examples(output, packages)
    with after_saving():
        for package, reason in result.missing.items():
            note(f"no photographs of {package}: {reason}")
        if as_json:
            print_json({"output": str(output), "written": result.written, "missing": result.missing})
            return
        for package, count in result.written.items():
            echo(f"{package:24s}{count:6d} photographs")
        echo(f"{output}/LICENCES names each one's author and terms.")
        echo(f"Next: microvlm-data images {output}/captions.jsonl -o DATA")
