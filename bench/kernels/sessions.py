"""A contender ready to run: its sessions at one number of threads and one setting, inputs and outputs bound once.

A run is one call to ONNX Runtime with memory that is already there; quantising the activations is part of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.bench.kernels.contenders import Contender
from microvlm.bench.kernels.kernel_graphs import ShapeGraph
from microvlm.bench.temporary_environment import environment
from microvlm.errors import UserError

VARIANT_VARIABLE = "MICROVLM_KERNELS"
SPIN_US = 2000
"""Microseconds that an idle thread polls. ONNX Runtime's own choice is tens of milliseconds, in which it would take a
core from the next contender; this is as fast while runs follow one another, and over after SPIN_PAUSE_S."""
SHORT_SPIN_US = 100
"""The same where sessions run in turn: each has threads of its own, and those of the last one would poll through most
of the next one's run, on a core that it needs. Longer than what lies between two nodes or two runs."""
SPIN_PAUSE_S = 0.005


@dataclass(frozen=True)
class Setting:
    """Options of ONNX Runtime that change speed."""

    spinning: bool = False
    """Idle threads poll for work. Means nothing on one thread."""
    prepacking: bool = True

    def __str__(self) -> str:
        parts = ["spinning" if self.spinning else "no spinning"]
        return ", ".join(parts if self.prepacking else [*parts, "no prepacking"])


def settings_for(threads: int, is_peer: bool) -> tuple[Setting, ...]:
    """Every setting worth trying: our operators prepack nothing, and one thread has nobody to wait for."""
    spins = (False, True) if threads > 1 else (False,)
    settings = tuple(Setting(spinning=spin) for spin in spins)
    return (*settings, Setting(spinning=spins[-1], prepacking=False)) if is_peer else settings


class Libraries:
    """The native library once for each forced variant.

    The variant is chosen when a library loads, once for a process; a copy of the file under another name is another
    library, so that variants can be measured in turns in one process.
    """

    def __init__(self, library: Path | None, folder: Path):
        self._library, self._folder = library, folder

    def register(self, options: Any, variant: str | None) -> None:
        """Raises UserError when there is no library."""
        if self._library is None:
            raise UserError("the native library is not there: install the package where a C++ compiler is.")
        if variant is None:
            options.register_custom_ops_library(str(self._library))
            return
        copy = self._folder / f"{variant}-{self._library.name}"
        if not copy.is_file():
            shutil.copyfile(self._library, copy)
        with environment(VARIANT_VARIABLE, variant):
            options.register_custom_ops_library(str(copy))


class Runner:
    """Sessions over the graphs of one shape; each call of `run` takes the next graph in turn."""

    def __init__(
        self,
        contender: Contender,
        setting: Setting,
        threads: int,
        graphs: Sequence[ShapeGraph],
        libraries: Libraries,
    ):
        self.contender, self.setting, self.threads = contender, setting, threads
        self.weight_bytes, self.copies = graphs[0].weight_bytes, graphs[0].copies
        self._graphs = graphs
        self._sessions = [self._open(graph, libraries) for graph in graphs]
        self._bindings: list[Any] = []
        self._results: dict[int, Any] = {}
        self._last_result: Any = None
        self._turn = 0

    def bind(self, x: np.ndarray) -> None:
        """Use float32 x [M, K] from now on, and memory for its results."""
        import onnxruntime

        value = onnxruntime.OrtValue.ortvalue_from_numpy(x)

        def memory(width: int) -> Any:
            return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((len(x), width), np.float32))

        self._results = {width: memory(width) for width in {width for _, width in self._graphs[0].outputs}}
        self._last_result = memory(self._graphs[0].outputs[-1][1])
        self._bindings = [
            self._bound(*pair, value) for pair in zip(self._sessions, self._graphs, strict=True)
        ]

    @property
    def graph_count(self) -> int:
        return len(self._graphs)

    def run(self) -> None:
        turn = self._turn
        self._turn = (turn + 1) % len(self._sessions)
        self._sessions[turn].run_with_iobinding(self._bindings[turn])

    def result(self) -> np.ndarray:
        """The last output of a graph after the last run, float32 [M, N]."""
        return self._last_result.numpy()

    def _bound(self, session: Any, graph: ShapeGraph, x: Any) -> Any:
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x)
        for name, width in graph.outputs:
            # ONNX Runtime chooses the order of the copies, so the one that is looked at has memory of its own.
            result = self._last_result if name == graph.outputs[-1][0] else self._results[width]
            binding.bind_output(name, "cpu", 0, np.float32, result.shape(), result.data_ptr())
        return binding

    def _open(self, graph: ShapeGraph, libraries: Libraries) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        entries = {
            "session.intra_op.allow_spinning": str(int(self.setting.spinning)),
            "session.intra_op.spin_duration_us": str(SPIN_US if self.graph_count == 1 else SHORT_SPIN_US),
            "session.disable_prepacking": str(int(not self.setting.prepacking)),
            **self.contender.session_entries,
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if self.contender.native:
            libraries.register(options, self.contender.variant)
        return onnxruntime.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
