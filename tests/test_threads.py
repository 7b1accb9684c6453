"""Threads that a machine cannot give: quotas of containers, limits of tasks, and absurd numbers."""

from __future__ import annotations

import _thread
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import microvlm
from microvlm.backends import load
from microvlm.backends.threads import check_threads, most_threads, pool_threads, usable_cores
from microvlm.bench.bench_command import command as bench
from microvlm.commands.main import cli
from microvlm.console import run_click
from microvlm.errors import UserError
from microvlm.exporters.export_command import command as export
from microvlm.training.train_command import command as train

ALONE = "microvlm.backends.threads.os.sched_getaffinity"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.linux
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "50000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        ({"proc/self/cgroup": "nonsense\n0::/\n", "sys/fs/cgroup/cpu.max": "x y z\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, 8),
    ],
)
def test_the_quota_of_a_container_is_seen(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(ALONE, lambda _: set(range(8)))
    assert usable_cores(machine(tmp_path, files)) == expected


def test_absurd_numbers_are_one_sentence_everywhere(speaking_bundle, speaking_checkpoint, capsys):
    for model, backend in (
        (speaking_bundle, "ort"),
        (speaking_bundle, "torch"),
        (speaking_checkpoint, "torch"),
    ):
        for threads in (0, -1, 100_000, 2**70):
            with pytest.raises(UserError, match="--threads is"):
                load(backend, model, threads)
    with pytest.raises(UserError, match="make sense on this machine"):
        microvlm.load(speaking_bundle, threads=100_000)
    for arguments in (
        ["caption", "x.png", "--threads", "100000"],
        ["chat", "--threads", "100000"],
        ["memory", "read", "x.mem", "--question", "x", "--threads", "0"],
    ):
        with pytest.raises(SystemExit) as exit_info:
            run_click(cli, [*arguments, "--model", str(speaking_bundle)])
        assert exit_info.value.code == 2
        assert "--threads" in capsys.readouterr().err
    assert check_threads(most_threads()) == most_threads()


NO_MODEL = "no-such-model"
HUGE = "9" * 30


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        (cli, ["caption", "x.png", "--max-new-tokens", HUGE], "--max-new-tokens is 9"),
        (cli, ["caption", "x.png", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (cli, ["caption", "x.png", "--temperature", "nan"], "--temperature is nan"),
        (cli, ["caption", "x.png", "--temperature", "inf"], "--temperature is inf"),
        (cli, ["caption", "x.png", "--temperature", "-1"], "--temperature is -1"),
        (cli, ["chat", "--top-p", "nan"], "--top-p is nan"),
        (cli, ["chat", "--top-p", "inf"], "--top-p is inf"),
        (cli, ["chat", "--seed", "-1"], "--seed is -1"),
        (cli, ["chat", "--seed", "9" * 5000], "--seed"),
        (bench, ["run", NO_MODEL, "--threads", "100000"], "--threads is 100000"),
        (bench, ["run", NO_MODEL, "--repeats", HUGE], "--repeats is 9"),
        (bench, ["run", NO_MODEL, "--warmup", HUGE], "--warmup is 9"),
        (bench, ["run", NO_MODEL, "--new-tokens", HUGE], "--new-tokens is 9"),
        (bench, ["equivalence", NO_MODEL, "--images", HUGE], "--images is 9"),
        (bench, ["full", NO_MODEL, "--rounds", HUGE], "--rounds is 9"),
        (bench, ["kernels", "--seconds", "inf"], "--seconds is inf"),
        (bench, ["kernels", "--seconds", "nan"], "--seconds is nan"),
        (bench, ["kernels", "--batch", HUGE], "--batch 9"),
        (bench, ["kernels", "--threads", "1,100000"], "--threads is 100000"),
        (bench, ["memory", NO_MODEL, "--edits", HUGE], "--edits is 9"),
        (bench, ["memory", NO_MODEL, "--facts", "-1"], "--facts is -1"),
        (bench, ["pi", NO_MODEL, "--answer-tokens", HUGE], "--answer-tokens is 9"),
        (export, [NO_MODEL, "--threads", "100000"], "--threads is 100000"),
        (export, [NO_MODEL, "--bits", "nan"], "--bits nan"),
        (export, [NO_MODEL, "--bits", "inf"], "--bits inf"),
        (export, [NO_MODEL, "--threads", "auto"], "--threads auto is not possible here"),
        (train, ["--data", "x", "-o", "x", "--threads", "auto"], "the floats of a training step depend"),
        (train, ["designs", "--start", "x", "--data", "x", "--threads", "auto"], "--threads auto"),
        (bench, ["train", NO_MODEL, "--threads", "auto"], "--threads auto"),
        (bench, ["run", NO_MODEL, "--threads", "all"], "'all'"),
        (train, ["--data", "x", "-o", "x", "--threads", "100000"], "--threads is 100000"),
        (train, ["--data", "x", "-o", "x", "--workers", "100000"], "100000"),
    ],
)
def test_numbers_beyond_reason_are_one_sentence_before_a_model_loads(program, arguments, sentence, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_click(program, arguments)
    err = capsys.readouterr().err
    assert (exit_info.value.code, err.count("\n")) == (2, 1), err
    assert sentence in err
    assert NO_MODEL not in err
    assert len(err) < 3000


def test_an_answer_longer_than_the_model_is_refused_before_it_is_measured(speaking_bundle, capsys):
    for arguments in (
        ["run", "--backend", "ort", "--new-tokens", "100000", str(speaking_bundle)],
        ["full", "--new-tokens", "100000", str(speaking_bundle)],
        ["pi", "--part", "equivalence", "--answer-tokens", "100000", str(speaking_bundle)],
    ):
        with pytest.raises(SystemExit) as exit_info:
            run_click(bench, arguments)
        assert exit_info.value.code == 2
        assert "positions for" in capsys.readouterr().err


def refusing_after(count: int, monkeypatch: pytest.MonkeyPatch, start=_thread.start_new_thread) -> None:
    """Let at most `count` threads be started at the same time, as a limit of tasks does."""
    live = threading.Semaphore(count)

    def limited(function: Callable[[], None], arguments: tuple) -> int:
        if not live.acquire(blocking=False):
            raise RuntimeError("can't start new thread")

        def run() -> None:
            function()
            live.release()

        return start(run, arguments)

    monkeypatch.setattr(_thread, "start_new_thread", limited)


@pytest.mark.linux
def test_a_thread_that_dies_without_a_word_is_one_that_cannot_be_started(monkeypatch):
    """As one does that has no memory for its first line: Thread.start() waits for it for ever."""
    monkeypatch.setattr("microvlm.backends.threads._START_S", 0.05)
    monkeypatch.setattr(_thread, "start_new_thread", lambda function, arguments: 0)
    with pytest.raises(UserError, match="start 0 threads more; give --threads 1"):
        pool_threads(4)


def test_threads_that_cannot_be_started_are_refused_or_fewer_are_taken(monkeypatch):
    monkeypatch.setattr(ALONE, lambda _: set(range(8)), raising=False)
    cores = usable_cores()
    refusing_after(6, monkeypatch)
    assert pool_threads(7) == 7
    with pytest.raises(UserError, match="start 6 threads more; give --threads 7"):
        pool_threads(8)
    with pytest.raises(UserError, match="give --threads 3"):
        pool_threads(4, pools=3)
    assert pool_threads(None) == min(cores, 7)
    assert pool_threads(None, pools=3) == min(cores, 3)
    refusing_after(0, monkeypatch)
    assert pool_threads(None, pools=9) == 1
    assert pool_threads(1, pools=9) == 1


@pytest.mark.linux
@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_a_user_with_few_tasks_gets_an_answer_or_a_sentence_in_seconds(
    backend, speaking_bundle, public_folder
):
    """Eight threads, where three tasks are allowed, once waited for ever."""
    Image.new("RGB", (32, 32), "red").save(public_folder / "a.png")
    rights = "+dac_override,+dac_read_search"  # to this Python and the bundle, wherever they are
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", f"--inh-caps={rights}"]
    limited = [*user, f"--ambient-caps={rights}", "prlimit", "--nproc=3", sys.executable, "-P", "-c"]
    environment = {**os.environ, "HOME": str(public_folder), "OMP_NUM_THREADS": "2"}

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*limited, program, *arguments],
            cwd=public_folder,
            env=environment,
            capture_output=True,
            timeout=120,
        )

    if not shutil.which("setpriv") or not shutil.which("prlimit") or run("").returncode:
        pytest.skip("needs setpriv and prlimit of util-linux")
    main = "from microvlm.cli import main; main()"
    caption = ["caption", "a.png", "--model", str(speaking_bundle), "--backend", backend]
    results = [run(main, *caption, *flags) for flags in ([], ["--threads", "8"], ["--threads", "1"])]
    assert [result.returncode for result in results] == [0, 2, 0], results
    assert b"give --threads" in results[1].stderr
    assert results[0].stdout == results[2].stdout
