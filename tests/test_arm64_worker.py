"""The worker on this machine gives the bits of `ort`, keeps values, and survives the death of its process."""

from __future__ import annotations

import functools
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from microvlm.backends import load
from microvlm.backends.arm64 import worker_link
from microvlm.backends.arm64.device import machine_facts
from microvlm.backends.arm64.device_runtime import Arm64Runtime
from microvlm.backends.arm64.frames import GREETING, read_frame, write_frame
from microvlm.backends.arm64.remote_values import DeviceArray
from microvlm.backends.arm64.transports import local
from microvlm.backends.arm64.transports.local import WORKER
from microvlm.backends.arm64.transports.worker_process import WorkerProcess
from microvlm.errors import UserError
from microvlm.generation import GenerationOptions, Prompt, embed_prompt, generate
from microvlm.runtime import MemoryArrays

OPTIONS = GenerationOptions(max_new_tokens=12)
LONG = GenerationOptions(max_new_tokens=200)
"""Long enough that most of it is still to come when the first token is there."""
ROWS = 5


@pytest.fixture(scope="module")
def ort(speaking_bundle: Path):
    return load("ort", speaking_bundle, threads=1)


@pytest.fixture
def device_runtime(speaking_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Arm64Runtime:
    monkeypatch.setattr(worker_link, "DELAYS_S", (0, 0.1, 0.1))
    # A small pipe of some fifty tokens: most of an answer is still to come when the first token is read.
    monkeypatch.setattr(local, "WorkerProcess", functools.partial(WorkerProcess, pipesize=4096))
    return load("ort-arm64", speaking_bundle, threads=1, target="local")


@pytest.fixture(scope="module")
def prompt(ort) -> Prompt:
    random = np.random.default_rng(0)
    ids = random.integers(4, 290, (2, 9))
    ids[:, :4] = 3
    pixels = random.standard_normal((2, 3, 32, 32)).astype(np.float32)
    return embed_prompt(ort, ids, np.ones((2, 9), np.int64), pixels, 3)


def memory_after_writes(runtime, prompt: Prompt, rows: int = ROWS) -> MemoryArrays:
    """The memory after `rows` writes and one forget."""
    state = runtime.memory_prior()
    latent, key = runtime.memory_encode(prompt.inputs_embeds[:1], prompt.attention_mask[:1])
    for row in range(rows):
        state = runtime.memory_write(np.roll(key, row, 1), latent + np.float32(row), state)
    return runtime.memory_forget(key, latent, state)


def decoded_logits(runtime, prompt: Prompt, steps: int, between=lambda step: None) -> np.ndarray:
    """Logits of a prefill and `steps` decode steps by the runtime's own methods."""
    slot = runtime.memory_read(*_query(runtime, prompt), memory_after_writes(runtime, prompt)).slot
    mask = np.ones((1, 10), np.int64)
    logits, past = runtime.decode(prompt.inputs_embeds[:1], mask, np.arange(1, 10)[None], slot, 9)
    rows = [logits[0]]
    for step in range(steps):
        between(step)
        mask = np.concatenate([mask, np.ones((1, 1), np.int64)], 1)
        embeds = runtime.embed_tokens(np.array([[7 + step]]))
        logits, past = runtime.decode(embeds, mask, np.array([[10 + step]]), past)
        rows.append(logits[0])
    return np.concatenate(rows)


def _query(runtime, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    latent, key = runtime.memory_encode(prompt.inputs_embeds[:1], prompt.attention_mask[:1])
    return key, latent


def kill(runtime: Arm64Runtime) -> None:
    """The worker's whole process group, as the kernel kills: without a last word."""
    os.killpg(runtime.pid, signal.SIGKILL)


def test_every_graph_gives_the_bits_of_ort(ort, device_runtime: Arm64Runtime, prompt: Prompt) -> None:
    pixels = np.random.default_rng(1).standard_normal((2, 3, 32, 32)).astype(np.float32)
    assert np.array_equal(device_runtime.encode_image(pixels), ort.encode_image(pixels))
    assert np.array_equal(decoded_logits(device_runtime, prompt, 4), decoded_logits(ort, prompt, 4))
    ours, theirs = memory_after_writes(device_runtime, prompt), memory_after_writes(ort, prompt)
    assert all(
        np.array_equal(ours_array, theirs_array)
        for ours_array, theirs_array in zip(ours, theirs, strict=True)
    )


def test_the_decode_loop_runs_on_the_worker_and_reports_each_token_at_once(
    ort, device_runtime: Arm64Runtime, prompt: Prompt
) -> None:
    tokens: list[tuple[int, int]] = []
    result = generate(
        device_runtime,
        prompt,
        OPTIONS,
        memory_after_writes(device_runtime, prompt),
        lambda *pair: tokens.append(pair),
    )
    expected = generate(ort, prompt, OPTIONS, memory_after_writes(ort, prompt))
    assert result.tokens == expected.tokens
    assert (result.steps, result.stopped) == (expected.steps, expected.stopped)
    assert result.log_probabilities == expected.log_probabilities
    assert [len(row) for row in result.log_probabilities] == [12, 12]
    assert tokens == [(row, result.tokens[row][n]) for n in range(12) for row in range(2)]
    assert result.timings_ms["decode"] > 0


def test_sampling_on_the_worker_equals_sampling_here(
    ort, device_runtime: Arm64Runtime, prompt: Prompt
) -> None:
    options = GenerationOptions(max_new_tokens=8, temperature=3.0, top_p=0.9, seed=4, stop_tokens=(1,))
    there, here = (generate(runtime, prompt, options) for runtime in (device_runtime, ort))
    assert there.tokens == here.tokens
    assert there.log_probabilities == here.log_probabilities


def test_caches_and_states_stay_on_the_device_until_somebody_looks(
    device_runtime: Arm64Runtime, prompt: Prompt
) -> None:
    state = memory_after_writes(device_runtime, prompt)
    assert isinstance(state.mean, DeviceArray)
    assert state.mean.shape == (1, 16, 48)
    assert len(state.mean) == 1
    value_count = device_runtime.condition()["values"]
    mean = np.asarray(state.mean)
    assert np.array_equal(state.mean - mean, np.zeros_like(mean))
    assert np.array_equal(state.mean[0, 3], mean[0, 3])
    assert np.array_equal(np.concatenate([state.mean, state.mean]), np.concatenate([mean, mean]))
    assert state.mean.max() == mean.max()
    with pytest.raises(ValueError, match="read-only"):
        mean[0] = 0
    # What nobody needs goes with the next request, and a long chain leaves its last link only.
    assert value_count == 2
    del state
    assert device_runtime.condition()["values"] == 0


def test_a_worker_killed_between_steps_is_replaced_and_its_cache_made_again(
    ort, device_runtime: Arm64Runtime, prompt: Prompt, capfd: pytest.CaptureFixture
) -> None:
    steps_before_death = (2, 5)
    value_counts: list[int] = []

    def between(step: int) -> None:
        value_counts.append(device_runtime.condition()["values"])
        if step in steps_before_death:
            kill(device_runtime)

    assert np.array_equal(decoded_logits(device_runtime, prompt, 7, between), decoded_logits(ort, prompt, 7))
    assert capfd.readouterr().err.count("local was lost; connecting again") == 2
    # Making it again leaves nothing behind: two tensors a layer of the cache, of the slot, and nothing of the memory.
    assert max(value_counts) == min(value_counts)


def test_a_worker_killed_while_it_speaks_says_every_token_once(
    ort, device_runtime: Arm64Runtime, prompt: Prompt, capfd: pytest.CaptureFixture
) -> None:
    tokens: list[tuple[int, int]] = []

    def hear(row: int, token: int) -> None:
        tokens.append((row, token))
        if len(tokens) == 1:
            kill(device_runtime)

    result = generate(device_runtime, prompt, LONG, memory_after_writes(device_runtime, prompt), hear)
    assert result.tokens == generate(ort, prompt, LONG, memory_after_writes(ort, prompt)).tokens
    assert tokens == [(row, result.tokens[row][n]) for n in range(200) for row in range(2)]
    assert capfd.readouterr().err.count("local was lost; connecting again") == 1


def test_a_request_that_kills_every_worker_is_given_up(device_runtime: Arm64Runtime, prompt: Prompt) -> None:
    with pytest.raises(UserError, match="lost its worker 3 times over one request"):
        generate(device_runtime, prompt, LONG, None, lambda *_: kill(device_runtime))
    assert len(generate(device_runtime, prompt, OPTIONS).tokens[0]) == 12


def test_a_fetched_state_outlives_its_worker_without_repeating_its_runs(
    ort, device_runtime: Arm64Runtime, prompt: Prompt
) -> None:
    state = memory_after_writes(device_runtime, prompt)
    before = [np.asarray(part) for part in state]
    assert state.mean.output.run.inputs == []
    kill(device_runtime)
    key, latent = _query(device_runtime, prompt)
    after = device_runtime.memory_write(key, latent, state)
    expected = ort.memory_write(key, latent, MemoryArrays(*before))
    assert all(
        np.array_equal(array, expected_array) for array, expected_array in zip(after, expected, strict=True)
    )


def test_the_rest_of_an_interrupted_answer_does_not_reach_the_next_request(
    ort, device_runtime: Arm64Runtime, prompt: Prompt
) -> None:
    def interrupt(row: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(device_runtime, prompt, LONG, None, interrupt)
    assert generate(device_runtime, prompt, OPTIONS).tokens == generate(ort, prompt, OPTIONS).tokens


def test_an_opened_graph_runs_on_the_weights_of_the_bundle_even_after_a_loss(
    ort, device_runtime: Arm64Runtime
) -> None:
    ids = np.array([[5, 60, 7]])
    device_runtime.open_model("mine", ort.graph_path("embed_tokens").read_bytes())
    for _ in range(2):
        outputs = device_runtime.run_model("mine", {"input_ids": ids}, ["inputs_embeds"])
        assert np.array_equal(outputs["inputs_embeds"].numpy(), ort.embed_tokens(ids))
        kill(device_runtime)


@pytest.fixture
def new_worker() -> Iterator[subprocess.Popen]:
    """A worker that has greeted and loaded nothing."""
    process = subprocess.Popen(
        [sys.executable, *WORKER], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.read(len(GREETING) + 1) == GREETING + b"\n"
    yield process
    process.stdin.close()
    assert process.wait(300) is not None
    process.stdout.close()


def test_a_malformed_request_ends_the_worker_with_a_sentence(new_worker: subprocess.Popen) -> None:
    new_worker.stdin.write(b"GET / HTTP/1.1\r\nHost: raspberrypi\r\n\r\n")
    header, _ = read_frame(new_worker.stdout)
    assert header == {
        "id": None,
        "error": "the worker could not read a request: a frame began with b'GET ': something else writes into the "
        "connection.",
    }
    assert new_worker.wait(300) == 1


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"do": "run", "graph": "decoder"}, "needs a bundle first"),
        ({"do": "load", "bundle": "/nowhere", "settings": {}}, "/nowhere is not a folder"),
        ({"do": "load"}, "a request to the device: 'bundle' is missing: use the same microvlm on both sides"),
        ({"do": "load", "bundle": ["x"]}, "'bundle' must be text"),
        ({"do": ["load"], "free": 3}, "needs a bundle first"),
        ({}, "needs a bundle first"),
    ],
)
def test_a_bad_request_is_answered_and_the_worker_goes_on(
    new_worker: subprocess.Popen, request_: dict, sentence: str
) -> None:
    write_frame(new_worker.stdin, {"id": 1, **request_})
    header, _ = read_frame(new_worker.stdout)
    assert sentence in header["error"]
    write_frame(new_worker.stdin, {"id": 2, "do": "condition"})
    assert read_frame(new_worker.stdout)[0]["id"] == 2


