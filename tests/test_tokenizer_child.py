"""A tokenizer.json that can do harm runs in a process of its own, and no answer of it goes to another text."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from microvlm.errors import UserError
from microvlm.exporters.vocabulary.table_builder import write_tables
from microvlm.inputs.tokenizer import LibraryTokenizer, load_tokenizer
from microvlm.inputs.tokenizer_child import ChildTokenizer
from microvlm.inputs.tokenizer_patterns import QWEN2_PATTERN
from microvlm.inputs.tokenizer_tables import TABLES
from microvlm.model.checkpoint import resolve_checkpoint

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and limits of POSIX")
SLOW_PATTERN = r"[a-z]*[a-z]*[a-z]*#"
SLOW_TEXT = "a" * 380 + "!#" * 20
"""Takes the pattern above several seconds."""
TEXTS = ("hello", "a cat", "a red heart", "two birds")


@pytest.fixture(scope="module")
def nano_json() -> bytes:
    return (resolve_checkpoint("nano") / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def expected(nano_json) -> dict[str, list[int]]:
    from tokenizers import Tokenizer

    return {text: Tokenizer.from_str(nano_json.decode()).encode(text).ids for text in TEXTS}


@pytest.fixture
def child(nano_json):
    """Nano's tokenizer in a process of its own."""
    tokenizer = ChildTokenizer(nano_json, Path("tokenizer.json"), "a test")
    yield tokenizer
    tokenizer.close()


def split_step(pattern: dict) -> dict:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def load(nano_json: bytes, folder: Path, change: dict):
    (folder / "tokenizer.json").write_text(json.dumps({**json.loads(nano_json), **change}))
    return load_tokenizer(folder)


@posix
def test_after_an_interrupt_no_text_gets_the_answer_of_another(nano_json, tmp_path):
    byte_level = json.loads(nano_json)["pre_tokenizer"]
    steps = [split_step({"Regex": SLOW_PATTERN}), byte_level]
    used = load(nano_json, tmp_path, {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}})
    before = {text: used.encode(text) for text in TEXTS}

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            used.encode(SLOW_TEXT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert {text: used.encode(text) for text in TEXTS} == before


def test_an_answer_to_another_request_is_refused_and_the_next_one_is_right(child, expected):
    stale = json.dumps({"request": 99, "seconds": 5, "encode": "another text"}).encode() + b"\n"
    child._process._input.write(stale)
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer took more than 5 s or 1 GB"):
        child.encode("hello")
    assert child.encode("hello") == expected["hello"]


@posix
def test_threads_whose_process_is_killed_get_right_answers_or_one_sentence(child, expected):
    wrong, errors, stop = [], [], threading.Event()

    def work(text):
        while not stop.is_set():
            try:
                if child.encode(text) != expected[text]:
                    wrong.append(text)
            except UserError:
                pass
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(text,)) for text in TEXTS]
    for thread in threads:
        thread.start()
    for _ in range(4):
        process = child._process
        if process is not None:
            os.kill(process.pid, signal.SIGKILL)
        child.token_to_id("<image>") if process is None else stop.wait(0.05)
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert (wrong, errors) == ([], [])
    assert {text: child.encode(text) for text in TEXTS} == expected


_FORK = """
import os, sys
from pathlib import Path
from microvlm.inputs.tokenizer_child import ChildTokenizer
path = Path(sys.argv[1])
used = ChildTokenizer(path.read_bytes(), path, "a test")
expected = {text: used.encode(text) for text in ("hello", "a cat")}
used._lock.acquire()  # as a thread that is in a call
number = os.fork()
if number == 0:
    right = {text: used.encode(text) for text in expected} == expected
    used.close()
    os._exit(0 if right else 1)
_, status = os.waitpid(number, 0)
used._lock.release()
assert status == 0
assert {text: used.encode(text) for text in expected} == expected
"""


