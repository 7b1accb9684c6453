"""`--threads auto`: which number of threads is chosen, of which, and that it is measured once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_threads import ALONE, machine

import microvlm
from microvlm.backends import load
from microvlm.backends.thread_choice import CHOICES, ThreadTrial, candidates, choose, measure
from microvlm.backends.threads import usable_cores
from microvlm.bench.threads_flag import number_of_threads
from microvlm.errors import UserError
from microvlm.serve.messages import Job, ModelSpec, pack, unpack

ROOT = Path(__file__).parent.parent


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Two usable processors, whatever this machine has, and an empty cache, which is returned."""
    monkeypatch.setattr(ALONE, lambda _: {0, 1}, raising=False)
    monkeypatch.setenv("MICROVLM_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield tmp_path / "cache"
    torch.set_num_threads(threads)


def trials(*answers: tuple[int, float]) -> list[ThreadTrial]:
    return [ThreadTrial(threads, 0.5 * ms, 0.2 * ms, 0.3 * ms) for threads, ms in answers]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([(1, 100.0)], 1),
        ([(1, 100.0), (2, 60.0)], 2),
        ([(1, 100.0), (2, 98.0)], 1),  # a tie
        ([(1, 100.0), (2, 60.0), (3, 50.0), (4, 55.0)], 3),  # three beat four
        ([(1, 100.0), (2, 60.0), (3, 50.0), (4, 49.9)], 3),
        ([(1, 100.0), (2, 98.0), (3, 96.0)], 2),  # within the tie of the fastest, not of each other
        ([(1, 4.2), (2, 94.8)], 1),
    ],
)
def test_the_fastest_number_is_chosen_and_fewer_threads_of_equals(answers, expected):
    assert choose(trials(*answers)) == expected
    assert choose(trials(*reversed(answers))) == expected


def test_every_part_of_an_answer_counts():
    """Two threads are faster at pictures and slower at tokens, as where small products wait for a second thread."""
    assert choose([ThreadTrial(1, 20.0, 3.0, 8.0), ThreadTrial(2, 12.0, 2.0, 10.0)]) == 2
    assert choose([ThreadTrial(1, 20.0, 3.0, 8.0), ThreadTrial(2, 12.0, 2.0, 30.0)]) == 1


def test_the_numbers_that_are_timed():
    assert candidates(1) == [1]
    assert candidates(4) == [1, 2, 3, 4]
    assert candidates(8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert candidates(24) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24]
    assert candidates(64)[-1] == 64
    assert len(candidates(256)) < 30


@pytest.mark.linux
def test_a_quota_of_one_and_a_half_processors_allows_one_or_two(tmp_path, monkeypatch):
    monkeypatch.setattr(ALONE, lambda _: set(range(8)))
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}
    assert candidates(usable_cores(machine(tmp_path, files))) == [1, 2]


