"""The workload of `microvlm-bench kernels`: shapes, batches, threads and regimes, checked as the user typed them.

`hot`: matrices that together take at most HOT_BYTES, so that they stay in a cache; several where they are small,
       because the cost of a call should not hide the operator's. A larger one is alone: see a row's `run_bytes`.
`dram`: DRAM_BYTES or more, which no cache holds: in one graph, as a model's step reads its weights one layer after
       another, with a session's threads at work all the while. Where that would be more than MOST_COPIES of a small
       shape, and with more than FEW_TOKENS tokens, of which such a run would take up to a second and reading is the
       least: several graphs run in turn, and before one is read again, all the others were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from microvlm.backends.threads import check_threads
from microvlm.bench.roofline import ARRAY_BYTES
from microvlm.errors import UserError

REGIMES = ("hot", "dram")
HOT_BYTES = 8_000_000
HOT_MOST_COPIES = 8
DRAM_BYTES = 168_000_000
GRAPH_BYTES = 21_000_000
FEW_TOKENS = 8
MOST_COPIES = 1280
"""Most copies in one graph: with more, ONNX Runtime takes longer for each node and far longer to open a session."""
LAYER = "layer"
DEFAULT_SHAPES = ("896x4864", "4864x896", "896x896", LAYER)
DEFAULT_BATCHES = (1, 32, 64)


class Linear(NamedTuple):
    """One matrix product. `source` is the name of the linear whose output it reads, or `x`."""

    name: str
    source: str
    k: int
    n: int


# The linears of a Qwen2.5-0.5B layer, each after the one that it depends on in the model.
_LAYER_LINEARS = (
    Linear("q", "x", 896, 896),
    Linear("k", "x", 896, 128),
    Linear("v", "x", 896, 128),
    Linear("o", "q", 896, 896),
    Linear("gate", "o", 896, 4864),
    Linear("up", "o", 896, 4864),
    Linear("down", "gate", 4864, 896),
)


@dataclass(frozen=True)
class Shape:
    """One matrix, or the seven of a layer run one after another in one graph."""

    name: str
    linears: tuple[Linear, ...]

    @property
    def k(self) -> int:
        """Inputs; 0 for a layer, which has several."""
        return self.linears[0].k if len(self.linears) == 1 else 0

    @property
    def n(self) -> int:
        return self.linears[0].n if len(self.linears) == 1 else 0

    @property
    def inputs(self) -> int:
        """Width of x."""
        return self.linears[0].k

    @property
    def weights(self) -> int:
        """Multiply-adds of one token."""
        return sum(linear.k * linear.n for linear in self.linears)

    @property
    def results(self) -> tuple[Linear, ...]:
        """Linears that no other reads: the outputs of a graph. The last one depends on the longest chain."""
        sources = {linear.source for linear in self.linears}
        return tuple(linear for linear in self.linears if linear.name not in sources)


MOST_TOKENS = 4096
MOST_SECONDS = 3600


@dataclass(frozen=True)
class Plan:
    """Everything that decides how much is measured."""

    shapes: tuple[Shape, ...]
    batches: tuple[int, ...] = DEFAULT_BATCHES
    threads: tuple[int, ...] = (1, 2)
    regimes: tuple[str, ...] = REGIMES
    seconds: float = 2.0
    """Timed seconds that one cell (shape, regime, threads, batch) may take with all its contenders."""
    least_rounds: int = 5
    most_rounds: int = 40
    stream_bytes: int = ARRAY_BYTES
    """Bytes of the array that is read to measure the roofline."""
    simulate: bool = True
    """Whether the ARM kernels' loops are put through a simulator, where there is one."""

    def __post_init__(self) -> None:
        for flag, values in (("--batch", self.batches), ("--threads", self.threads)):
            if not values or min(values) < 1:
                raise UserError(f"{flag} takes numbers of 1 or more, as in {flag} 1,2.")
        if max(self.batches) > MOST_TOKENS:
            raise UserError(f"--batch {max(self.batches)} is too large; give {MOST_TOKENS} or less.")
        for count in self.threads:
            check_threads(count)
        for regime in self.regimes:
            if regime not in REGIMES:
                raise UserError(f"--regime {regime} is unknown; choose hot, dram or both.")
        if not 0 < self.seconds <= MOST_SECONDS:
            raise UserError(f"--seconds is {self.seconds:g}; give more than 0 and at most {MOST_SECONDS}.")


def parse_shape(text: str) -> Shape:
    """`layer`, or KxN with K inputs and N outputs. Raises UserError."""
    if text == LAYER:
        return Shape(LAYER, _LAYER_LINEARS)
    k, _, n = text.partition("x")
    if not (k.isdigit() and n.isdigit() and 0 < int(k) <= 65536 and 0 < int(n) <= 65536):
        raise UserError(
            f"--shape {text} is not a shape; give KxN (inputs x outputs, as in 896x4864) or layer."
        )
    return Shape(f"{int(k)}x{int(n)}", (Linear("y", "x", int(k), int(n)),))


def parse_numbers(flag: str, text: str) -> tuple[int, ...]:
    """`1,32` -> (1, 32), each once and in order. Raises UserError naming the flag."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UserError(f"{flag} {text} is not a list of numbers; give them as in {flag} 1,2.") from None


def parse_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Repeated options and comma-separated lists of names, each once and in order."""
    return tuple(dict.fromkeys(part for text in texts for part in text.split(",") if part))


def copies_and_graphs(shape_bytes: int, regime: str, largest_batch: int) -> tuple[int, int]:
    """Returns (copies of a shape of `shape_bytes` in each graph, number of graphs); bytes in a contender's format."""
    if regime == "hot":
        return max(1, min(HOT_MOST_COPIES, HOT_BYTES // shape_bytes)), 1
    graph_bytes = DRAM_BYTES if largest_batch <= FEW_TOKENS else GRAPH_BYTES
    copies = min(-(-graph_bytes // shape_bytes), MOST_COPIES)
    return copies, -(-DRAM_BYTES // (copies * shape_bytes))


def batches_by_graphs(batches: Sequence[int], regime: str) -> list[tuple[int, ...]]:
    """Batches that run on the same graphs, each group in the given order."""
    if regime == "hot":
        return [tuple(batches)]
    few = tuple(batch for batch in batches if batch <= FEW_TOKENS)
    many = tuple(batch for batch in batches if batch > FEW_TOKENS)
    return [group for group in (few, many) if group]
