"""Instructions of one token by ONNX Runtime's own paths, counted like ours: Qwen2.5-0.5B's size, 50k vocabulary.

    instructions of a token = 24 x those of a layer's seven linears + those of the output head + the rest

Both graphs run whole on the emulated CPU, with random weights. The rest (attention, norms, embedding, Python) is
the same for all contenders: our full-size graph's count outside the native library, from the committed baseline. A
peer's head is stored as its linears are; ours in four bits.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from microvlm.backends.emulation import EmulatedMachine
from microvlm.bench.kernels.contender_formats import Format, NBits, Operands
from microvlm.bench.kernels.contenders import OURS, PEERS, Contender
from microvlm.bench.kernels.kernel_graphs import random_operands, write_graph
from microvlm.bench.kernels.workload import LAYER, Linear, Shape, parse_shape
from microvlm.bench.pi import count_baseline
from microvlm.bench.pi.counting.counting_emulator import count
from microvlm.bench.stats import median
from microvlm.errors import UserError
from microvlm.formats.documents import Count
from microvlm.formats.op_table import DOMAIN, INT4_MATMUL

if TYPE_CHECKING:
    import onnx

LAYERS = 24
WIDTH = 896
VOCABULARY = 50_000
REST_OF = "full"
"""The baseline whose decode gives the rest."""


class CountedGraphs(msgspec.Struct, frozen=True):
    """What `counted_graphs` prints: the regions in which the layer and the head ran."""

    regions: tuple[list[Count], list[Count]]


@dataclass(frozen=True)
class Int4(Format):
    """Our output head: `Int4MatMul`, groups of 32."""

    tolerance: float = 0.0

    def operands(self, rng: np.random.Generator, k: int, n: int) -> Operands:
        packed = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
        packed |= np.where(packed & 15 == 0, 1, 0).astype(np.uint8)
        packed |= np.where(packed >> 4 == 0, 16, 0).astype(np.uint8)
        return packed, np.ones((n, k // 32), np.uint8), np.full(n, 1e-3, np.float32)

    def node(self, x: str, operands: list[str], y: str, k: int, n: int) -> onnx.NodeProto:
        from onnx import helper

        return helper.make_node(INT4_MATMUL.name, [x, *operands], [y], domain=DOMAIN)

    def product(self, x: np.ndarray, operands: Operands, n: int) -> np.ndarray:
        return INT4_MATMUL.reference(x, *operands)


@dataclass(frozen=True)
class Int8Dynamic(Format):
    """ONNX Runtime's int8 path for dense weights: activations quantised at each call, `DynamicQuantizeMatMul`."""

    tolerance: float = 0.03

    def operands(self, rng: np.random.Generator, k: int, n: int) -> Operands:
        weights = rng.integers(-127, 128, (k, n), dtype=np.int8)
        return weights, np.array([1 / (73 * np.sqrt(k))], np.float32)

    def node(self, x: str, operands: list[str], y: str, k: int, n: int) -> onnx.NodeProto:
        from onnx import helper

        return helper.make_node("DynamicQuantizeMatMul", [x, *operands], [y], domain="com.microsoft")

    def product(self, x: np.ndarray, operands: Operands, n: int) -> np.ndarray:
        return x @ (operands[0].astype(np.float32) * operands[1])


CONTENDERS = (
    *OURS,
    *(peer for peer in PEERS if peer.name in ("ort-2bit-b128", "ort-4bit-b32", "ort-4bit-b128", "ort-fp32")),
    Contender("ort-8bit-b128", NBits(8, 128)),
    Contender("ort-int8", Int8Dynamic()),
)
BARS = (("ours-2bit", "ort-4bit", 6.0), ("ours-2bit", "ort-2bit", 50.0), ("ours-base3", "ort-4bit", 4.5))
"""(ours, the best peer whose name begins so, how many times fewer instructions)."""


def count_peers(
    machine: EmulatedMachine, cpu: str, progress: Callable[[str], None], folder: Path = count_baseline.FOLDER
) -> list[dict[str, Any]]:
    """`contender`, `instructions_per_token`, `weight_bytes_per_token`, and what they are made of. Raises UserError."""
    rest = rest_instructions(cpu, folder)
    rows = []
    for contender in CONTENDERS:
        progress(f"counting {contender.name}")
        with tempfile.TemporaryDirectory() as name:
            layer, head, weights = _count(machine, contender, Path(name))
        rows.append(
            {
                "contender": contender.name,
                "instructions_per_token": LAYERS * layer + head + rest,
                "weight_bytes_per_token": weights,
                "layer_instructions": layer,
                "head_instructions": head,
                "rest_instructions": rest,
            }
        )
    return rows


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios of instructions: the best of a peer's variants over ours."""
    tokens = {row["contender"]: row["instructions_per_token"] for row in rows}
    table = []
    for ours, peer, least in BARS:
        best = min(figure for name, figure in tokens.items() if name.startswith(peer))
        times = best / tokens[ours]
        table.append(
            {
                "name": f"{ours} against {peer}",
                "value": round(times, 2),
                "at_least": least,
                "met": times >= least,
            }
        )
    return table


def rest_instructions(cpu: str, folder: Path = count_baseline.FOLDER) -> int:
    """Instructions of a full-size token outside the native library. Raises UserError without the baseline."""
    path = count_baseline.path_of(REST_OF, cpu, folder)
    baseline = count_baseline.load(path)
    remedy = f"microvlm-bench pi full --target emulated:{cpu} --update-baseline"
    if baseline is None:
        raise UserError(f"{path} is missing: {remedy}.")
    if "decode" not in baseline.phases:
        raise UserError(f"{path} has no counts of 'decode': {remedy}.")
    return baseline.phases["decode"].others


def _count(machine: EmulatedMachine, contender: Contender, folder: Path) -> tuple[int, int, int]:
    """(instructions of a layer, of the head, bytes of a token's weights)."""
    head_shape = Shape("head", (Linear("y", "x", WIDTH, VOCABULARY),))
    graphs = []
    for shape, form in (
        (parse_shape(LAYER), contender.format),
        (head_shape, Int4() if contender.native else contender.format),
    ):
        graphs.append(
            write_graph(folder / f"{shape.name}.onnx", form, shape, random_operands(form, shape), 1)
        )
    request = {
        "graphs": [str(graph.path) for graph in graphs],
        "width": WIDTH,
        "native": contender.native,
        "entries": contender.session_entries,
    }
    arguments = ["-m", "microvlm.bench.pi.counting.counted_graphs", json.dumps(request)]
    answer, regions = count(machine, arguments, CountedGraphs)
    counts = [[regions[number].total for number in graph if number in regions] for graph in answer.regions]
    if not all(counts):
        raise UserError(f"the emulated {machine.cpu} printed no counts of {contender.name}: run it again.")
    layer, head = (round(median(totals)) for totals in counts)
    return layer, head, LAYERS * graphs[0].weight_bytes + graphs[1].weight_bytes
