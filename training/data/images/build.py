"""Builds a data folder from sources: looks at every record, splits, writes shards, and goes on where it was cut off.

Everything is written into `DIR.partial`, which gets the name DIR when it is whole. A journal in it says what is safe on
the disk: how many records were read and where each split's shards end. A second run of the same command cuts off
whatever came after, and goes on with the next record; the result has the bytes of an unbroken run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from msgspec import Meta

from microvlm.atomic import os_errors_about, write_file
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count
from microvlm.memory.file_lock import locked
from microvlm.temporary_folder import flush_folder
from microvlm.training.data.caption_data import MAX_TEXT, SPLITS
from microvlm.training.data.data_folder import DATA_FILE, DATA_FORMAT, DataSet, ShardedData
from microvlm.training.data.images.checked_stream import check_stream
from microvlm.training.data.images.pictures import CheckedRecord, PictureLimits
from microvlm.training.data.images.source_record import BadRecord, Skip, Source, SourceRecord
from microvlm.training.data.images.split_choice import SplitChoice
from microvlm.training.data.images.text_counts import count_texts
from microvlm.training.data.shard_writer import SplitProgress, SplitWriter

PARTIAL = ".partial"
SKIPPED_FILE, PREVIEW_FILE = "skipped.jsonl", "preview.jpg"
_JOB_FILE, _JOURNAL_FILE = "job.json", "journal.json"
SAVE_EVERY = 1000
"""Records between two entries of the journal: what a killed run loses."""
FIRST_SAMPLES = 256
"""Samples that are held back until it is known whether every split gets one."""


class BuildOptions(msgspec.Struct, frozen=True):
    """What decides the result beside the sources."""

    validation: Annotated[float, Meta(ge=0, lt=1)] = 0.05
    test: Annotated[float, Meta(ge=0, lt=1)] = 0.05
    max_side: int = 512
    min_side: int = 8
    max_text: Annotated[int, Meta(ge=1, le=MAX_TEXT)] = 1000
    max_images: int | None = None
    image_column: str | None = None
    caption_column: str | None = None
    hub_split: str = "train"

    def __post_init__(self) -> None:
        if self.validation + self.test >= 1:
            raise UserError("--validation and --test leave nothing to train on; their sum must be below 1.")


class Job(msgspec.Struct, frozen=True):
    """What a partial folder belongs to."""

    format: str
    options: BuildOptions
    sources: list[dict[str, str]]


class Journal(msgspec.Struct):
    """What is safe on the disk."""

    read: Count = 0
    skipped: dict[str, Count] = {}
    skipped_bytes: Count = 0
    splits: dict[str, SplitProgress] = {}


class Built(msgspec.Struct, frozen=True):
    """A finished folder."""

    folder: Path
    description: DataSet
    was_complete: bool = False
    resumed_at: int = 0


Progress = Callable[[int, int, int], None]
"""Called with the numbers of records read, usable and left out so far."""


def build(
    sources: list[Source], output: Path, options: BuildOptions, workers: int, progress: Progress
) -> Built:
    """Build the data folder `output` -> what is in it.

    Goes on with a run of the same sources and options that was cut off, and says so where the folder is complete.
    Raises UserError when nothing usable is found, for a folder that holds anything else, and for what sources raise.
    """
    job = _describe_job(sources, options)
    complete = _find_complete(output, job)
    if complete is not None:
        return complete
    partial = output.with_name(output.name + PARTIAL)
    with os_errors_about(output):
        partial.parent.mkdir(parents=True, exist_ok=True)
    with os_errors_about(output), locked(partial, 0.0):
        journal = _open_partial(partial, job)
        resumed_at = journal.read
        writer = _Builder(partial, options, journal)
        try:
            records = _read_all(sources, journal.read)
            limits = PictureLimits(options.min_side, options.max_side)
            for checked in check_stream(records, limits, workers) if writer.has_room else ():
                writer.add(checked)
                if not writer.has_room:
                    break
                progress(writer.read, writer.usable, writer.left_out)
            writer.finish()
            description = writer.describe(job)
            if not description.shards:
                raise UserError(_nothing_usable(sources, writer))
        except UserError:
            if not writer.kept:
                writer.close()
                shutil.rmtree(partial)
            raise
        finally:
            writer.close()
        description = _publish(partial, output, description)
    return Built(output, description, resumed_at=resumed_at)


class _Builder:
    """Takes records one after another, and keeps the journal."""

    def __init__(self, folder: Path, options: BuildOptions, journal: Journal):
        self.folder, self.options = folder, options
        self.choice = SplitChoice(options.validation, options.test)
        self.writers = {s: SplitWriter(folder, s, journal.splits.get(s)) for s in SPLITS}
        self.read, self.skipped = journal.read, dict(journal.skipped)
        self.kept = sum(writer.samples for writer in self.writers.values())
        self._first: list[CheckedRecord] | None = [] if not self.kept else None
        self._remember(journal)
        self._skip_file: BinaryIO = open(folder / SKIPPED_FILE, "ab")  # noqa: SIM115
        self._skip_file.truncate(journal.skipped_bytes)
        self._skip_file.seek(0, os.SEEK_END)

    @property
    def usable(self) -> int:
        """Samples that are written or held back."""
        return self.kept + len(self._first or ())

    @property
    def left_out(self) -> int:
        return sum(self.skipped.values())

    @property
    def has_room(self) -> bool:
        """Whether more samples are wanted."""
        return self.options.max_images is None or self.kept < self.options.max_images

    def add(self, checked: CheckedRecord) -> None:
        """Take the next record."""
        self.read += 1
        for skip in checked.record.skips:
            self._skip(checked.record, skip)
        if checked.pictures and self._first is not None:
            self._first.append(checked)
            if len(self._first) >= min(FIRST_SAMPLES, self.options.max_images or FIRST_SAMPLES):
                self._write_first()
        elif checked.pictures:
            self._write(checked)
        if self.read % SAVE_EVERY == 0 and not self._first:
            self.save()

    def finish(self) -> None:
        """Write what was held back, and save."""
        self._write_first()
        self.save()

    def save(self) -> Journal:
        """Put everything so far on the disk, then the journal that says so."""
        splits = {split: writer.save() for split, writer in self.writers.items()}
        self._skip_file.flush()
        os.fsync(self._skip_file.fileno())
        journal = Journal(self.read, self.skipped, self._skip_file.tell(), splits)
        write_file(self.folder / _JOURNAL_FILE, msgspec.json.encode(journal))
        return journal

    def close(self) -> None:
        self._skip_file.close()

    def describe(self, job: Job) -> DataSet:
        """The record of `dataset.json`, before texts are counted. Without shards when nothing was kept."""
        shards = {split: writer.save().shards for split, writer in self.writers.items()}
        return DataSet(
            format=DATA_FORMAT,
            shards={split: listed for split, listed in shards.items() if listed},
            options=msgspec.to_builtins(job.options),
            sources=[dict(source) for source in job.sources],
            read=self.read,
            skipped=dict(sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))),
            repeated_pictures=self.choice.repeated_pictures,
        )

    def _write_first(self) -> None:
        first, self._first = self._first, None
        if first:
            self.choice.fill_splits([[picture.sha256 for picture in c.pictures] for c in first])
        for checked in first or ():
            self._write(checked)

    def _write(self, checked: CheckedRecord) -> None:
        if not self.has_room:
            return
        record, pictures = checked
        try:
            split = self.choice.choose([picture.sha256 for picture in pictures], record.turns)
        except BadRecord as problem:
            self._skip(record, Skip(problem.reason, problem.detail))
            return
        self.writers[split].write(f"{self.kept:09d}", pictures, record.turns, record.annotations)
        self.kept += 1

    def _skip(self, record: SourceRecord, skip: Skip) -> None:
        self.skipped[skip.reason] = self.skipped.get(skip.reason, 0) + 1
        row = {"place": record.place, "reason": skip.reason}
        if record.pictures:
            row["picture"] = record.pictures[0].name
        if skip.detail:
            row["detail"] = skip.detail
        # Names and details may hold bytes that are no UTF-8.
        text = msgspec.json.encode({k: v.encode("utf-8", "replace").decode() for k, v in row.items()})
        self._skip_file.write(text + b"\n")

    def _remember(self, journal: Journal) -> None:
        """Enter the samples that an earlier run wrote."""
        if not self.kept:
            return
        shards = {split: progress.shards for split, progress in journal.splits.items()}
        earlier = ShardedData.of_shards(self.folder, shards)
        for split in SPLITS:
            for line in earlier.lines(split, longer=True):
                self.choice.enter([span.sha256 for span in line.images], line.turns, split)


def _describe_job(sources: list[Source], options: BuildOptions) -> Job:
    rows = [{"kind": s.kind, "name": s.name, "sha256": s.identity()} for s in sources]
    # Names of files may hold bytes that are no UTF-8.
    rows = [{k: v.encode("utf-8", "replace").decode()[:300] for k, v in row.items()} for row in rows]
    return Job(DATA_FORMAT, options, rows)


def _find_complete(output: Path, job: Job) -> Built | None:
    """The finished folder, if it is the job's. None where there is nothing. Raises UserError for another folder."""
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / DATA_FILE).is_file():
        raise UserError(f"{output} exists and is no data folder; give another name with -o.")
    data = ShardedData(output)
    same = data.description.options == msgspec.to_builtins(job.options)
    if not same or data.description.sources != job.sources:
        raise UserError(
            f"{output} holds a data set of other sources or options; give another name with -o, or delete it."
        )
    for name in (_JOB_FILE, _JOURNAL_FILE):
        (output / name).unlink(missing_ok=True)
    return Built(output, data.description, was_complete=True)