@pytest.mark.linux
@pytest.mark.skipif(not shutil.which("taskset"), reason="needs taskset of util-linux")
def test_a_process_bound_to_one_processor_takes_one_thread(speaking_bundle, tmp_path):
    first = min(os.sched_getaffinity(0))
    program = (
        "import sys; from microvlm.backends import load; from microvlm.backends.threads import usable_cores; "
        "print(usable_cores(), load('ort', sys.argv[1], 'auto').threads)"
    )
    result = subprocess.run(
        ["taskset", "--cpu-list", str(first), sys.executable, "-c", program, str(speaking_bundle)],
        env={**os.environ, "MICROVLM_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "1 1\n"), result.stderr
    assert "--threads auto: 1, as no more are usable here" in result.stderr
    assert not (tmp_path / CHOICES).exists()


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_answers_of_a_real_model_are_timed_with_each_number(backend, speaking_bundle, two_cores):
    runtime = load(backend, speaking_bundle, 1)
    used: list[int] = []

    def with_threads(threads: int):
        changed = runtime.with_threads(threads)
        used.append(changed.threads)
        return changed

    measured = measure(with_threads, [1, 2])
    assert [trial.threads for trial in measured] == [1, 2]
    assert used[:2] == [1, 2]
    assert min(min(trial.vision_ms, trial.prefill_ms, trial.decode_ms) for trial in measured) > 0


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_a_model_is_measured_once_and_the_choice_of_the_cache_is_taken(
    backend, speaking_bundle, two_cores, capsys
):
    first = load(backend, speaking_bundle, "auto")
    assert "an answer with 2 takes" in capsys.readouterr().err
    (file,) = (two_cores / CHOICES).iterdir()
    choice = json.loads(file.read_text())
    assert first.threads == choice["threads"] == choose([ThreadTrial(**trial) for trial in choice["trials"]])
    other = 3 - choice["threads"]
    file.write_text(json.dumps({**choice, "threads": other}))
    assert load(backend, speaking_bundle, "auto").threads == other
    assert backend != "torch" or torch.get_num_threads() == other
    err = capsys.readouterr().err
    assert f"--threads auto: {other}: an answer with 1 takes" in err
    assert "timing answers" not in err
    assert number_of_threads("auto", speaking_bundle, backend) == other
    assert number_of_threads(3, speaking_bundle, backend) == 3


@pytest.mark.parametrize("content", ["", "{}", '{"threads": 7, "trials": [], "measured": ""}'])
def test_a_damaged_choice_is_measured_again(content, speaking_bundle, two_cores, capsys):
    load("ort", speaking_bundle, "auto")
    (file,) = (two_cores / CHOICES).iterdir()
    capsys.readouterr()
    file.write_text(content)
    assert load("ort", speaking_bundle, "auto").threads in (1, 2)
    assert "timing answers" in capsys.readouterr().err
    assert json.loads(file.read_text())["threads"] in (1, 2)


def test_backends_and_bundles_have_choices_of_their_own(speaking_bundle, two_cores, tmp_path):
    load("ort", speaking_bundle, "auto")
    other = shutil.copytree(speaking_bundle, tmp_path / "other")
    load("ort", other, "auto")
    assert len(list((two_cores / CHOICES).iterdir())) == 1  # the same files elsewhere
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    load("ort", other, "auto")
    load("torch", other, "auto")
    assert len(list((two_cores / CHOICES).iterdir())) == 3


@pytest.mark.posix
def test_without_a_cache_it_is_measured_and_said(speaking_bundle, two_cores, monkeypatch, capsys):
    two_cores.write_text("no folder")
    runtime = load("ort", speaking_bundle, "auto")
    assert runtime.threads in (1, 2)
    assert "it is measured again next time" in capsys.readouterr().err


def test_other_words_are_refused(speaking_bundle):
    with pytest.raises(UserError, match="give a number, or auto"):
        microvlm.load(speaking_bundle, threads="fast")


def test_the_server_hands_auto_to_its_worker():
    job = Job("load", ModelSpec("nano", "nano", "ort", "auto"))
    assert unpack(pack(job)[4:], Job).model.threads == "auto"


@pytest.mark.linux
def test_the_bundled_model_answers_with_a_measured_number_of_threads(tmp_path):
    command = [
        *(sys.executable, "-m", "microvlm", "caption", str(ROOT / "bench/evalset/images/1f355.png")),
        *("--model", "nano", "--backend", "torch", "--threads"),
    ]
    environment = {**os.environ, "MICROVLM_CACHE": str(tmp_path)}
    auto, one = (
        subprocess.run([*command, threads], env=environment, capture_output=True, text=True)
        for threads in ("auto", "1")
    )
    assert (auto.returncode, auto.stdout) == (0, "pizza\n"), auto.stderr
    assert one.stdout == auto.stdout
    assert auto.stderr.startswith("--threads auto: ")
    assert one.stderr == ""
