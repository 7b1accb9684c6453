"""Executes the plan: writes weights, opens sessions, checks their products, then times each cell.

A contender that cannot load or multiplies wrongly is reported with its reason; the others go on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from microvlm.bench.kernels import kernel_graphs
from microvlm.bench.kernels.contender_formats import Operands
from microvlm.bench.kernels.contenders import Contender
from microvlm.bench.kernels.product_check import expected, relative_error
from microvlm.bench.kernels.sessions import Libraries, Runner, Setting, settings_for
from microvlm.bench.kernels.timing import HOPELESS, Cell, time_cell
from microvlm.bench.kernels.workload import REGIMES, Plan, Shape, batches_by_graphs, copies_and_graphs
from microvlm.bench.roofline import StreamingRoofline

Progress = Callable[[str], None]


@dataclass(frozen=True)
class State:
    """`ok`, or `failed` for a reason."""

    status: str = "ok"
    reason: str | None = None


@dataclass(frozen=True)
class _Material:
    """A contender's weights of one shape, in memory and as the graphs of one regime and group of batches."""

    operands: tuple[Operands, ...]
    graphs: list[kernel_graphs.ShapeGraph]


class Measurement:
    """`cells()` measures everything; `states` holds the status of each contender by name."""

    def __init__(
        self,
        plan: Plan,
        contenders: Sequence[Contender],
        library: Path | None,
        rooflines: Sequence[StreamingRoofline],
        progress: Progress = lambda _: None,
    ):
        self.states = {contender.name: State() for contender in contenders}
        self._plan, self._contenders, self._library = plan, contenders, library
        self._rooflines, self._progress = rooflines, progress
        # Where prepacking was found to be indispensable: (contender, threads).
        self._must_prepack: set[tuple[str, int]] = set()

    def cells(self) -> Iterator[Cell]:
        with tempfile.TemporaryDirectory(prefix="microvlm-kernels-") as folder:
            libraries = Libraries(self._library, Path(folder))
            # Hot first, whatever the order asked for: see `_settings`.
            for shape, regime in product(self._plan.shapes, sorted(self._plan.regimes, key=REGIMES.index)):
                for batches in batches_by_graphs(self._plan.batches, regime):
                    with tempfile.TemporaryDirectory(dir=folder) as files:
                        materials = {
                            contender.name: _write(contender, shape, regime, max(batches), Path(files))
                            for contender in self._running(regime)
                        }
                        yield from self._by_threads(shape, regime, batches, materials, libraries)

    def _by_threads(
        self,
        shape: Shape,
        regime: str,
        batches: Sequence[int],
        materials: dict[str, _Material],
        libraries: Libraries,
    ) -> Iterator[Cell]:
        for threads in self._plan.threads:
            tokens = ", ".join(map(str, batches))
            self._progress(f"{shape.name}, {regime}, batch {tokens}, {threads} thread{'s' * (threads > 1)}")
            runners = self._runners(shape, regime, threads, materials, libraries)
            for batch in batches:
                yield self._timed(shape, regime, threads, batch, runners)

    def _timed(self, shape: Shape, regime: str, threads: int, batch: int, runners: list[Runner]) -> Cell:
        for roofline in self._rooflines:
            roofline.sample(threads)
        cell = time_cell(shape, regime, threads, batch, runners, self._plan)
        for timing in cell.timings:
            best = cell.best(timing.contender.name)
            if not timing.setting.prepacking and best and timing.median_ms > HOPELESS * best.median_ms:
                self._must_prepack.add((timing.contender.name, threads))
        return cell

    def _running(self, regime: str) -> list[Contender]:
        return [
            contender
            for contender in self._contenders
            if contender.takes_part(regime) and self.states[contender.name].status == "ok"
        ]

    def _runners(
        self, shape: Shape, regime: str, threads: int, materials: dict[str, _Material], libraries: Libraries
    ) -> list[Runner]:
        """One runner for each contender and setting. One that cannot load or is wrong is left out from then on."""
        runners = []
        for contender in self._running(regime):
            material = materials[contender.name]
            try:
                opened = [
                    Runner(contender, setting, threads, material.graphs, libraries)
                    for setting in self._settings(contender, regime, threads)
                ]
            except Exception as error:  # pybind kinds without a common base of their own, and UserError
                self.states[contender.name] = State("failed", str(error).strip().split("\n")[0])
                continue
            problem = _problem(contender, shape, material.operands, opened)
            if problem:
                self.states[contender.name] = State("failed", problem)
            else:
                runners += opened
        return runners

    def _settings(self, contender: Contender, regime: str, threads: int) -> list[Setting]:
        """Without prepacking, 160 MB may take minutes at each call: the hot cells find out first."""
        settled = (contender.name, threads) in self._must_prepack
        unknown = regime == "dram" and "hot" not in self._plan.regimes
        every = settings_for(threads, contender.is_peer)
        return [setting for setting in every if setting.prepacking or not (settled or unknown)]


def _write(contender: Contender, shape: Shape, regime: str, largest_batch: int, folder: Path) -> _Material:
    operands = kernel_graphs.random_operands(contender.format, shape)
    each = kernel_graphs.bytes_of(operands)
    copies, count = (1, 1) if contender.is_slow else copies_and_graphs(each, regime, largest_batch)
    stem = contender.name.replace(":", "-")
    weight_copies = [
        kernel_graphs.write_graph(folder / f"{stem}-{number}.onnx", contender.format, shape, operands, copies)
        for number in range(count)
    ]
    return _Material(operands, weight_copies)


def _problem(
    contender: Contender, shape: Shape, operands: tuple[Operands, ...], runners: Sequence[Runner]
) -> str | None:
    """Checks a contender's product of two tokens at every setting; returns the first error as a sentence, or None."""
    x = np.random.default_rng(1).standard_normal((2, shape.inputs), np.float32)
    last = kernel_graphs.copy_of(operands, runners[0].copies - 1)
    reference = expected(contender.format, shape, last, x)
    for runner in runners:
        runner.bind(x)
        for _ in range(runner.graph_count):  # each, so that no clock sees the first touch of its weights
            runner.run()
        error = relative_error(runner.result(), reference)
        # A NaN compares false, so it fails.
        if not error <= contender.format.tolerance:
            return f"its product of {shape.name} is off by {error:.1e} of its norm ({runner.setting})"
    return None
