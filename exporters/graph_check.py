"""Is a saved graph the model it was made from? Each file runs in ONNX Runtime beside the eager model, output by output.

A difference has two possible causes. Activation codes are rounded, and a value a few ulp from a .5 tie may round the
other way in another runtime, which moves everything after it by a whole code: that is no error. Anything else is one.
So where free-running outputs differ by more than the tolerance, the eager model runs again on ONNX Runtime's own codes
(`replay`): ties are gone, errors stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from microvlm.exporters import contract
from microvlm.exporters.contract import Dim, GraphSpec
from microvlm.exporters.replay import record, replay, session
from microvlm.exporters.tracing import call, example_inputs
from microvlm.model.lowering import set_traced
from microvlm.model.microvlm import MicroVLM

TOLERANCE = 1e-4
"""Largest difference allowed, times max(1, largest magnitude): 24 layers of float32 sums in another order give about
1e-5, one code gone wrong gives 1e-2."""
_SIZES: dict[Dim, int] = {contract.BATCH: 2, contract.SEQUENCE: 3, contract.PAST: 4, contract.TOTAL: 7}


@dataclass(frozen=True)
class Check:
    """The comparison of one output of one graph."""

    graph: str
    output: str
    passed: bool
    max_abs_diff: float


def check_graph(
    model: MicroVLM, spec: GraphSpec, path: Path, threads: int = 0
) -> tuple[list[Check], str | None]:
    """Compare the saved graph at `path` with the lowered `model` on seeded inputs: a Check an output, and a remark.

    `threads` is ONNX Runtime's intra-op count, 0 for its own choice. Where only rounding ties parted the two, the
    differences given are those of the replay, and the remark says how many codes and how far.
    """
    set_traced(model, False)
    inputs = example_inputs(spec, _SIZES, seed=1, vocab_size=model.config.text.vocab_size)
    feeds = {tensor.name: value.numpy() for tensor, value in zip(spec.inputs, inputs, strict=True)}
    names = [tensor.name for tensor in spec.outputs]
    with torch.no_grad():
        wanted = [tensor.numpy() for tensor in call(model, spec, inputs)]
    free = _compare(spec, session(path, threads).run(names, feeds), wanted)
    if all(check.passed for check in free):
        return free, None
    got, recording = record(path, names, feeds, threads)
    wanted, codes = replay(model, spec, inputs, recording)
    replayed = _compare(spec, got, wanted)
    worst = max(check.max_abs_diff for check in free)
    if codes.differing and codes.only_ties and all(check.passed for check in replayed):
        return replayed, (
            f"{spec.name}: {codes.differing} of {codes.codes} activation codes rounded the other way, each within "
            f"{codes.max_tie_distance:.1e} of a tie, which moved an output by {worst:.1e}; with equal codes they agree."
        )
    return free, (
        f"{spec.name}: outputs differ by up to {worst:.1e} and not by rounding ties ({codes.differing} of "
        f"{codes.codes} codes differ, by up to {codes.max_step}, at most {codes.max_tie_distance:.1e} from a tie)."
    )


def _compare(spec: GraphSpec, got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> list[Check]:
    checks = []
    for tensor, theirs, ours in zip(spec.outputs, got, wanted, strict=True):
        if ours.shape != theirs.shape:
            checks.append(Check(spec.name, tensor.name, False, float("inf")))
            continue
        difference = float(np.abs(ours - theirs).max())
        limit = TOLERANCE * max(1.0, float(np.abs(ours).max()))
        # A NaN compares false, so it fails.
        checks.append(Check(spec.name, tensor.name, difference <= limit, difference))
    return checks
