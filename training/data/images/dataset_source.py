"""Records read by Hugging Face `datasets`: Parquet files, folders that `datasets` wrote, and data sets of a hub.

Rows are streamed and pictures stay encoded: `datasets` fetches and decodes none of them. A data set of a hub may hold
pictures, or name files of its own repository; it never names files of this machine.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.training.data.annotations import ANNOTATION_KEYS, find_annotations
from microvlm.training.data.images.conversation import (
    CAPTION_KEYS,
    IMAGE_KEYS,
    TURN_KEYS,
    Columns,
    as_label,
    find_images,
    find_turns,
)
from microvlm.training.data.images.pictures import MAX_SOURCE_BYTES
from microvlm.training.data.images.source_record import (
    BAD_RECORD,
    TOO_LARGE,
    UNREADABLE,
    URL,
    BadRecord,
    Picture,
    Skip,
    SourceRecord,
)

HUB_ID = re.compile(r"(hf://datasets/)?(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[\w.-]+))?")
"""A data set of a hub: `owner/name`, or `owner/name:configuration`."""


class DatasetSource:
    """The rows of one split of a data set."""

    def __init__(self, kind: str, name: str, columns: Columns, max_text: int, split: str):
        self.kind, self.name = kind, name
        self.columns, self.max_text, self.split = columns, max_text, split
        self.folder: Path | None = None
        """Where pictures that rows name may be; None for a hub."""
        self.prefix = ""
        """How the names of a hub repository's own files begin."""
        self._identity = hashlib.sha256(f"{name} {split}".encode("utf-8", "surrogateescape"))
        self._load: Callable[[str], Any] = _refuse

    @classmethod
    def of_parquet(cls, paths: list[Path], columns: Columns, max_text: int) -> DatasetSource:
        """Parquet files of the same columns."""
        source = cls("parquet", paths[0].name, columns, max_text, "train")
        source.folder = paths[0].parent
        for path in paths:
            source._identity.update(f"{path.name} {path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        files = [str(path) for path in paths]
        source._load = lambda cache: _load_dataset("parquet", cache, data_files={"train": files})
        return source

    @classmethod
    def of_folder(cls, folder: Path, columns: Columns, max_text: int, split: str) -> DatasetSource:
        """A folder with the layout of a hub's repository, or one that `save_to_disk` wrote."""
        source = cls("datasets folder", folder.resolve().name, columns, max_text, split)
        source.folder = folder
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                line = f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n"
                source._identity.update(line.encode("utf-8", "surrogateescape"))
        saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
        source._load = (lambda _: _load_saved(folder)) if saved else (lambda c: _load_dataset(str(folder), c))
        return source

    @classmethod
    def of_hub(cls, name: str, columns: Columns, max_text: int, split: str) -> DatasetSource:
        """A data set of the hub that `huggingface_hub` is set to."""
        match = HUB_ID.fullmatch(name)
        assert match is not None
        source = cls("hub", name, columns, max_text, split)
        source.prefix = f"hf://datasets/{match['id']}"
        source._load = lambda cache: _load_dataset(match["id"], cache, name=match["config"])
        return source

    def identity(self) -> str:
        return self._identity.hexdigest()

    def records(self, start: int) -> Iterator[SourceRecord]:
        # Streaming keeps nothing, but `datasets` makes folders in its cache on the way.
        with tempfile.TemporaryDirectory(prefix="microvlm-datasets-") as cache:
            try:
                rows, labels = self._open(cache)
                for number, row in enumerate(rows.skip(start), start):
                    yield self._record(f"{self.name}:{number + 1}", row, labels)
            except (UserError, MemoryError):
                raise
            except Exception as error:  # of a dozen libraries behind `datasets`
                reason = (str(error) or type(error).__name__).split("\n")[0][:300]
                raise UserError(
                    f"{self.name} cannot be read ({printable(reason)}).{self._advice()}"
                ) from None

    def _advice(self) -> str:
        if self.kind == "hub":
            return " It is no file or folder here; a hub needs the network, and some data sets a login (hf auth login)."
        return " Write it again, or give its other files."

    def _open(self, cache: str) -> tuple[Any, dict[str, list[str]]]:
        """The rows with the columns that are needed, and the names of the classes of columns of labels."""
        import datasets

        rows = self._load(cache)
        if isinstance(rows, dict):
            if self.split not in rows:
                raise UserError(
                    f"{self.name} has no split {self.split}; give --hub-split {' or '.join(rows)}."
                )
            rows = rows[self.split]
        if not isinstance(rows, datasets.IterableDataset):
            rows = rows.to_iterable_dataset()
        features = rows.features or rows._resolve_features().features
        pictures = [name for name, feature in features.items() if _holds_images(feature)]
        if not self.columns.image and not any(key in features for key in IMAGE_KEYS) and pictures:
            self.columns = self.columns._replace(image=pictures[0])
        image = self.columns.image or next((key for key in IMAGE_KEYS if key in features), None)
        if image not in features:
            raise UserError(
                f"{self.name} has no column of pictures (it has {', '.join(features)}); give --image-column."
            )
        wanted = {image, self.columns.caption or "", *TURN_KEYS, *ANNOTATION_KEYS}
        wanted |= set(CAPTION_KEYS) if not self.columns.caption else set()
        kept = [name for name in features if name in wanted]
        rows = rows.select_columns(kept)
        for name in set(pictures) & set(kept):
            rows = rows.cast_column(name, _undecoded(features[name]))
        labels = {
            name: features[name].names for name in kept if isinstance(features[name], datasets.ClassLabel)
        }
        return rows, labels

    def _record(self, place: str, row: dict[str, Any], labels: dict[str, list[str]]) -> SourceRecord:
        for name, names in labels.items():
            if isinstance(row.get(name), int) and 0 <= row[name] < len(names):
                row[name] = as_label(names[row[name]])
        try:
            pictures = tuple(self._picture(value) for value in find_images(row, self.columns))
            said = _without_nulls(row)
            turns, skips = find_turns(said, self.columns, len(pictures), self.max_text)
            return SourceRecord(place, pictures, turns, skips, find_annotations(said))
        except BadRecord as problem:
            return SourceRecord(place, skips=(Skip(problem.reason, problem.detail),))

    def _picture(self, value: Any) -> Picture:
        if isinstance(value, dict):
            name = str(value.get("path") or "the picture")
            value = value.get("bytes") or value.get("path")
        else:
            name = value if isinstance(value, str) else "the picture"
        if isinstance(value, bytes):
            if len(value) > MAX_SOURCE_BYTES:
                raise BadRecord(TOO_LARGE, f"{name} has {len(value)} bytes")
            return Picture(Path(name).name, content=value)
        if not isinstance(value, str):
            raise BadRecord(BAD_RECORD, "a picture must be bytes or the name of a file")
        if self.prefix and (value.startswith(f"{self.prefix}@") or value.startswith(f"{self.prefix}/")):
            return Picture(value.rpartition("/")[2], content=_fetch(value))
        if "://" in value:
            raise BadRecord(URL, value[:200])
        if self.folder is None:
            raise BadRecord(UNREADABLE, f"{value} is a file of this machine, which a hub's row may not name")
        return Picture(value, path=self.folder / value)


def _refuse(_: str) -> Any:
    raise NotImplementedError


def _load_dataset(path: str, cache: str, /, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(path, streaming=True, cache_dir=cache, **options)


def _load_saved(folder: Path) -> Any:
    import datasets

    return datasets.load_from_disk(str(folder))


def _fetch(name: str) -> bytes:
    """Read a file of a hub's repository."""
    import fsspec

    with fsspec.open(name, "rb") as file:
        content = file.read(MAX_SOURCE_BYTES + 1)
    if len(content) > MAX_SOURCE_BYTES:
        raise BadRecord(TOO_LARGE, f"{name} has more than {MAX_SOURCE_BYTES} bytes")
    return content


def _holds_images(feature: Any) -> bool:
    import datasets

    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _undecoded(feature: Any) -> Any:
    import datasets

    plain = datasets.Image(decode=False)
    return datasets.List(plain) if hasattr(feature, "feature") else plain


def _without_nulls(value: Any) -> Any:
    """A row without the keys that only other rows have, which a table fills with null."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
