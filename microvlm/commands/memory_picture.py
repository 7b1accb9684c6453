"""Draws what a memory file holds, for `microvlm memory plot`. Needs no model.

Drawn with Pillow, which every installation has: a Raspberry Pi has no matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from microvlm.memory.episodic import EpisodicMemory

_SHEET_PX = 720
"""Width of a row of slots, about."""
_PAIRS = 3


class StateNumbers(NamedTuple):
    """What a file says about one state of a memory."""

    numbers: list[int]
    """Numbers of its entries, from 1, oldest first."""
    labels: list[str]
    keys: np.ndarray
    """Addressing weights w, float32 [N, K]."""
    variance: np.ndarray | None
    """Posterior variance of each slot, the diagonal of U, float32 [K]; None if the file has no state yet."""
    pending: int
    """Newest entries that the file's state lacks until a model opens the file."""

    @property
    def use(self) -> np.ndarray:
        """Mean |w| of each slot, as shares that sum to 1, [K]."""
        use = np.abs(self.keys).mean(0, dtype=np.float64)
        return use / max(float(use.sum()), 1e-30)

    @property
    def utilization(self) -> float:
        """Slots that are used evenly, as a share of all: exp(entropy of `use`) / K."""
        use = self.use[self.use > 0]
        return float(np.exp(-(use * np.log(use)).sum()) / self.keys.shape[1])

    @property
    def cosines(self) -> np.ndarray:
        """Cosine of each two keys, [N, N]."""
        lengths = np.linalg.norm(self.keys, axis=1, keepdims=True)
        unit = self.keys / np.maximum(lengths, np.finfo(np.float32).tiny)
        return unit @ unit.T

    def most_alike(self) -> list[tuple[int, int, float]]:
        """The pairs of entries with the largest cosines: (number, number, cosine), largest first."""
        cosines = self.cosines
        rows, columns = np.triu_indices(len(cosines), 1)
        order = np.argsort(-cosines[rows, columns], kind="stable")[:_PAIRS]
        return [
            (self.numbers[rows[at]], self.numbers[columns[at]], float(cosines[rows[at], columns[at]]))
            for at in order
        ]


def numbers_of(memory: EpisodicMemory, number: int) -> StateNumbers:
    """What state `number` (from 0) of a memory holds, without a model."""
    from microvlm.escaping import printable

    entries = [(at, entry) for at, entry in enumerate(memory.entries, 1) if entry.memory == number]
    pending = sum(memory.entries[at].memory == number for at in memory.pending)
    try:
        variance = np.asarray(memory.state(number).covariance[0]).diagonal()
    except RuntimeError:  # all of its rows are pending
        variance = None
    return StateNumbers(
        [at for at, _ in entries],
        [f"{at} {printable(entry.text)}" for at, entry in entries],
        np.array([entry.key for _, entry in entries], np.float32).reshape(len(entries), memory.slots),
        variance,
        pending,
    )


def draw_state(state: StateNumbers) -> Image.Image:
    """Draw a state: facts x slots, the use and the variance of the slots, facts x facts."""
    from PIL import Image

    from microvlm.commands.heatmap import Table, draw_table

    count, slots = state.keys.shape
    cell = max(1, min(18, _SHEET_PX // slots))
    columns = f"{slots} slots of the memory"
    tables = [
        (Table("Addressing weights of each fact over the slots", state.labels, state.keys, columns), cell),
        (
            Table(
                f"Use of the slots: {state.utilization:.0%} of them, counted as evenly used",
                ["mean |w|"],
                state.use[None],
                f"{columns}, shares that sum to 1",
            ),
            cell,
        ),
    ]
    if state.variance is not None:
        lacking = f", before the newest {state.pending}" if state.pending else ""
        title = f"Posterior variance of the slots{lacking}: dark slots are known best"
        tables.append((Table(title, ["variance"], state.variance[None], columns), cell))
    alike = "; ".join(f"{a} and {b}: {cosine:.4f}" for a, b, cosine in state.most_alike())
    title = "Cosine between keys: facts that look alike" + (f" ({alike})" if alike else "")
    small = max(2, min(18, _SHEET_PX // min(count, 64)))
    newest = state.cosines[:, -64:]
    tables.append((Table(title, state.labels, newest, "the same facts"), small))
    drawn = [draw_table(table, width) for table, width in tables]
    sheet = Image.new("RGB", (max(part.width for part in drawn), sum(part.height for part in drawn)), "white")
    top = 0
    for part in drawn:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def document_of(state: StateNumbers, number: int, output: str) -> dict[str, Any]:
    return {
        "picture": output,
        "memory": number,
        "entries": state.numbers,
        "slots": state.keys.shape[1],
        "utilization": state.utilization,
        "mean_variance": None if state.variance is None else float(state.variance.mean()),
        "pending": state.pending,
        "most_alike": [{"entries": [a, b], "cosine": cosine} for a, b, cosine in state.most_alike()],
    }


def sentence_of(state: StateNumbers) -> str:
    count = len(state.numbers)
    facts = "1 fact" if count == 1 else f"{count} facts"
    text = f"{facts} over {state.keys.shape[1]} slots, of which {state.utilization:.0%} are in use"
    alike = [f"{a} and {b} (cosine {cosine:.4f})" for a, b, cosine in state.most_alike()[:1]]
    return text + (f"; most alike: {alike[0]}" if alike else "")
