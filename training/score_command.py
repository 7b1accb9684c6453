"""`microvlm-score`: a checkpoint or bundle scored on the test vendor's drawings, beside its baselines and a control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from microvlm.console import note, print_json, run_click


@click.command()
@click.argument("model", default="nano")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Folder that `microvlm-data emoji` wrote."
)
@click.option(
    "--against", default=None, help="A second checkpoint: the paired difference, this one minus that one."
)
@click.option("--backend", default="torch", show_default=True, help="Backend that runs the model.")
@click.option("--baselines/--no-baselines", default=True, help="Also score nearest class means (minutes).")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=None, help="Write the document here too."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: str,
    data: Path,
    against: str | None,
    backend: str,
    baselines: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Score MODEL: captions of the fixed test emoji, scene questions on held-out pairs, episodes."""
    from microvlm.training.data.baselines import run_baselines
    from microvlm.training.data.emoji import load_emoji
    from microvlm.training.evaluate import paired_difference, score_model

    emoji = load_emoji(data)
    document: dict[str, Any] = {"model": model, **score_model(model, emoji, backend, note)}
    if against is not None:
        other = score_model(against, emoji, backend, note)
        difference = paired_difference(document["captions"]["correct"], other["captions"]["correct"])
        document["against"] = {"model": against, **other, "caption_difference": difference}
    if baselines:
        document["baselines"] = run_baselines(emoji)
    if output is not None:
        aside = output.with_name(output.name + ".tmp")
        aside.write_text(json.dumps(document) + "\n")
        aside.replace(output)
    if as_json:
        print_json(document)
    else:
        for line in table(document):
            click.echo(line)


def table(document: dict[str, Any]) -> list[str]:
    """The document for a reader."""
    lines = [
        f"captions, test vendor     {document['captions']['exact_match']:.3f} of {document['captions']['count']}"
    ]
    lines.append(f"captions, stress vendor   {document['captions_stress']['exact_match']:.3f}")
    for kind, row in document["scenes"].items():
        twins = f"  both twins {row['twins']:.3f}" if "twins" in row else ""
        lines.append(f"{kind:24}  {row['accuracy']:.3f}  majority {row['majority']:.3f}{twins}")
    for distance, row in document["episodes"].items():
        lines.append(
            f"episode of {distance:>2}             {row['accuracy']:.3f}  memory off {row['memory_off']:.3f}"
        )
    if "against" in document:
        pair = document["against"]["caption_difference"]
        lines.append(
            f"minus {document['against']['model']}: {pair['difference']:+.3f} "
            f"[{pair['ci95_low']:+.3f}, {pair['ci95_high']:+.3f}]"
        )
    if "baselines" in document:
        for name in ("pixels_24", "efficientnet_lite0"):
            lines.append(f"nearest class mean, {name}: " + json.dumps(document["baselines"][name]))
    return lines


def main() -> None:
    run_click(command)
