"""The commands `microvlm-bench memory` and `microvlm-bench conversation`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from microvlm.backends.threads import Threads
from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.bench.threads_flag import number_of_threads, threads_option
from microvlm.commands.options import WholeNumber
from microvlm.console import GATE_FAILED, after_saving, echo, note, print_json
from microvlm.errors import UserError
from microvlm.sources.model_source import BUNDLED_HELP, DEFAULT_MODEL
from microvlm.terminal.step_progress import step
from microvlm.terminal.suggestions import BACKEND, MODEL


@click.command(epilog=BUNDLED_HELP)
@click.argument("models", type=MODEL, nargs=-1)
@click.option(
    "--backend",
    "backends",
    type=BACKEND,
    multiple=True,
    default=("ort",),
    show_default=True,
    help="Backend that remembers; may be repeated, or a list with commas.",
)
@threads_option
@click.option(
    "--facts",
    type=WholeNumber(0),
    default=0,
    help="Most facts written at once; four times the slots by default.",
)
@click.option(
    "--edits", type=WholeNumber(0), default=1000, show_default=True, help="Edits one after the other."
)
@click.option("--repeats", type=WholeNumber(1), default=20, show_default=True, help="Timed rounds.")
@click.option(
    "--seed", type=WholeNumber(0, 2**128), default=0, show_default=True, help="Of names, objects and views."
)
@click.option(
    "--costs", is_flag=True, help="Time and count only; an untrained model will do, also MODEL 'full'."
)
@click.option(
    "--tune",
    type=WholeNumber(0),
    help="Facts also trained into the decoder, to compare; 5 where torch is, 0 for none.",
)
@click.option(
    "--fit-pointing",
    type=click.Path(file_okay=False, path_type=Path),
    help="Fit the confidence of this checkpoint's readings and write it into its config.json; measures nothing else.",
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    help="With --fit-pointing: fit on the pictures of this folder, not on the evaluation set's.",
)
@click.option(
    "--concepts",
    type=WholeNumber(1),
    multiple=True,
    help="Also tell so many named concepts from strangers; may be repeated: 10, 64, 256.",
)
@click.option(
    "--concept-pictures",
    type=click.Path(path_type=Path),
    help="Folder with a sub-folder of pictures for each concept, in place of the package's drawings.",
)
@click.option(
    "--stream",
    type=WholeNumber(0),
    default=0,
    help="Also write so many facts one after another, and forget some: 10000 takes minutes.",
)
@click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    help="Draw recall, addressing, slot use and ROC as SVG into this folder.",
)
@report_flags
def memory(
    models: tuple[str, ...],
    backends: tuple[str, ...],
    threads: Threads,
    facts: int,
    edits: int,
    repeats: int,
    seed: int,
    costs: bool,
    tune: int | None,
    fit_pointing: Path | None,
    pictures: Path | None,
    concepts: tuple[int, ...],
    concept_pictures: Path | None,
    stream: int,
    plots: Path | None,
    output: ReportOutput,
) -> None:
    """Measure the memory of MODELS (bundles or checkpoints): recall, edits, forgetting, scope and costs.

    Several models or backends are put side by side. '--costs full' times a full-size model with random weights, which
    is made once (minutes, 6 GB) and kept.

    \b
    Example: microvlm-bench memory nano --facts 64 --plots curves
    """
    from microvlm.bench.memory.memory_bench import Options, run_each
    from microvlm.bench.memory.memory_plots import write_plots

    if fit_pointing is not None:
        if models:
            raise UserError("--fit-pointing names the model itself; leave the others out.")
        _fit_pointing(fit_pointing, backends[0], threads, seed, pictures, output.as_json)
        return
    if pictures is not None:
        raise UserError("--pictures is for --fit-pointing; give both.")
    names = [name.strip() for part in backends for name in part.split(",") if name.strip()]
    models = models or (DEFAULT_MODEL,)
    options = Options(
        threads=number_of_threads(threads, models[0], (*names, "ort")[0]),
        facts=facts,
        edits=edits,
        repeats=repeats,
        seed=seed,
        costs=costs,
        tune=tune,
        concepts=concepts,
        concept_pictures=concept_pictures,
        stream=stream,
    )
    document = run_each(models, list(dict.fromkeys(names)), options, progress=step)
    output.deliver(document)
    if plots is not None:
        for path in write_plots(document, plots):
            note(f"drew {path}")


def _fit_pointing(
    checkpoint: Path, backend: str, threads: Threads, seed: int, pictures: Path | None, as_json: bool
) -> None:
    from microvlm.backends import load
    from microvlm.bench.memory.model_under_test import ModelUnderTest
    from microvlm.bench.memory.open_values.pointing_fit import check_writable, fit_pointing, write_pointing
    from microvlm.inputs.processor import Processor

    check_writable(checkpoint)
    if pictures is not None and not pictures.is_dir():
        raise UserError(f"{pictures} is no folder; give one of pictures.")
    runtime = load(backend, checkpoint, threads)
    model = ModelUnderTest(runtime, Processor.from_pretrained(runtime.directory))
    fit = fit_pointing(model, seed, pictures, step)
    write_pointing(checkpoint, fit["pointing"])
    with after_saving():
        if as_json:
            print_json({**fit, "pointing": asdict(fit["pointing"])})
            return
        pointing = fit["pointing"]
        echo(
            f"thresholds: same picture {pointing.same_picture.threshold:.2f}, same question "
            f"{pointing.same_question.threshold:.2f}, without a picture {pointing.threshold:.2f}; "
            f"calibration error {fit['calibration_error']:.3f}"
        )
        for row in fit["kinds"]:
            echo(
                f"{row['kind']}: right {row['right']:.3f}, wrong {row['wrong']:.3f} of {row['questions']} questions"
            )


@click.command(epilog=BUNDLED_HELP)
@click.argument("model", type=MODEL, default=DEFAULT_MODEL)
@click.option("--backend", type=BACKEND, default="ort", show_default=True, help="Backend that remembers.")
@click.option(
    "--turns", type=WholeNumber(1), default=10_000, show_default=True, help="Turns of the conversation."
)
@threads_option
@report_flags
def conversation(model: str, backend: str, turns: int, threads: Threads, output: ReportOutput) -> int:
    """Talk with MODEL (a bundle or a checkpoint) for many turns, its memory in a file: memory, bytes and time.

    Status 1 when the process grows by more than its facts, a turn's bytes grow, or the first picture is forgotten.

    \b
    Example: microvlm-bench conversation nano --turns 500
    """
    from microvlm.bench.conversation.conversation_bench import run

    count = number_of_threads(threads, model, backend)
    document = run(model, backend, turns, count, progress=step)
    output.deliver(document)
    return 0 if all(bar["met"] for bar in document["bars"]) else GATE_FAILED
