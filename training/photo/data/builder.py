"""Builds a folder of encoded pictures: chunks of features and descriptions, each a function of seed and number."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from microvlm.atomic import new_file
from microvlm.config import VisionConfig
from microvlm.errors import UserError
from microvlm.presets import preset
from microvlm.training.photo.data.composer import MIXTURE, Composer, Sample
from microvlm.training.photo.data.encoder import ENCODER, GRAPH, FeatureGraph, fingerprint, make_encoder
from microvlm.training.photo.data.sources import CALIBRATION_VENDOR, Sources, Split

INDEX = "photo.json"
FORMAT, COLOURED_FORMAT = "microvlm-photo-1", "microvlm-photo-2"
"""Without and with the colours of places, which older versions would take for features."""
CHUNK = sum(MIXTURE.values())
CALIBRATION_BATCHES, BATCH = 6, 32
TEXTS = "texts.txt"
PLAIN = "plain"
"""The part of a folder in which every named thing is shown alone, large and upright."""
_PARTS = ("train", "calibration", "test", "views", "calibration_views", "test_views", PLAIN)
"""In the order of their seeds."""
VIEWS = 4
"""Pictures of one thing, one after another, in the parts of a folder that are called views."""

_worker: dict[str, Any] = {}


class Plan(msgspec.Struct, frozen=True):
    """What a folder is built from."""

    shards: tuple[str, ...]
    emoji: str | None
    seed: int
    chunks: dict[str, int]
    """Chunks of each part: train, calibration and test, and views, calibration_views and test_views."""
    texts: str | None = None
    """A file of sentences that the tokenizer learns from beside names and questions."""
    colours: bool = False
    """Whether the mean colour of each place stands behind its features."""

    @property
    def vision(self) -> VisionConfig:
        """The encoder's sizes."""
        return dataclasses.replace(preset("photo").vision, colours=self.colours)

    @property
    def index_format(self) -> str:
        return COLOURED_FORMAT if self.colours else FORMAT

    def to_dict(self) -> dict[str, Any]:
        """As JSON. Without colours there is no key of them, as in folders that were begun before there were any."""
        content: dict[str, Any] = msgspec.to_builtins(self)
        if not self.colours:
            del content["colours"]
        return content


def build(folder: Path, plan: Plan, workers: int, log: Callable[[str], None]) -> None:
    """Build or complete a folder; chunks that are there are kept. Raises UserError for another plan or bad sources."""
    folder.mkdir(parents=True, exist_ok=True)
    config = plan.vision
    sources = Sources.open(
        [Path(shard) for shard in plan.shards], None if plan.emoji is None else Path(plan.emoji)
    )
    _check_plan(folder, plan, sources)
    if not (folder / ENCODER).is_file():
        log("the encoder is calibrated on pictures of the training split")
        make_encoder(config, _calibration_pictures(Composer(sources, "train"), plan.seed), folder)
    if plan.texts is not None and not (folder / TEXTS).is_file():
        with new_file(folder / TEXTS) as temporary:
            temporary.write_text(
                "".join(f"{line}\n" for line in read_texts(Path(plan.texts))), encoding="utf-8"
            )
    if not (folder / GRAPH).is_file():
        FeatureGraph(config, folder)
    jobs = [
        (part, number)
        for part, count in plan.chunks.items()
        for number in range(count)
        if not chunk_paths(folder, part, number)[1].is_file()
    ]
    jobs.sort(key=lambda job: (job[1], job[0]))
    for done, (part, number) in enumerate(_results(jobs, folder, plan, workers), 1):
        log(f"{part} {number}: chunk {done} of {len(jobs)}")
    index = {"format": plan.index_format, "encoder": fingerprint(folder), "chunk": CHUNK, **plan.to_dict()}
    with new_file(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1) + "\n")


