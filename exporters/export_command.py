"""`microvlm-export`: export a checkpoint to a bundle that any ONNX Runtime runs."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from microvlm.commands.options import ThreadCount
from microvlm.console import GATE_FAILED, after_saving, echo, note, print_json, run_click
from microvlm.errors import UserError
from microvlm.formats.weight_format import LOWERINGS, PACKING_HELP
from microvlm.sizes.smaller import Smaller
from microvlm.sizes.smaller_flags import read_weight_format, smaller_options
from microvlm.sources.model_source import BUNDLED_HELP, DEFAULT_MODEL, find_model
from microvlm.terminal.step_progress import doing
from microvlm.terminal.suggestions import BITS, EMBEDDING_BITS, MODEL

if TYPE_CHECKING:
    from microvlm.exporters.bundle_writer import ExportReport


@click.command(epilog=BUNDLED_HELP)
@click.argument("checkpoint", type=MODEL, default=DEFAULT_MODEL)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to create; by default NAME-BITSbit, and -lN, -sN, -vN for fewer layers, slots, tokens.",
)
@click.option(
    "--bits",
    type=BITS,
    default="1.58",
    show_default=True,
    help="Width of linear weights: 32, 16, 8, 4 or 1.58.",
)
@click.option("--packing", default="2bit", show_default=True, help=PACKING_HELP)
@click.option(
    "--embedding-bits",
    type=EMBEDDING_BITS,
    default="8",
    show_default=True,
    help="Width of the token table and tied head: 16, 8 or 4.",
)
@click.option(
    "--lowering",
    type=click.Choice(LOWERINGS),
    default="custom",
    show_default=True,
    help="Operators of products: custom (ours, with functions in the graphs), ONNX Runtime's MatMulNBits, or qdq "
    "(DequantizeLinear of INT2, INT4 or INT8, and MatMul).",
)
@smaller_options
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    help="Texts (.txt, .jsonl, .jsonl.gz) to fit --bits 8 or 4 to, to choose layers and to measure costs on; for the "
    "last two by default the corpus, or the model's own answers about the package's pictures.",
)
@click.option(
    "--costs/--no-costs",
    default=True,
    help="Measure what leaving out layers, slots and tokens costs; by default it is measured.",
)
@click.option(
    "--threads",
    type=ThreadCount(zero=True, never_auto="it times a bundle, and this one is still to be made"),
    default=0,
    show_default=True,
    help="ONNX Runtime threads of the checks; 0 is one per core.",
)
@click.option(
    "--genai",
    is_flag=True,
    help="Also write a decoder of token ids, which onnxruntime-genai and optimum's ORTModelForCausalLM run.",
)
@click.option("--force", is_flag=True, help="Replace a bundle that is there, once the new one is right.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on stdout.")
def command(
    checkpoint: str,
    output: Path | None,
    bits: str,
    packing: str,
    embedding_bits: str,
    lowering: str,
    smaller: Smaller,
    calibrate: Path | None,
    costs: bool,
    threads: int,
    genai: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Export CHECKPOINT (a folder, a hub id or a bundled name) to a folder of ONNX graphs with everything they need.

    Each graph is compared with PyTorch after it was saved. Status 1 and no folder when one differs.

    \b
    Example: microvlm-export photo --bits 1.58 -o photo-1.58bit
    """
    # Bad flags are refused before PyTorch is imported, which takes seconds.
    weights = dataclasses.replace(read_weight_format(bits, packing, embedding_bits), lowering=lowering)
    if genai and lowering != "custom":
        raise UserError("--genai is for --lowering custom; leave one of the two out.")
    smaller = dataclasses.replace(smaller, calibrate=calibrate, costs=costs)
    source = find_model(checkpoint, "checkpoint")
    from microvlm.exporters.bundle_writer import CheckFailed, export

    name = Path(os.path.abspath(source.given)).name
    kind = "" if lowering == "custom" else f"-{lowering}"
    target = output or Path(f"{name}-{weights.bits:g}bit{kind}{smaller.suffix}")
    # A terminated export cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        report = export(
            source.folder,
            target,
            weights,
            smaller=smaller,
            force=force,
            genai=genai,
            threads=threads,
            log=note,
            doing=doing,
        )
    except CheckFailed as failure:
        _show(failure.report, as_json)
        note("Error: a graph is not the model it was made from (crosses above); no bundle was kept.")
        return GATE_FAILED
    with after_saving():
        _show(report, as_json)
    return 0


def _show(report: ExportReport, as_json: bool) -> None:
    """Print the report as JSON, or the comparison of each output and the sizes for people."""
    if as_json:
        print_json(report.to_json())
        return
    width = max(len(check.output) for check in report.checks)
    for check in report.checks:
        mark = "✓" if check.passed else "✗"
        echo(f"{mark} {check.graph:<22} {check.output:<{width}}  largest difference {check.max_abs_diff:.1e}")
    for cut in report.cuts:
        echo(cut.sentence())
    if report.total_bytes:
        bits = ", ".join(f"{group} {value:.2f}" for group, value in report.bits_per_weight.items() if value)
        size = f"\n{report.bundle}: {report.total_bytes / 1e6:.1f} MB"
        if report.products:
            echo(f"{size}, products by other operators than ours")
            for product, count in report.products.items():
                echo(f"{count} x {product}")
            return
        echo(f"{size}, {report.ternary_nodes} ternary operators")
        echo(f"bits per weight on disk: {bits}")


def whole_command() -> click.Command:
    """The command of the console script."""
    return command


def main() -> None:
    run_click(whole_command())