def test_a_worker_that_writes_garbage_is_refused_in_one_sentence(
    device_runtime: Arm64Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speaking_bundle: Path
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho {GREETING.decode()}\ncat /dev/urandom | head -c 1000\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(UserError, match=r"^local: a frame began with .*something else writes"):
        load("ort-arm64", speaking_bundle, target="local")
    program.write_text("#!/bin/sh\necho the SD card is gone >&2\nexit 4\n")
    with pytest.raises(UserError, match=r"did not start .*\(status 4\): the SD card is gone\.$"):
        load("ort-arm64", speaking_bundle, target="local")


def test_a_worker_of_another_version_is_refused_at_once_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speaking_bundle: Path
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho microvlm-worker 3\nexec cat\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(UserError, match="speaks version 3 of the protocol and this side version 2"):
        load("ort-arm64", speaking_bundle, target="local")


SUPERVISED = """
import os, sys
from microvlm.backends.arm64.device.supervisor import supervise
def work(activity):
    activity.set(sys.argv[1])
    os.kill(os.getpid(), int(sys.argv[2]))
sys.exit(supervise(work, print))
"""


def run_supervised(action: str, end: int) -> tuple[int, str]:
    completed = subprocess.run(
        [sys.executable, "-c", SUPERVISED, action, str(int(end))], capture_output=True, text=True
    )
    return completed.returncode, completed.stdout.strip()


def test_a_missing_instruction_and_full_memory_have_different_sentences() -> None:
    status, output = run_supervised("importing onnxruntime 1.21.0", signal.SIGILL)
    assert status == 1
    assert output == (
        "this processor lacks an instruction (SIGILL) that was needed while importing onnxruntime 1.21.0: "
        "install another version of onnxruntime."
    )
    assert "out of memory" in run_supervised("running decoder_model_merged", signal.SIGKILL)[1]
    assert "SIGSEGV while running x" in run_supervised("running x", signal.SIGSEGV)[1]
    assert run_supervised("waiting", signal.SIGTERM) == (1, "")


def test_a_version_known_to_crash_is_refused_where_it_crashes_only() -> None:
    a53 = ["fp", "asimd", "evtstrm", "crc32", "cpuid"]
    assert machine_facts.crash_of("1.21.0", "aarch64", a53)
    assert not machine_facts.crash_of("1.21.0", "aarch64", [*a53, "fphp", "asimdhp"])
    assert not machine_facts.crash_of("1.32.0", "aarch64", a53)
    assert not machine_facts.crash_of("1.21.0", "x86_64", [])


def test_settings_reach_the_device_and_unknown_ones_are_refused(speaking_bundle: Path, ort) -> None:
    settings = {"allow_spinning": True, "arena": True, "native": False}
    runtime = load("ort-arm64", speaking_bundle, 2, target="local", **settings)
    assert runtime.threads == 2
    assert runtime.kernels.startswith("function bodies in the graphs on ")
    ids = np.array([[5, 60, 7]])
    assert np.array_equal(runtime.embed_tokens(ids), ort.embed_tokens(ids))
    with pytest.raises(UserError, match="no option 'turbo'"):
        load("ort-arm64", speaking_bundle, target="local", turbo=True)


def test_output_of_a_library_does_not_reach_the_stream_of_frames() -> None:
    program = (
        "import os, sys\n"
        "from microvlm.backends.arm64.device import worker\n"
        "class Loud(worker.Worker):\n"
        "    def answer(self, request, tensors):\n"
        "        print('a library speaks')\n"
        "        os.write(1, b'and so does C')\n"
        "        return super().answer(request, tensors)\n"
        "worker.Worker = Loud\n"
        "sys.exit(worker.main())\n"
    )
    request = io.BytesIO()
    write_frame(request, {"id": 1, "do": "condition"})
    completed = subprocess.run([sys.executable, "-c", program], input=request.getvalue(), capture_output=True)
    answers = io.BytesIO(completed.stdout)
    assert answers.readline() == GREETING + b"\n"
    assert read_frame(answers)[0]["pid"] > 0
    assert answers.read() == b""
    assert b"a library speaks" in completed.stderr
    assert b"so does C" in completed.stderr
