"""Finds out what a SOURCE of the command line is: a table, shards, a folder of one of several layouts, or a hub id."""

from __future__ import annotations

import glob
from pathlib import Path

from microvlm.errors import UserError
from microvlm.training.data.data_folder import DATA_FILE
from microvlm.training.data.images.conversation import Columns
from microvlm.training.data.images.dataset_source import HUB_ID, DatasetSource
from microvlm.training.data.images.folder_source import PICTURE_SUFFIXES, FolderSource
from microvlm.training.data.images.shard_source import ShardSource
from microvlm.training.data.images.source_record import Source
from microvlm.training.data.images.table_source import SUFFIXES, TableSource

_TABLE_NAMES = ("metadata", "captions")
"""Names of tables that say what the pictures of their folder show; `metadata` is Hugging Face's imagefolder."""
_DATASETS_FILES = ("dataset_dict.json", "state.json")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".gz", ".zip")
_FORMS = "a folder, captions.{csv,tsv,jsonl,json,parquet}, .tar shards, or the id of a hub's data set"


def open_sources(texts: list[str], columns: Columns, max_text: int, split: str) -> list[Source]:
    """Open each SOURCE, in order. Raises UserError for one that is nothing of what is read here."""
    sources: list[Source] = []
    for text in texts:
        if "://" in text and not text.startswith("hf://datasets/"):
            raise UserError(
                f"{text} is a URL; download it first and give the file. A list of pictures' URLs is downloaded by "
                "img2dataset, CC12M by microvlm-data cc12m."
            )
        path = Path(text)
        try:
            is_there = path.exists()
        except (OSError, ValueError):
            raise UserError(f"{text} is not the name of a file; give {_FORMS}.") from None
        if is_there:
            sources += _open_path(path, columns, max_text, split)
        elif any(character in text for character in "*?[{"):
            sources.append(_open_pattern(text, columns, max_text))
        elif HUB_ID.fullmatch(text) and path.suffix.lower() not in (
            *SUFFIXES,
            ".parquet",
            ".tar",
            *_COMPRESSED,
        ):
            sources.append(DatasetSource.of_hub(text, columns, max_text, split))
        else:
            raise UserError(f"{text} does not exist; give {_FORMS}.")
    return sources


def _open_path(path: Path, columns: Columns, max_text: int, split: str) -> list[Source]:
    if path.is_dir():
        return _open_folder(path, columns, max_text, split)
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return [TableSource(path, columns, max_text)]
    if suffix == ".parquet":
        return [DatasetSource.of_parquet([path], columns, max_text)]
    if suffix == ".tar":
        return [ShardSource([path], columns, max_text)]
    if path.name.lower().endswith(_COMPRESSED):
        raise UserError(f"{path} is compressed; unpack it first, and give what is in it.")
    if suffix in PICTURE_SUFFIXES:
        raise UserError(f"{path} is one picture; give its folder, or a captions.jsonl that names it.")
    raise UserError(f"{path} is not a source that is read here; give {_FORMS}.")


def _open_pattern(text: str, columns: Columns, max_text: int) -> Source:
    """Shards or Parquet files by a pattern of the shell's, or of WebDataset's (`{00000..00099}.tar`)."""
    from webdataset.shardlists import expand_urls

    expanded = expand_urls(text) if "{" in text else [text]
    paths = [Path(p) for pattern in expanded for p in sorted(glob.glob(pattern))]
    if paths and all(path.suffix.lower() == ".tar" for path in paths):
        return ShardSource(paths, columns, max_text)
    if paths and all(path.suffix.lower() == ".parquet" for path in paths):
        return DatasetSource.of_parquet(paths, columns, max_text)
    raise UserError(
        f"{text} fits {'other files than' if paths else 'no'} .tar or .parquet files; give {_FORMS}."
    )


def _open_folder(folder: Path, columns: Columns, max_text: int, split: str) -> list[Source]:
    if (folder / DATA_FILE).is_file():
        raise UserError(
            f"{folder} is a data folder already: train with it, microvlm-train test --data {folder}."
        )
    if (folder / "emoji.json").is_file():
        raise UserError(f"{folder} is an emoji folder: train with it, microvlm-train test --data {folder}.")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    shards = [folder / name for name in names if name.lower().endswith(".tar")]
    if shards:
        return [ShardSource(shards, columns, max_text)]
    if any(name in _DATASETS_FILES for name in names):
        return [DatasetSource.of_folder(folder, columns, max_text, split)]
    inner = [folder / name for name in names if (folder / name).is_dir()]
    tables = _find_tables(folder) or [table for sub in inner for table in _find_tables(sub)]
    if tables:
        return [source for table in tables for source in _open_path(table, columns, max_text, split)]
    if any(name.endswith(".parquet") for name in names) or any(any(sub.glob("*.parquet")) for sub in inner):
        return [DatasetSource.of_folder(folder, columns, max_text, split)]
    return [FolderSource(folder, columns, max_text)]


def _find_tables(folder: Path) -> list[Path]:
    """The one table of a folder that says what its pictures show. Raises UserError for two."""
    suffixes = (*SUFFIXES, ".parquet")
    tables = [folder / f"{name}{suffix}" for name in _TABLE_NAMES for suffix in suffixes]
    tables = [table for table in tables if table.is_file()]
    if len(tables) > 1:
        raise UserError(f"{folder} has {' and '.join(t.name for t in tables)}; give the one that is meant.")
    return tables
