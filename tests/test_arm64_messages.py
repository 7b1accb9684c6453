"""Neither side of a frame believes the other: every changed header is understood or refused in one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from document_mutations import check_mutations

from microvlm.backends.arm64 import messages
from microvlm.backends.arm64.remote_values import RemoteGraphs
from microvlm.backends.arm64.transports.worker_process import WorkerProcess
from microvlm.backends.arm64.worker_link import BrokenWorker, WorkerLink, exchange
from microvlm.errors import UserError

DEVICE = {"machine": "aarch64", "cpu": "Cortex-A53", "features": ["fp"], "cores": 4}
HEADERS: list[tuple[type, dict[str, Any]]] = [
    (messages.Reply, {"id": 1, "error": "no", "damaged": "bundle", "event": "token"}),
    (messages.Loaded, {"id": 1, "device": DEVICE, "kernels": "native neon", "threads": 4}),
    (messages.Shapes, {"id": 1, "shapes": {"1": [1, 2], "2": []}}),
    (messages.TokenEvent, {"id": 1, "event": "token", "token": [0, 5]}),
    (
        messages.Spoken,
        {
            **{"tokens": [[1, 2]], "stopped": [True], "steps": 2, "timings_ms": {"decode": 1.5}},
            "log_probabilities": [[-0.5, -1.25, -0.0625]],
        },
    ),
    (
        messages.Run,
        {"graph": "decoder", "inputs": [None, 1], "keep": [2], "names": ["a", "b"], "outputs": ["c"]},
    ),
    (messages.Open, {"graph": "decoder:replay", "folder": "onnx"}),
    (messages.Speak, {"inputs": [None, 3], "options": {"max_new_tokens": 3}}),
    (messages.Missing, {"missing": {"config.json": 0}, "marked": False}),
    (
        messages.DevicePython,
        {
            **{
                "python": "3.11",
                "machine": "aarch64",
                "bits": 64,
                "c_library": ["glibc", "2.36"],
                "root": "/a",
            },
            "versions": {"numpy": None},
        },
    ),
]
# A worker that greets, answers `load`, and then answers every request with the next of the given headers.
HOSTILE = """
import json, os, sys
from microvlm.backends.arm64.frames import GREETING, Tensor, read_frame, write_frame
requests, answers = os.fdopen(0, "rb", 0), os.fdopen(1, "wb", 0)
answers.write(GREETING + b"\\n")
for header, floats in json.loads(sys.argv[1]):
    request, _ = read_frame(requests)
    tensors = tuple(Tensor("float32", (count,), bytes(4 * count)) for count in floats)
    write_frame(answers, {"id": request["id"], **header}, tensors)
