"""Where a run's numbers go: metrics.jsonl always, and the trackers of Accelerate that were asked for.

A tracker that fails during a run is reported in one sentence and switched off; the run goes on. Only the main process
writes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microvlm.console import describe_os_error, note
from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.training.loop.run_files import METRICS
from microvlm.training.watching import names
from microvlm.training.watching.metrics_file import NOT_FINITE, cut, metrics_line, parse_row

if TYPE_CHECKING:
    from accelerate import Accelerator

TRACKERS = ("tensorboard", "wandb", "trackio")
OFF = "none"
"""In place of a tracker: metrics.jsonl alone."""
PROJECT = "microvlm"
_OLDEST_TRACKIO = (0, 20)
"""The first trackio that Accelerate's tracker was tried with; pip falls back to 0.0.6 beside a newer Pillow."""


def check_trackers(trackers: Sequence[str]) -> None:
    """Raises UserError for an unknown tracker, one that is not installed, and `none` beside others."""
    for name in trackers:
        if name not in (*TRACKERS, OFF):
            raise UserError(
                f"unknown tracker {quote(name)}: use {', '.join(TRACKERS)}, or {OFF} for metrics.jsonl alone."
            )
    if OFF in trackers and len(set(trackers)) > 1:
        raise UserError(f"the tracker {OFF} turns all trackers off: leave it or the others out.")
    for name in trackers:
        if name != OFF and importlib.util.find_spec(name) is None:
            raise UserError(f"the tracker {name} is not installed: pip install {name}, or use --track {OFF}.")
        if name == "trackio" and _version(name) < _OLDEST_TRACKIO:
            oldest = ".".join(map(str, _OLDEST_TRACKIO))
            raise UserError(
                f"trackio {importlib.metadata.version(name)} is too old: pip install 'trackio>={oldest}', "
                f"or use --track {OFF}."
            )


def accelerator_options(trackers: Sequence[str], run: Path) -> dict[str, Any]:
    """Arguments of Accelerator(...) for these trackers: `log_with` and `project_config`. Raises as check_trackers does.

    TensorBoard's event files go to `run`/tensorboard.
    """
    from accelerate.utils import ProjectConfiguration

    check_trackers(trackers)
    return {
        "log_with": [name for name in dict.fromkeys(trackers) if name != OFF] or None,
        "project_config": ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "tensorboard")),
    }


class Tracking:
    """The metrics of one run. Steps count from the run's beginning over all stages.

    accelerator : built with `accelerator_options`. run : the run's folder. run_name : its name in the trackers; a
    resumed run has the same. config : what the run was asked for, as JSON values.

    Raises UserError if a tracker cannot start.
    """

    def __init__(self, accelerator: Accelerator, run: Path, run_name: str, config: Mapping[str, Any]):
        self._accelerator, self._path = accelerator, run / METRICS
        self._writes = accelerator.is_main_process
        self._file_failed = False
        if self._writes:
            run.mkdir(parents=True, exist_ok=True)
        try:
            with redirect_stdout(sys.stderr):  # trackio prints, and stdout may be for a JSON document
                accelerator.init_trackers(PROJECT, init_kwargs=_init_options(run, run_name, config))
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.tracker.add_text("config", _indented(config))
                if tracker.name == "wandb":
                    # W&B refuses steps that go back, as those of a resumed run do: the axis is a metric instead.
                    tracker.tracker.define_metric("*", step_metric=names.GLOBAL_STEP)
        except Exception as error:  # each tracker has exceptions of its own
            asked = ", ".join(str(name) for name in accelerator.log_with)
            raise UserError(
                f"a tracker ({asked}) cannot start: {_first_line(error)}: mend that, or use --track {OFF}."
            ) from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl and log to the trackers. A value may be a tensor of one element.

        Trackers get the finite values alone; in metrics.jsonl the others are null and named under "not_finite".
        """
        if not self._writes:
            return
        line = metrics_line(step, {names.GLOBAL_STEP: step, **values})
        self._append(line)
        row = parse_row(line.encode()) or {}
        skipped = ("step", "time", NOT_FINITE)
        finite = {name: v for name, v in row.items() if name not in skipped and v is not None}
        self._each(lambda tracker: tracker.log(finite, step=_step_of(tracker, step)))

    def rewind(self, step: int) -> None:
        """Forget what was logged beyond `step`, at which a resumed run begins. Trackers that cannot keep both.

        Raises UserError if metrics.jsonl cannot be read or replaced.
        """
        if not self._writes:
            return
        cut(self._path, step)
        self._each(lambda tracker: _purge(tracker, step))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a picture file in the trackers under `name`; metrics.jsonl holds no pictures."""
        if self._writes:
            self._each(lambda tracker: _log_picture(tracker, step, name, path))

    def close(self) -> None:
        """End the trackers' runs. Nothing can be logged to them afterwards."""
        with redirect_stdout(sys.stderr):
            self._each(_finish)
        self._accelerator.trackers = []

    def _append(self, line: str) -> None:
        try:
            # Part of a line may have been written before a disk was full: it must not spoil this one.
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if self._file_failed else line)
            self._file_failed = False
        except OSError as error:
            if not self._file_failed:
                note(f"metrics are not being saved: {describe_os_error(error)}")
            self._file_failed = True

    def _each(self, action: Callable[[Any], None]) -> None:
        """Do something with every tracker, and switch off those that fail."""
        for tracker in list(self._accelerator.trackers):
            try:
                action(tracker)
            except Exception as error:  # each tracker has exceptions of its own
                self._accelerator.trackers.remove(tracker)
                note(
                    f"the tracker {tracker.name} is off from here on: {_first_line(error)}; {METRICS} goes on."
                )


def _init_options(run: Path, run_name: str, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of each tracker's start. W&B and trackio go on with the run of this name if there is one."""
    return {
        "wandb": {
            "name": run_name,
            "id": re.sub(r"[^\w.-]", "-", run_name),
            "dir": str(run),
            "config": dict(config),
            "resume": "allow",
            # W&B would replace stdout and stderr to record them, which spoils a progress bar.
            "settings": {"console": "off"},
        },
        "trackio": {"name": run_name, "config": dict(config), "resume": "allow"},
    }


def _step_of(tracker: Any, step: int) -> int | None:
    return None if tracker.name == "wandb" else step


def _purge(tracker: Any, step: int) -> None:
    """Tell TensorBoard that steps beyond `step` will come again, which drops those that it has."""
    if tracker.name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        tracker.writer.close()
        tracker.writer = SummaryWriter(tracker.logging_dir, purge_step=step + 1)


def _log_picture(tracker: Any, step: int, name: str, path: Path) -> None:
    import numpy as np
    from PIL import Image

    if tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(str(path))}, step=step)
        return
    with Image.open(path) as file:  # drawn by this run
        picture = file.convert("RGB")
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "wandb":
        import wandb

        tracker.log({name: wandb.Image(picture), names.GLOBAL_STEP: step})
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: [picture]}, step=step)


def _finish(tracker: Any) -> None:
    if tracker.name == "trackio":
        import trackio

        trackio.finish()  # the run's own would be called once more at exit
    else:
        tracker.finish()


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version(package))[:2])


def _indented(config: Mapping[str, Any]) -> str:
    """JSON as Markdown shows it unchanged."""
    return "".join(f"    {line}\n" for line in json.dumps(config, indent=2, default=str).splitlines())


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError):
        return describe_os_error(error).rstrip(".")
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
