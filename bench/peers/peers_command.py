"""The command `microvlm-bench peers`."""

from __future__ import annotations

import click

from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.commands.options import WholeNumber
from microvlm.console import GATE_FAILED, note
from microvlm.terminal.step_progress import step
from microvlm.terminal.suggestions import FILE, MODEL


@click.command()
@click.argument("bundles", type=MODEL, nargs=-1, metavar="[BUNDLE]...")
@click.option(
    "--gguf",
    "ggufs",
    type=FILE,
    multiple=True,
    help="A file for llama.cpp, or Q4_0, TQ2_0 or TQ1_0 for random weights; may be repeated.",
)
@click.option("--checkpoint", "float_checkpoint", type=MODEL, help="A float checkpoint for PyTorch.")
@click.option(
    "--compiled/--no-compiled",
    default=True,
    help="Compile PyTorch's layers too, which takes minutes the first time; done by default.",
)
@click.option(
    "--threads", default="1,2", show_default=True, help="Threads, as 1,2: each number is measured by itself."
)
@click.option("--rounds", type=WholeNumber(2), default=10, show_default=True, help="Timed rounds.")
@click.option("--new-tokens", type=WholeNumber(1), default=16, show_default=True, help="Tokens of a decode.")
@report_flags
def peers(
    bundles: tuple[str, ...],
    ggufs: tuple[str, ...],
    float_checkpoint: str | None,
    compiled: bool,
    threads: str,
    rounds: int,
    new_tokens: int,
    output: ReportOutput,
) -> int:
    """Time llama.cpp, onnxruntime-genai, ONNX Runtime's own operators and PyTorch beside BUNDLE, in turns.

    Bundles of --lowering matmulnbits or qdq run on ONNX Runtime's operators, those of --genai also on
    onnxruntime-genai. Without BUNDLE: the full size with random weights, which is made once (minutes, 6 GB). A package
    that is not installed (xllamacpp, onnxruntime-genai, gguf) costs its own rows alone. Status 1 when a program broke.

    \b
    Example: microvlm-bench peers small-1.58bit small-4bit --gguf small.gguf -o peers.json
    """
    from microvlm.bench.kernels.workload import parse_numbers
    from microvlm.bench.peers.peer_turns import PeerPlan
    from microvlm.bench.peers.peers_bench import run as measure

    plan = PeerPlan(parse_numbers("--threads", threads), rounds, new_tokens)
    document = measure(bundles, ggufs, float_checkpoint, compiled, plan, step)
    output.deliver(document)
    if any(row["status"] == "failed" for row in document["rows"]):
        note("a program broke: see the reasons above")
        return GATE_FAILED
    return 0
