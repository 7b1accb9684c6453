"""A folder is written aside and renamed at the end: a failed command leaves nothing behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from microvlm.training.data.drawing_sources import DataError


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside `out`; the caller renames it or moves its files, the rest is removed.

    Anything that the file system refuses inside becomes a DataError about `out`.
    """
    aside = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        aside.chmod(0o755)
        yield aside
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}.") from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