def _open_partial(partial: Path, job: Job) -> Journal:
    """Make the folder of an unfinished run, or find out how far the earlier one came."""
    remedy = f"delete {partial}, or run the earlier command again"
    if partial.is_dir() and (partial / _JOB_FILE).is_file():
        earlier = documents.load(partial / _JOB_FILE, Job, remedy)
        if earlier != job:
            raise UserError(f"{partial} is an unfinished run with other sources or options: {remedy}.")
        if (partial / _JOURNAL_FILE).is_file():
            return documents.load(partial / _JOURNAL_FILE, Journal, remedy)
        return Journal()
    if partial.is_dir() and any(partial.iterdir()):
        raise UserError(f"{partial} is in the way; move it, or give another name with -o.")
    partial.mkdir(parents=True, exist_ok=True)
    write_file(partial / _JOB_FILE, msgspec.json.encode(job))
    return Journal()


def _publish(partial: Path, output: Path, description: DataSet) -> DataSet:
    """Write what describes the folder, and give it its name -> the description with counts of texts."""
    from microvlm.training.data.images.preview import write_preview

    write_file(partial / DATA_FILE, msgspec.json.encode(description))
    data = ShardedData(partial)
    description = msgspec.structs.replace(description, texts=count_texts(data.texts(s) for s in SPLITS))
    write_preview(data, partial / PREVIEW_FILE)
    write_file(partial / DATA_FILE, msgspec.json.format(msgspec.json.encode(description), indent=1))
    if output.is_dir():
        output.rmdir()  # an empty one, which not every system lets a rename replace
    os.rename(partial, output)
    flush_folder(output.parent)
    for name in (_JOB_FILE, _JOURNAL_FILE):
        (output / name).unlink(missing_ok=True)
    return description


def _read_all(sources: list[Source], start: int) -> Iterator[SourceRecord]:
    """The records of all sources from number `start` on."""
    if len(sources) == 1:
        return sources[0].records(start)
    return islice(chain.from_iterable(source.records(0) for source in sources), start, None)


def _nothing_usable(sources: list[Source], writer: _Builder) -> str:
    names = " and ".join(source.name for source in sources)
    if not writer.skipped:
        return f"{names}: no record in it; give another SOURCE."
    reasons = ", ".join(f"{reason} ({count})" for reason, count in list(writer.skipped.items())[:4])
    return f"{names}: none of {writer.read} records can be used: {reasons}; docs/data-format.md says what is read."