@posix
def test_both_sides_of_a_fork_have_a_process(nano_json, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(nano_json)
    command = [sys.executable, "-P", "-W", "ignore", "-c", _FORK, str(tmp_path / "tokenizer.json")]
    subprocess.run(command, check=True, timeout=60)


def test_no_thread_is_started_for_a_call(child, expected, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert child.encode("a cat") == expected["a cat"]


@posix
def test_a_system_that_starts_no_process_is_one_sentence(child, expected):
    import resource

    child.close()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(UserError, match="needs a process of its own"):
            child.encode("a cat")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert child.encode("a cat") == expected["a cat"]


def test_a_copy_has_a_process_of_its_own(child, expected):
    copy = pickle.loads(pickle.dumps(child))
    assert copy._process.pid != child._process.pid
    copy.close()
    assert child.encode("hello") == expected["hello"]


def repeated(kind: str, key: str) -> dict:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50}
    return {"type": kind, key: [step] * 8}


HARMFUL = {
    "a normalizer that multiplies": {"normalizer": repeated("Sequence", "normalizers")},
    "a decoder that multiplies": {"decoder": repeated("Sequence", "decoders")},
    "a table that panics": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
    "an empty prefix": {"normalizer": {"type": "Prepend", "prepend": ""}},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "words without the unknown one": {
        "model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "[UNK]"}
    },
    "unigrams without the unknown one": {
        "model": {"type": "Unigram", "unk_id": None, "vocab": [["b", -1.0]]}
    },
    "BPE without its unknown token": {
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": {"b": 0}, "merges": []}
    },
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_a_harmful_tokenizer_is_one_sentence_and_the_program_lives(kind, nano_json, tmp_path, capfd):
    used = load(nano_json, tmp_path, {"added_tokens": [], **HARMFUL[kind]})
    assert isinstance(used, ChildTokenizer)
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer.* another model"):
        used.decode(used.encode("hello, a cat has a hat, and a bat has a mat"))
    assert used.encode("") == []
    assert capfd.readouterr().err == ""


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SEQUENCE_A, BOS = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|pad|>", "type_id": 0}}


def template(*pieces: dict) -> dict:
    special = {"<|pad|>": {"id": "<|pad|>", "ids": [0], "tokens": ["<|pad|>"]}}
    return {
        "type": "TemplateProcessing",
        "single": list(pieces),
        "pair": [SEQUENCE_A],
        "special_tokens": special,
    }


def sequence(key: str, *steps: dict) -> dict:
    return {"type": "Sequence", key: list(steps)}


QWEN2_STEPS = sequence("pretokenizers", split_step({"Regex": QWEN2_PATTERN}), BYTE_LEVEL)
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"normalizer": {"type": "NFC"}, "pre_tokenizer": QWEN2_STEPS, "post_processor": BYTE_LEVEL},
        {"pre_tokenizer": sequence("pretokenizers", DIGITS, {**BYTE_LEVEL, "use_regex": True})},
        {"post_processor": sequence("processors", BYTE_LEVEL, template(BOS, SEQUENCE_A))},
        {"normalizer": sequence("normalizers", {"type": "NFKC"}, {"type": "Lowercase"})},
    ],
    ids=["nano", "Qwen2", "SmolLM", "Llama 3", "lower case"],
)  # fmt: skip
def test_the_tokenizers_of_known_models_stay_in_the_program_with_equal_ids(change, nano_json, tmp_path):
    used = load(nano_json, tmp_path, change)
    assert isinstance(used, LibraryTokenizer)
    apart = ChildTokenizer((tmp_path / "tokenizer.json").read_bytes(), tmp_path / "tokenizer.json", "a test")
    for text in (*TEXTS, "It's 2024: naïve 🙂\n"):
        assert used.encode(text) == apart.encode(text)
        assert used.decode(used.encode(text)) == apart.decode(used.encode(text))
    apart.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pre_tokenizer": sequence("pretokenizers", BYTE_LEVEL, BYTE_LEVEL)}, "its pre-tokenizer"),
        ({"pre_tokenizer": split_step({"String": "a"})}, "its pre-tokenizer"),
        ({"pre_tokenizer": sequence("pretokenizers", *[DIGITS] * 9)}, "its pre-tokenizer"),
        ({"pre_tokenizer": sequence("pretokenizers", sequence("pretokenizers", DIGITS))}, "its pre-tokenizer"),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, "its normalizer"),
        ({"post_processor": template(SEQUENCE_A, SEQUENCE_A)}, "its post-processor"),
        ({"decoder": {"type": "Fuse"}}, "its decoder is Fuse"),
    ],
)  # fmt: skip
def test_steps_that_are_not_on_the_list_run_apart(change, reason, nano_json, tmp_path):
    used = load(nano_json, tmp_path, change)
    assert isinstance(used, ChildTokenizer)
    assert reason in used.description
    used.close()


@pytest.mark.parametrize("kind", ["a table that panics", "words without the unknown one"])
def test_what_the_library_raises_in_the_program_is_one_sentence(kind, nano_json, tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({**json.loads(nano_json), "added_tokens": [], **HARMFUL[kind]})
    )
    used = LibraryTokenizer.from_file(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizers library fails on this text"):
        used.encode("a cat")
    with pytest.raises(UserError, match="fails on these token ids"):
        used.decode([-1])


def test_tables_that_are_cut_after_loading_still_give_their_ids(nano_json, expected, tmp_path):
    """The system would kill a process that reads a mapped file past its new end."""
    (tmp_path / "tokenizer.json").write_bytes(nano_json)
    assert write_tables(tmp_path / "tokenizer.json", tmp_path) is None
    tables = load_tokenizer(tmp_path)
    os.truncate(tmp_path / TABLES, 0)
    assert {text: tables.encode(text) for text in TEXTS} == expected
    assert tables.decode(expected["a cat"]) == "a cat"