def read_texts(path: Path) -> list[str]:
    """The sentences of a file of lines, plain or JSON with `captions`, perhaps compressed, in lower case.

    Raises UserError.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = content.decode().splitlines()
        if not lines or not lines[0].startswith("{"):
            return [line.strip().rstrip(".").lower() for line in lines if line.strip()]
        captions = [caption for line in lines for caption in json.loads(line)["captions"]]
        return [caption.strip().rstrip(".").lower() for caption in captions]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is no file of sentences or of JSON lines with captions: give another."
        ) from None


def chunk_paths(folder: Path, part: str, number: int) -> tuple[Path, Path]:
    """Features and descriptions of a chunk. The second is written last."""
    stem = folder / f"{part}-{number:04d}"
    return stem.with_suffix(".npy"), stem.with_suffix(".jsonl")


def generator(seed: int, part: str, number: int) -> np.random.Generator:
    """The generator of a chunk."""
    return np.random.default_rng([seed, _PARTS.index(part), number])


def samples(composer: Composer, part: str, rng: np.random.Generator) -> Iterator[Sample]:
    """The samples of a chunk: in the order of `MIXTURE`, or `VIEWS` of each of some things."""
    if part == PLAIN:
        for _ in range(CHUNK):
            yield composer.plain(rng)
        return
    if part.endswith("views"):
        for _ in range(CHUNK // VIEWS):
            yield from composer.views(rng, VIEWS)
        return
    for kind, count in MIXTURE.items():
        for _ in range(count):
            yield composer.sample(kind, rng)


def split_of_part(part: str) -> Split:
    """The split that a part of a folder is composed of: `views` is of train, `test_views` of test."""
    split: Any = "train" if part == PLAIN else part.removesuffix("views").rstrip("_") or "train"
    return split


def _results(
    jobs: list[tuple[str, int]], folder: Path, plan: Plan, workers: int
) -> Iterator[tuple[str, int]]:
    """Build the chunks, in this process for one worker."""
    if not jobs:
        return
    if workers == 1:
        _start_worker(folder, plan)
        yield from map(_build_chunk, jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (folder, plan)) as pool:
        yield from pool.map(_build_chunk, jobs)


def _check_plan(folder: Path, plan: Plan, sources: Sources) -> None:
    path = folder / "plan.json"
    # Folders that were begun before a vendor was held out for calibration lack its name.
    rules = {"chunks": None, "photos": len(sources.photos), "calibration_vendor": CALIBRATION_VENDOR}
    document = msgspec.json.encode({**plan.to_dict(), **rules})
    if path.is_file() and path.read_bytes() != document:
        raise UserError(
            f"{folder} was begun with other sources or another seed, with{'out' if plan.colours else ''} colours, or "
            "by another version: give another folder."
        )
    if not path.is_file():
        with new_file(path) as temporary:
            temporary.write_bytes(document)


def _calibration_pictures(composer: Composer, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([seed, 99])
    kinds = list(MIXTURE)
    shares = np.array(list(MIXTURE.values())) / CHUNK
    for _ in range(CALIBRATION_BATCHES):
        yield np.stack(
            [composer.sample(kinds[int(rng.choice(len(kinds), p=shares))], rng).pixels for _ in range(BATCH)]
        )


def _start_worker(folder: Path, plan: Plan) -> None:
    sources = Sources.open(
        [Path(shard) for shard in plan.shards], None if plan.emoji is None else Path(plan.emoji)
    )
    _worker.update(
        folder=folder,
        plan=plan,
        sources=sources,
        composers={},
        graph=FeatureGraph(plan.vision, folder),
    )


def _build_chunk(job: tuple[str, int]) -> tuple[str, int]:
    part, number = job
    split = split_of_part(part)
    folder, plan, composers = _worker["folder"], _worker["plan"], _worker["composers"]
    if split not in composers:
        composers[split] = Composer(_worker["sources"], split)
    features, descriptions, batch = [], [], []
    for sample in samples(composers[split], part, generator(plan.seed, part, number)):
        batch.append(sample.pixels)
        descriptions.append(sample.description)
        if len(batch) == BATCH:
            features.append(_worker["graph"](np.stack(batch)))
            batch = []
    if batch:
        features.append(_worker["graph"](np.stack(batch)))
    arrays, lines = chunk_paths(folder, part, number)
    with new_file(arrays) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(features))
    with new_file(lines) as temporary:
        temporary.write_bytes(b"".join(msgspec.json.encode(d) + b"\n" for d in descriptions))
    return part, number
