"""Stops a run whose loss is no number or jumps, before such a step is saved, and names the batch."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from microvlm.atomic import write_file
from microvlm.errors import UserError
from microvlm.formats.documents import quote

WINDOW = 64
SPIKE_DEVIATIONS, SPIKE_MARGIN = 12.0, 2.0
"""A spike exceeds the mean of the last WINDOW losses by this many standard deviations and by this many nats."""
STOPPED_BATCH = "stopped_batch.json"
_SHOWN_KEYS = 4


class LossGuard:
    """Watches one stage's losses and gradient norms."""

    def __init__(self, run: Path, stage: str, writes: bool = True):
        self.run, self.stage, self.writes = run, stage, writes
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def check(self, step: int, loss: float, grad_norm: float, keys: Sequence[str]) -> None:
        """Add the loss of `step`. Raises UserError for one that ends the run; `keys` name the batch's samples."""
        problem = self._problem(loss, grad_norm)
        if problem is None:
            self.losses.append(loss)
            return
        document = {
            "stage": self.stage,
            "step": step,
            "loss": loss if math.isfinite(loss) else str(loss),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else str(grad_norm),
            "samples": list(keys),
        }
        path = self.run / STOPPED_BATCH
        if self.writes:
            write_file(path, json.dumps(document, indent=2) + "\n")
        shown = ", ".join(quote(key) for key in keys[:_SHOWN_KEYS])
        more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
        batch = f" on the samples {shown}{more}" if keys else ""
        raise UserError(
            f"stage '{self.stage}' stopped at step {step}: {problem}{batch} (all in {path}). The last saved state is "
            "from before; lower --learning-rate, or take the samples out of the data, and start a new run."
        )

    def _problem(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return "the loss is no number (NaN or infinite)"
        if not math.isfinite(grad_norm):
            return "the gradient is no number (NaN or infinite)"
        if len(self.losses) < WINDOW // 2:
            return None
        mean = math.fsum(self.losses) / len(self.losses)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in self.losses) / len(self.losses))
        if loss > mean + SPIKE_DEVIATIONS * deviation and loss > mean + SPIKE_MARGIN:
            return f"the loss jumped to {loss:.3g} from a mean of {mean:.3g}"
        return None
