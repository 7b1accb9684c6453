"""The command `microvlm-bench`: speed, equivalence, kernels, memory, attention, training, a Pi, reports."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from microvlm.atomic import write_file
from microvlm.backends.threads import Threads
from microvlm.bench.attention.attention_command import attention
from microvlm.bench.comparison.comparison_command import compare
from microvlm.bench.gates.gate_command import gate, history
from microvlm.bench.memory.memory_bench_command import conversation, memory
from microvlm.bench.peers.peers_command import peers
from microvlm.bench.pi.pi_command import pi
from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.bench.threads_flag import number_of_threads, threads_option
from microvlm.bench.training.step_command import train
from microvlm.commands.options import WholeNumber
from microvlm.console import GATE_FAILED, echo, note, run_click
from microvlm.sources.model_source import BUNDLED_HELP, DEFAULT_MODEL
from microvlm.terminal.step_progress import counted, step, waiting
from microvlm.terminal.suggestions import BACKEND, DEVICE, MODEL

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group()
def command() -> None:
    """Measure, compare, report: prints tables; -o, --markdown, --html and --store write files.

    \b
    Example: microvlm-bench run photo --backend ort -o run.json
    """


@command.command(epilog=BUNDLED_HELP)
@click.argument("models", type=MODEL, nargs=-1)
@click.option(
    "--backend",
    "backends",
    type=BACKEND,
    multiple=True,
    help="A backend by name; may be repeated. All by default.",
)
@threads_option
@click.option("--repeats", type=WholeNumber(1), default=10, show_default=True, help="Timed rounds.")
@click.option(
    "--warmup", type=WholeNumber(0), default=2, show_default=True, help="Rounds before the clock counts."
)
@click.option("--new-tokens", type=WholeNumber(1), default=16, show_default=True, help="Tokens of a decode.")
@click.option(
    "--device", type=DEVICE, default="cpu", show_default=True, help="Of backend torch: cpu, cuda or cuda:N."
)
@report_flags
def run(
    models: tuple[str, ...],
    backends: tuple[str, ...],
    threads: Threads,
    repeats: int,
    warmup: int,
    new_tokens: int,
    device: str,
    output: ReportOutput,
) -> int:
    """Time MODELS (bundles or checkpoints): each backend in its own process, round by round.

    Several models are timed in turns, so that two precisions can be compared. On a machine without an ARM processor,
    ort-arm64 is timed on the device that MICROVLM_TARGET=ssh:USER@HOST names; without one nothing of it is timed, but
    its instructions are counted and times on a Raspberry Pi are predicted.

    \b
    Example: microvlm-bench run photo --backend ort --backend torch --repeats 20 -o run.json
    """
    from microvlm.bench.speed.speed_bench import run as measure

    models = models or (DEFAULT_MODEL,)
    count = number_of_threads(threads, models[0], (*backends, "ort")[0])
    document = measure(models, backends, count, repeats, warmup, new_tokens, device, progress=step)
    output.deliver(document)
    states = {entry["status"] for entry in document["results"]}
    if "failed" in states or not states & {"ok", "counted"}:
        note("a backend broke, or none could run: see the reasons above")
        return GATE_FAILED
    return 0


@command.command(epilog=BUNDLED_HELP)
@click.argument("model", type=MODEL, default=DEFAULT_MODEL)
@click.option("--reference", type=BACKEND, default="torch", show_default=True, help="Backend taken as right.")
@click.option("--candidate", type=BACKEND, default="ort", show_default=True, help="Backend that is checked.")
@click.option("--against", type=MODEL, help="Run the candidate on this other model: between precisions.")
@click.option(
    "--images",
    type=WholeNumber(1),
    help="Evaluation images, and as many scene questions: 60, 20 with --matrix.",
)
@click.option(
    "--episode-steps",
    type=WholeNumber(1),
    default=20,
    show_default=True,
    help="Images of the memory's episode.",
)
@threads_option
@click.option(
    "--new-tokens", type=WholeNumber(1), default=16, show_default=True, help="Most tokens of an answer."
)
@click.option(
    "--matrix",
    is_flag=True,
    help="Every backend, kernel variant and precision of MODEL against PyTorch, each in its own process.",
)
@report_flags
def equivalence(
    model: str,
    reference: str,
    candidate: str,
    against: str | None,
    images: int | None,
    episode_steps: int,
    threads: Threads,
    new_tokens: int,
    matrix: bool,
    output: ReportOutput,
) -> int:
    """Compare MODEL (a bundle or a checkpoint) on two backends. Status 1 when they are not the same model.

    A difference that disappears when both get the same int8 activations is a rounding tie: AMBIGUOUS, status 0. One
    that does not is a fault, and the layer where it starts is named.

    \b
    Example: microvlm-bench equivalence nano --matrix
    """
    count = number_of_threads(threads, model, candidate)
    if matrix:
        if against is not None or reference != "torch" or candidate != "ort":
            raise click.UsageError("--matrix chooses backends and precisions itself; leave the others out.")
        from microvlm.bench.equivalence import matrix as equivalence_matrix

        whole = equivalence_matrix.run(model, images or 20, count, progress=step)
        output.deliver(whole)
        return GATE_FAILED if whole["verdict"] == "FAIL" else 0
    from microvlm.bench.equivalence.equivalence_bench import Options
    from microvlm.bench.equivalence.equivalence_bench import run as compare_backends

    options = Options(
        model=model,
        against=against,
        reference=reference,
        candidate=candidate,
        images=60 if images is None else images,
        threads=count,
        new_tokens=new_tokens,
        episode_steps=episode_steps,
    )
    document, verdict = compare_backends(options, progress=step)
    output.deliver(document)
    note(f"{verdict.verdict}: {'; '.join(verdict.reasons)}")
    return verdict.exit_status


@command.command()
@click.option(
    "--shape", "shapes", multiple=True, help="KxN or layer; may be repeated. Those of Qwen2.5-0.5B."
)
@click.option("--batch", "batches", default="1,32,64", show_default=True, help="Tokens at once.")
@click.option("--threads", default="1,2", show_default=True, help="Threads of one operator.")
@click.option("--regime", "regimes", multiple=True, help="hot (weights in a cache) or dram. Both by default.")
@click.option(
    "--contender", "contenders", multiple=True, help="One by name; may be repeated. All by default."
)
@click.option("--seconds", default=2.0, show_default=True, help="Timed seconds of one cell, all contenders.")
@click.option("--quick", is_flag=True, help="Few rounds, no simulator: a look, not a measurement.")
@report_flags
def kernels(
    shapes: tuple[str, ...],
    batches: str,
    threads: str,
    regimes: tuple[str, ...],
    contenders: tuple[str, ...],
    seconds: float,
    quick: bool,
    output: ReportOutput,
) -> int:
    """Time the ternary operators inside ONNX Runtime against its own quantised paths, beside the streaming roofline.

    `layer` is one graph with the seven linears of a Qwen2.5-0.5B layer, each after the one it depends on. Lists may
    also be separated by commas. Status 1 when a contender broke or none could run.

    \b
    Example: microvlm-bench kernels --shape layer --batch 1 --quick
    """
    from microvlm.bench.kernels import workload
    from microvlm.bench.kernels.kernels_bench import run as measure
    from microvlm.bench.roofline import ARRAY_BYTES

    plan = workload.Plan(
        shapes=tuple(map(workload.parse_shape, workload.parse_names(shapes) or workload.DEFAULT_SHAPES)),
        batches=workload.parse_numbers("--batch", batches),
        threads=workload.parse_numbers("--threads", threads),
        regimes=workload.parse_names(regimes) or workload.REGIMES,
        seconds=min(seconds, 0.1) if quick else seconds,
        least_rounds=2 if quick else 5,
        stream_bytes=ARRAY_BYTES // 4 if quick else ARRAY_BYTES,
        simulate=not quick,
    )
    document = measure(plan, workload.parse_names(contenders), progress=step)
    output.deliver(document)
    if not document["rows"] or any(entry["status"] == "failed" for entry in document["contenders"]):
        note("a contender broke, or none could run: see the reasons above")
        return GATE_FAILED
    return 0


@command.command()
@click.option(
    "--compiler",
    default=None,
    metavar="COMMAND",
    help="Compiles C++ for aarch64, as in 'python .ci/zig_cxx.py -target aarch64-linux-gnu.2.17', which builds the "
    "wheels. aarch64-linux-gnu-g++ by default.",
)
@report_flags
def loops(compiler: str | None, output: ReportOutput) -> None:
    """Predict the kernels' inner loops on a Cortex-A53, by llvm-mca and by timings that were published of one.

    Needs a checkout, llvm-mca and the binutils for aarch64. Nothing is measured.

    \b
    Example: microvlm-bench loops -o loops.json
    """
    from microvlm.bench.loops.loop_bench import GCC
    from microvlm.bench.loops.loop_bench import run as predict

    output.deliver(predict(GCC if compiler is None else tuple(shlex.split(compiler))))


@command.command()
@click.argument("bundle", type=MODEL, required=False)
@threads_option
@click.option(
    "--rounds",
    type=WholeNumber(1),
    default=5,
    show_default=True,
    help="Timed rounds of a prefill and a decode.",
)
@click.option("--new-tokens", type=WholeNumber(1), default=16, show_default=True, help="Tokens of a decode.")
@report_flags
def full(
    bundle: str | None,
    threads: Threads,
    rounds: int,
    new_tokens: int,
    output: ReportOutput,
) -> int:
    """Time the decoder of BUNDLE at full size on ONNX Runtime: prefill of 64 tokens, decode, memory, roofline.

    Without BUNDLE: 24 layers of Qwen2.5-0.5B's shapes with random weights, made once (minutes, 6 GB) and kept.

    \b
    Example: microvlm-bench full --threads 2 -o full.json
    """
    from microvlm.backends import resolve_bundle
    from microvlm.bench.full.full_bench import run as measure
    from microvlm.bench.full.random_bundle import random_full_bundle

    folder = random_full_bundle(step) if bundle is None else resolve_bundle(bundle)
    count = number_of_threads(threads, folder, "ort")
    document = measure(folder, count, rounds, new_tokens, progress=step)
    output.deliver(document)
    if not document["full"]["finite"]:
        note("the decoder's logits are not numbers")
        return GATE_FAILED
    return 0


@command.command()
@report_flags
def sizes(output: ReportOutput) -> None:
    """Bytes on disk at full size, and what fewer tokens, layers and memory slots save (minutes, 6 GB, npm once).

    \b
    Example: microvlm-bench sizes --markdown sizes.md
    """
    from microvlm.bench.full.bundle_sizes import run as measure

    output.deliver(measure(step))


@command.command()
@click.argument("checkpoint", type=MODEL)
@click.option(
    "--data", "data", type=_FILE, multiple=True, required=True, help="Texts to measure on; may be repeated."
)
@click.option(
    "--calibrate", type=_FILE, multiple=True, help="Texts that four bits are also fitted to; may be repeated."
)
@click.option("--count", type=WholeNumber(1), default=64, show_default=True, help="Held-out texts of a file.")
@report_flags
def precisions(
    checkpoint: str, data: tuple[Path, ...], calibrate: tuple[Path, ...], count: int, output: ReportOutput
) -> None:
    """What 16, 8, 4 and 1.58 bits cost the float decoder of CHECKPOINT on texts: KL, first choices, perplexity.

    \b
    Example: microvlm-bench precisions start --data texts.jsonl --count 128
    """
    from microvlm.bench.precisions.precision_bench import run as measure

    output.deliver(measure(checkpoint, data, calibrate, count, step))


@command.command()
@click.argument("models", nargs=-1, required=True, metavar="BUNDLE...")
@click.option(
    "--native/--functions",
    default=None,
    help="Run our operators by the native library, or by their functions; by the library where there is one.",
)
@report_flags
def paths(models: tuple[str, ...], native: bool | None, output: ReportOutput) -> None:
    """The operators that ONNX Runtime runs for each product of BUNDLE: type, provider, bits, block, accuracy level.

    A session is made of every graph and run once; what it made of the graph is compared with what the file has.

    \b
    Example: microvlm-bench paths nano-1.58bit
    """
    from microvlm.bench.paths.path_bench import run as look

    output.deliver(look(models, native, note))


command.add_command(compare)
command.add_command(gate)
command.add_command(history)
command.add_command(memory)
command.add_command(conversation)
command.add_command(attention)
command.add_command(train)
command.add_command(peers)


@command.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("-o", "--output", type=_FILE, help="Write to this file instead of stdout.")
@click.option("--html", type=_FILE, help="Write one HTML page of files, or of all documents in folders.")
@click.option("--store", type=_FILE, help="With --html: show the history in this store too.")
@click.option(
    "--pages", is_flag=True, help="Render the report blocks of Markdown files, or of those in folders."
)
@click.option("--check", is_flag=True, help="With --pages: write nothing; status 1 when a block differs.")
def report(
    paths: tuple[Path, ...],
    output: Path | None,
    html: Path | None,
    store: Path | None,
    pages: bool,
    check: bool,
) -> int:
    """Show saved JSON documents (-o of other commands) as Markdown or HTML, or render tables of Markdown pages.

    A block of a page: <!-- report results/run.json section=phases --> ... <!-- end -->, the file relative to the page's
    folder.

    \b
    Example: microvlm-bench report docs/results --html report.html
    """
    from microvlm.bench.report import report_of_file

    if html is not None:
        if pages or output is not None:
            raise click.UsageError("--html writes one page; leave --pages and -o out.")
        from microvlm.bench.page.html_page import html_page

        with waiting("drawing the page"):
            write_file(html, html_page(paths, store))
        echo(str(html.absolute()))
        return 0
    if store is not None:
        raise click.UsageError("--store goes with --html.")
    if pages:
        if output is not None:
            raise click.UsageError("--pages writes the pages themselves; leave -o out.")
        return _render_pages(paths, check)
    if check:
        raise click.UsageError("--check goes with --pages.")
    text = "\n".join(report_of_file(path).markdown() for path in paths)
    if output is None:
        echo(text, end="")
    else:
        write_file(output, text)
    return 0


def _render_pages(paths: Sequence[Path], check: bool) -> int:
    from microvlm.bench import report_pages

    differences = report_pages.rewrite(report_pages.pages_in(paths), check, counted("pages rendered"))
    for difference in differences:
        note(
            str(difference) if check else f"{difference.page}:{difference.line}: rendered {difference.block}"
        )
    if differences and check:
        note(f"to render them: microvlm-bench report --pages {' '.join(map(str, paths))}")
        return GATE_FAILED
    return 0


command.add_command(pi)


def whole_command() -> click.Command:
    """The command of the console script."""
    return command


def main() -> None:
    run_click(whole_command())
