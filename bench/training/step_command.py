"""`microvlm-bench train`."""

from __future__ import annotations

import re
from pathlib import Path

import click

from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.bench.training.step_variants import VARIANTS
from microvlm.commands.options import ITS_FLOATS, ThreadCount, WholeNumber
from microvlm.console import GATE_FAILED, note
from microvlm.errors import UserError
from microvlm.terminal.step_progress import step
from microvlm.terminal.suggestions import DEVICE, PRESET

DEFAULT = "small"
_DEVICE = re.compile(r"cpu|cuda(:\d{1,2})?")


@click.command("train")
@click.argument("model", type=PRESET, default=DEFAULT)
@click.option("--data", type=click.Path(path_type=Path), help="A data folder. By default pictures are drawn.")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=click.Choice(list(VARIANTS)),
    help="A way to train; may be repeated. All by default.",
)
@click.option(
    "--tokens", type=WholeNumber(1), default=512, show_default=True, help="Tokens of a step, at least."
)
@click.option("--batch-size", type=WholeNumber(2, 65_536), help="Samples of a step, in place of --tokens.")
@click.option("--device", type=DEVICE, default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option(
    "--threads", type=ThreadCount(never_auto=ITS_FLOATS), help="CPU threads of each variant's process."
)
@click.option("--repeats", type=WholeNumber(1), default=10, show_default=True, help="Timed steps.")
@click.option(
    "--warmup", type=WholeNumber(0), default=1, show_default=True, help="Steps before the clock counts."
)
@click.option(
    "--seed", type=WholeNumber(0, 500_000_000), default=0, show_default=True, help="Of the batches."
)
@report_flags
def train(
    model: str,
    data: Path | None,
    variants: tuple[str, ...],
    tokens: int,
    batch_size: int | None,
    device: str,
    threads: int | None,
    repeats: int,
    warmup: int,
    seed: int,
    output: ReportOutput,
) -> int:
    """Time training steps of MODEL phase by phase, and count their memory: float32, bfloat16 and ternary, in turns.

    MODEL is a preset (small: SmolLM2-135M's shapes), or a checkpoint; its weights are drawn. Status 1 when a variant
    broke, or ternary training is slower than demanded.

    \b
    Example: microvlm-bench train nano --repeats 20
    """
    from microvlm.bench.training.step_bench import StepPlan, run

    if _DEVICE.fullmatch(device) is None:
        raise UserError(f"--device is '{device}': give cpu, cuda or cuda:N.")
    if data is not None and not data.exists():
        raise UserError(f"{data} does not exist; make it with microvlm-data images SOURCE -o {data}.")
    plan = StepPlan(
        model=model,
        data=None if data is None else str(data.absolute()),
        variants=tuple(dict.fromkeys(variants)) or tuple(VARIANTS),
        tokens=tokens,
        batch_size=batch_size,
        device=device,
        threads=threads,
        warmup=warmup,
        repeats=repeats,
        seed=seed,
    )
    document = run(plan, progress=step)
    output.deliver(document)
    broken = [entry for entry in document["variants"] if entry["status"] == "failed"]
    for entry in broken:
        note(f"{entry['name']} broke: {entry['reason']}")
    missed = [bar for bar in document["bars"] if bar["met"] is False and "wall" in bar["name"]]
    for bar in missed:
        note(f"{bar['name']}: {bar['value']:.3f}, demanded {bar['at_least']}")
    return GATE_FAILED if broken or missed else 0