read_frame(requests)
"""


class HostileTransport:
    """Starts the program above."""

    name = "a device"

    def __init__(self, *answers: tuple[dict[str, Any], list[int]]):
        loaded = ({"device": DEVICE, "kernels": "k", "threads": 1}, [])
        self._answers = json.dumps([loaded, *answers])

    def start(self, bundle: Path) -> tuple[WorkerProcess, str]:
        return WorkerProcess([sys.executable, "-P", "-c", HOSTILE, self._answers]), str(bundle)

    def explain(self, status: int, stderr: str) -> str:
        return f"status {status}: {stderr}"

    def mend(self, damage: Exception) -> None:
        raise damage


def graphs_of(*answers: tuple[dict[str, Any], list[int]]) -> RemoteGraphs:
    return RemoteGraphs(WorkerLink(HostileTransport(*answers), Path("bundle"), {}))


@pytest.mark.parametrize(("kind", "header"), HEADERS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_changed_header_is_a_record_or_one_sentence(kind: type, header: dict[str, Any]) -> None:
    def read(content: bytes) -> None:
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError):
            raise UserError("a frame's header is not a JSON object") from None  # `read_frame` says so
        messages.parse(parsed, kind, "a header")

    assert check_mutations(header, read, least_refused=0.3) > 20


@pytest.mark.parametrize("name", ["../x", "a/b", ".x", "a\\b", "", "x\0"])
def test_names_stay_in_their_folder(name: str) -> None:
    for request in ({"graph": name, "inputs": [], "keep": []}, {"graph": name, "folder": "onnx"}):
        with pytest.raises(UserError, match="'graph' must be text"):
            messages.parse(request, messages.Run if "keep" in request else messages.Open, "a request")
    for folder in ("/etc", "..", "a/../../b", "a/.."):
        with pytest.raises(UserError, match="'folder' must be text"):
            messages.parse({"graph": "g", "folder": folder}, messages.Open, "a request")


@pytest.mark.parametrize(
    ("answer", "floats", "sentence"),
    [
        ({"shapes": {}}, [3], "lacks 1 shapes"),
        ({"shapes": {"1": [-1]}}, [3], r"'shapes\[\.\.\.\]\[0\]' must be a whole number >= 0"),
        ({"shapes": {"1": [2]}}, [], "it has 0 tensors in place of 1"),
        ({"shapes": {"1": [2]}}, [1, 1], "it has 2 tensors in place of 1"),
        ({}, [3], "'shapes' is missing"),
        ({"error": 5}, [], "'error' must be text or null, not a whole number"),
        ({"error": "no\x1b[31m\n" * 999}, [], r"a device: no\\x1b\[31m\\n"),
        ({"id": None, "error": "out of memory."}, [], "a device: out of memory"),
        ({"id": 99}, [], "belongs to another request"),
        ({"damaged": "all of it", "error": "x"}, [], "'damaged' has the unknown value"),
    ],
)
def test_a_device_that_answers_wrongly_is_refused_in_one_sentence(
    answer: dict[str, Any], floats: list[int], sentence: str
) -> None:
    graphs = graphs_of((answer, floats))
    with pytest.raises(UserError, match=sentence) as refusal:
        graphs.run({"graph": "g"}, [], [True, False])
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 1200
    graphs.link.drop()


def test_a_device_that_changes_the_shape_of_a_value_is_refused() -> None:
    graphs = graphs_of(({"shapes": {"1": [2]}}, []), ({}, [3]))
    (value,) = graphs.run({"graph": "g"}, [], [True])
    with pytest.raises(UserError, match="an array has become float32 of another shape"):
        value.numpy()
    graphs.link.drop()


def test_an_answer_of_a_newer_worker_without_an_id_is_its_last_sentence() -> None:
    process = WorkerProcess([sys.executable, "-P", "-c", HOSTILE, json.dumps([({"id": None}, [])])])
    process.answers.read(len("microvlm-worker 2\n"))
    with pytest.raises(BrokenWorker, match="the worker ended"):
        exchange(process, {"id": 1, "do": "condition"})
    process.end(patience_s=1)


def test_the_installer_answers_malformed_requests_and_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MICROVLM_CACHE", str(tmp_path))
    command = [sys.executable, "-P", "-m", "microvlm.backends.arm64.device.installer"]
    process = WorkerProcess(command)
    process.answers.read(len("microvlm-worker 2\n"))
    for number, (request, sentence) in enumerate(
        [
            ({}, "malformed request"),
            ({"do": "_below"}, "malformed request"),
            ({"do": "root"}, "malformed request"),
            ({"do": ["look"]}, "malformed request"),
            ({"do": "look"}, "malformed request.*packages"),
            ({"do": "missing", "folder": 5, "files": {}}, "malformed request"),
            ({"do": "missing", "folder": "bundles/x", "files": {"a": 3}}, "malformed request"),
            ({"do": "put", "folder": "wheels", "name": "x", "offset": 0}, "malformed request"),
            ({"do": "exists", "folder": "../../etc"}, "outside of the cache"),
        ]
    ):
        with pytest.raises(UserError, match=sentence):
            exchange(process, {"id": number, **request})
    answer, _ = exchange(process, {"id": 100, "do": "look", "packages": ["numpy"]})
    assert messages.parse(answer, messages.DevicePython, "it").bits == 64
    process.end(patience_s=1)
