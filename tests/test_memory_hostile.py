"""Memory files that somebody made: whatever their hashes say, each is refused in one sentence or loaded right."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stepping_memory import PRINT, SLOTS, WIDTH, Stepping, entries, texts

from microvlm.commands.main import cli
from microvlm.console import run_click
from microvlm.errors import UserError
from microvlm.memory.episodic import MAX_TEXT, EpisodicMemory
from microvlm.memory.memory_file import open_memory, read_memory, save_memory, store_memory
from microvlm.memory.memory_reader import digest_of
from microvlm.memory.record_chain import record
from microvlm.memory.tensor_blob import TENSORS

Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors, dict[str, Any]], None]
"""Changes tensors and metadata, whose JSON lists are lists."""


def blob(tensors: Tensors, metadata: dict[str, str], dtype: str = "F32") -> bytes:
    """A safetensors blob, also one that the library would not write."""
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values())


def as_text(metadata: dict[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def hostile_file(
    change_base: Change | None = None, change_record: Change | None = None, file_format: int = 4
) -> bytes:
    """A file of three rows, two of which were appended since format 3, with changes and right hashes."""
    memory = EpisodicMemory.empty(Stepping())
    for row in entries(3):
        memory.write(Stepping(), row)
    rows = [
        {"text": row.text, "time": row.time, "image": False, "memory": 0, "question": "who?", "picture": ""}
        for row in memory.entries
    ]
    keys, latents = (np.stack([getattr(row, name) for row in memory.entries]) for name in ("key", "latent"))
    split = 1 if file_format >= 3 else 3
    state = memory.states[0]
    tensors = dict(zip(TENSORS, (state.mean, state.covariance, keys[:split], latents[:split]), strict=True))
    metadata = {"format": str(file_format), "fingerprint": PRINT, "log": rows[:split], "forgotten": [0]}
    if change_base is not None:
        change_base(tensors, metadata)
    base_text = as_text(metadata)
    known = {name: tensors.get(name, np.zeros((1, 1), np.float32)) for name in TENSORS}
    digest = digest_of(known, base_text)
    content = blob(tensors, {"sha256": digest.hex(), **base_text})
    if file_format < 3:
        return content
    tensors = {"log_keys": keys[split:], "log_codes": latents[split:]}
    metadata = {"log": rows[split:]}
    if change_record is not None:
        change_record(tensors, metadata)
    return content + record(blob(tensors, as_text(metadata)), digest)[0]


RUNTIME = SimpleNamespace(
    fingerprint=PRINT,
    config=SimpleNamespace(memory=SimpleNamespace(slots=SLOTS, code_size=WIDTH)),
    memory_prior=Stepping.memory_prior,
    memory_write=Stepping.memory_write,
    memory_forget=Stepping.memory_forget,
)


def use(path: Path) -> list[str]:
    """What list, read, write, forget and rebuild do with a file -> the texts in it. Raises UserError."""
    from microvlm.commands.memory import describe

    content, _ = read_memory(path, say=lambda _: None)
    describe(content.entries, content.slots, content.state_count)
    memory = open_memory(path, RUNTIME)
    found = texts(memory)
    memory.write(RUNTIME, entries(1, first=9)[0])
    store_memory(memory, path, PRINT)
    memory.forget(RUNTIME, len(memory.entries) - 1)
    memory.rebuild(RUNTIME)
    store_memory(memory, path, PRINT)
    assert texts(open_memory(path, RUNTIME)) == found
    return found


def in_row(**values: Any) -> Change:
    return lambda tensors, metadata: metadata["log"][0].update(values)


def without(key: str) -> Change:
    return lambda tensors, metadata: metadata["log"][0].pop(key)


def with_metadata(**values: Any) -> Change:
    return lambda tensors, metadata: metadata.update(values)


def with_tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda tensors, metadata: tensors.update({name: change(tensors[name])})


def filled(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def fill(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[len(array.flat) // 2] = value
        return array

    return fill


def dropped(name: str) -> Change:
    return lambda tensors, metadata: tensors.pop(name)


def both(*changes: Change) -> Change:
    def change(tensors: Tensors, metadata: dict[str, Any]) -> None:
        for part in changes:
            part(tensors, metadata)

    return change


BAD_ROWS = {
    "a time that is text": in_row(time="x"),
    "a time that no calendar has": in_row(time=1e18),
    "a time before 1970": in_row(time=-1e12),
    "a text that is a list": in_row(text=["anna"]),
    "a text that is null": in_row(text=None),
    "a text without end": in_row(text="x" * (MAX_TEXT + 1)),
    "no text": without("text"),
    "a state in the millions": in_row(memory=200_000_000),
    "a state that is a fraction": in_row(memory=1795882091.0542321),
    "a state below 0": in_row(memory=-1),
    "an integer of 5000 digits": with_metadata(
        log='[{"text": "x", "time": ' + "9" * 5000 + ', "image": false}]'
    ),
    "a question that is a number": in_row(question=4611686018427387904),
    "a picture that is a number": in_row(picture=9007199254740992),
    "a picture that is no hash": in_row(picture="x"),
    "an image that is a word": in_row(image="yes"),
    "nesting": with_metadata(log="[" * 100_000),
    "a log that is an object": with_metadata(log={}),
    "a log that is no JSON": with_metadata(log="[{]"),
    "NaN as a time": with_metadata(log='[{"text": "x", "time": NaN, "image": false}]'),
    "more rows than keys": lambda tensors, metadata: metadata["log"].append(metadata["log"][0]),
    "rows without keys": dropped("log_keys"),
    "keys of another width": with_tensor("log_keys", lambda array: array[:, 1:]),
    "latents of another width": with_tensor("log_codes", lambda array: array[:, 1:]),
    "keys in three dimensions": with_tensor("log_keys", lambda array: array[None]),
    "a key that is not finite": with_tensor("log_keys", filled(math.nan)),
    "a latent that is infinite": with_tensor("log_codes", filled(math.inf)),
    "a latent beyond measure": with_tensor("log_codes", filled(1e30)),
}
BAD_STATES = {
    "a mean that is not finite": with_tensor("memory_mean", filled(math.nan)),
    "a covariance that is not finite": with_tensor("memory_cov", filled(-math.inf)),
    "no states": both(*(with_tensor(name, lambda array: array[:0]) for name in TENSORS[:2])),
    "states of no slots": both(
        with_tensor("memory_mean", lambda array: array[:, :0]),
        with_tensor("memory_cov", lambda array: array[:, :0, :0]),
        with_tensor("log_keys", lambda array: array[:, :0]),
    ),
    "a covariance of another size": with_tensor("memory_cov", lambda array: array[:, 1:]),
    "no covariance": dropped("memory_cov"),
    "rows forgotten that are an object": with_metadata(forgotten={}),
    "rows forgotten that are text": with_metadata(forgotten="x"),
    "rows forgotten below 0": with_metadata(forgotten=[-1]),
    "rows forgotten in more states": with_metadata(forgotten=[0, 0]),
    "a fingerprint without end": with_metadata(fingerprint="f" * 1000),
    "a format that is a word": with_metadata(format="three"),
    "a format of 5000 digits": with_metadata(format="9" * 5000),
}
BAD_RECORDS = {
    "a state that is not there": both(
        with_metadata(states=[7]),
        lambda tensors, metadata: tensors.update(
            dict(zip(TENSORS[:2], Stepping.memory_prior(), strict=True))
        ),
    ),
    "states without arrays": with_metadata(states=[0]),
    "states that are text": with_metadata(states="x"),
    "a state of another size": both(
        with_metadata(states=[0]),
        lambda tensors, metadata: tensors.update(
            memory_mean=np.zeros((1, SLOTS, 3), np.float32), memory_cov=Stepping.memory_prior().covariance
        ),
    ),
    "a state that is not finite": both(
        with_metadata(states=[0]),
        lambda tensors, metadata: tensors.update(
            memory_mean=np.full((1, SLOTS, WIDTH), math.nan, np.float32),
            memory_cov=Stepping.memory_prior().covariance,
        ),
    ),
}


@pytest.mark.parametrize("file_format", [2, 3, 4])
def test_a_file_with_right_hashes_and_right_content_is_used(tmp_path, file_format):
    path = tmp_path / "good.mem"
    path.write_bytes(hostile_file(file_format=file_format))
    assert use(path) == ["fact 0", "fact 1", "fact 2"]


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for action in (lambda: read_memory(path), lambda: use(path)):
        with pytest.raises(UserError, match=r"damaged|newer microvlm") as error:
            action()
        assert str(error.value).count("\n") == 0
        assert len(str(error.value)) < 400
    assert path.read_bytes() == content


@pytest.mark.parametrize("file_format", [2, 3, 4])
@pytest.mark.parametrize("name", [*BAD_ROWS, *BAD_STATES])
def test_what_no_memory_has_is_refused_with_a_right_hash(tmp_path, name, file_format):
    refused(tmp_path / "bad.mem", hostile_file({**BAD_ROWS, **BAD_STATES}[name], file_format=file_format))


@pytest.mark.parametrize("name", [*BAD_ROWS, *BAD_RECORDS])
def test_what_no_memory_has_is_refused_in_a_record_too(tmp_path, name):
    refused(tmp_path / "bad.mem", hostile_file(change_record={**BAD_ROWS, **BAD_RECORDS}[name]))


def test_states_of_other_sizes_than_the_models_are_refused(tmp_path):
    path = tmp_path / "bad.mem"
    narrow = both(
        *(with_tensor(name, lambda array: array[..., :10]) for name in ("memory_mean", "log_codes"))
    )
    path.write_bytes(hostile_file(narrow, file_format=2))
    assert texts(read_memory(path)[0]) == ["fact 0", "fact 1", "fact 2"]
    with pytest.raises(UserError, match=f"its states are {SLOTS} x 10 and the model's {SLOTS} x {WIDTH}"):
        open_memory(path, RUNTIME)


def test_other_types_of_numbers_are_refused(tmp_path):
    path = tmp_path / "bad.mem"
    for dtype in ("F64", "I32", "F16", "X"):
        path.write_bytes(blob({"memory_mean": np.zeros((1, 2, 3), np.float32)}, {"format": "4"}, dtype))
        with pytest.raises(UserError, match="damaged"):
            read_memory(path)


def test_a_huge_header_or_tensor_takes_no_memory(tmp_path):
    path = tmp_path / "bad.mem"
    content = hostile_file()
    for length in (2**63, 2**40, 99_999_999):
        path.write_bytes(length.to_bytes(8, "little") + content[8:])
        with pytest.raises(UserError, match="damaged"):
            read_memory(path)
    for shape in ([2**53, 2**53, 1], [1, 10**6, 10**6]):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
        header = json.dumps({"__metadata__": {"format": "4"}, "memory_mean": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
        with pytest.raises(UserError, match="damaged"):
            read_memory(path)


def test_numbers_of_a_model_that_are_not_finite_are_not_remembered(tmp_path):
    path, runtime = tmp_path / "trip.mem", Stepping()
    memory = EpisodicMemory.empty(runtime)
    save_memory(memory, path, PRINT)
    before = path.read_bytes()
    row = entries(1)[0]
    row.latent[3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        memory.write(runtime, row)
    assert memory.entries == []
    memory.write(runtime, entries(1)[0])
    memory.state(0).mean[0, 0, 0] = math.inf
    for save in (store_memory, save_memory):
        with pytest.raises(UserError, match="the memory was not saved: it has numbers that are not finite"):
            save(memory, path, PRINT)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "bad", ["a time that is text", "a state in the millions", "a mean that is not finite"]
)
def test_every_command_refuses_with_one_sentence_and_status_2(bad, speaking_bundle, tmp_path, capsys):
    path = tmp_path / "bad.mem"
    path.write_bytes(hostile_file({**BAD_ROWS, **BAD_STATES}[bad], file_format=2))
    before = path.read_bytes()
    model = ["--model", str(speaking_bundle)]
    for arguments in (
        ["list"],
        ["read", "--question", "who?", *model],
        ["write", "--text", "anna", *model],
        ["forget", "--entry", "1", *model],
        ["overwrite", "--question", "who?", "--text", "ben", *model],
        ["rebuild", *model],
        ["reset", *model],
    ):
        with pytest.raises(SystemExit) as exit_info:
            run_click(cli, ["memory", arguments[0], str(path), *arguments[1:]])
        out, err = capsys.readouterr()
        assert (exit_info.value.code, out, err.count("\n")) == (2, "", 1), arguments
        assert "damaged" in err
    assert path.read_bytes() == before


_FUZZ = """
import random, resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from microvlm.memory import memory_file
from test_memory_hostile import fuzz
memory_file._BETWEEN_LOOKS_S = 0
limit = 3 << 30  # of address space, most of which is libraries
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(*fuzz(int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[2])))
"""
SEED, MUTANTS = 20, 2000


def fuzz(seed: int, count: int, folder: Path) -> tuple[int, int]:
    """Use `count` mutated files -> (how many were refused, how many loaded). Raises anything else, with the seed."""
    counts, path = {True: 0, False: 0}, folder / "mutant.mem"
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        path.write_bytes(mutant(rng))
        start = time.perf_counter()
        try:
            use(path)
            sentence = ""
        except UserError as error:
            sentence = str(error)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, mutant {number}: {type(error).__name__}: {error}") from error
        assert "\n" not in sentence, (seed, number)
        counts[bool(sentence)] += 1
        assert time.perf_counter() - start < 5, (seed, number)
    return counts[True], counts[False]


VALUES = (
    None,
    True,
    -1,
    0,
    2**31,
    2**53,
    2**64,
    1e300,
    1e-320,
    "",
    "x",
    "\ud800",
    "\0",
    [],
    {},
    [[]],
    {"a": 1},
    0.5,
)


def mutant(rng: np.random.Generator) -> bytes:
    """A file with right hashes and one to three changes of its content, or with changed bytes."""
    file_format = int(rng.choice([1, 2, 3, 4, 4]))
    if rng.random() < 0.3:
        return changed_bytes(rng, hostile_file(file_format=max(2, file_format)))
    changes = both(*(random_change(rng) for _ in range(rng.integers(1, 4))))
    if file_format == 1:
        changes = both(
            *(with_tensor(name, lambda array: array[0]) for name in TENSORS[:2]),
            lambda tensors, metadata: metadata.pop("forgotten"),
            changes,
        )
    in_record = file_format >= 3 and rng.random() < 0.5
    return hostile_file(
        None if in_record else changes, changes if in_record else None, file_format=file_format
    )


def random_change(rng: np.random.Generator) -> Change:
    def change(tensors: Tensors, metadata: dict[str, Any]) -> None:
        value = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
        kind = rng.integers(6)
        if kind == 0 and isinstance(metadata["log"], list):
            rows = [row for row in metadata["log"] if isinstance(row, dict)]
            if rows:
                key = str(rng.choice(["text", "time", "image", "memory", "question", "picture", "other"]))
                rows[rng.integers(len(rows))][key] = value
        elif kind == 1 and isinstance(metadata["log"], list) and metadata["log"]:
            metadata["log"][rng.integers(len(metadata["log"]))] = value
        elif kind == 2:
            metadata[str(rng.choice(["log", "forgotten", "states", "format", "fingerprint", "sha256"]))] = (
                value
            )
            metadata.setdefault("log", [])
        elif tensors:
            name = str(rng.choice(list(tensors)))
            array = tensors[name]
            if kind == 3 and array.size:
                array = array.copy()
                array.flat[rng.integers(array.size)] = rng.choice([math.nan, math.inf, 1e30, -1e5, 0, 1e-40])
            elif kind == 4:
                array = array.reshape(rng.permutation(array.shape))
            else:
                array = array[tuple(slice(rng.integers(0, 2), None) for _ in array.shape)]
            tensors[name] = array

    return change


def changed_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data) + 1))
        length = int(rng.choice([1, 1, 2, 8, 64, 600]))
        new = rng.choice([bytes(length), rng.bytes(length), b"", b"9" * length, b"\xff" * length])
        data[at : at + length * int(rng.integers(2))] = new
        if rng.random() < 0.2:
            del data[int(rng.integers(len(data) + 1)) :]
    return bytes(data)


@pytest.mark.posix
def test_mutated_files_are_refused_in_a_sentence_or_loaded_right(tmp_path):
    command = [sys.executable, "-P", "-c", _FUZZ, str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.run([*command, str(SEED), str(MUTANTS)], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    refusals, loads = map(int, process.stdout.split())
    assert refusals + loads == MUTANTS
    assert refusals > MUTANTS // 2
    assert loads > MUTANTS // 50
