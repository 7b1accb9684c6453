"""ONNX Runtime's own reporting stays off: no thread, no file, whichever of our modules imports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# The official builds report from their import on; a build machine (CI) they leave alone by themselves.
PROGRAM = """
import json, os
import microvlm
if {reporting}:
    del os.environ["ORT_DISABLE_TELEMETRY"]
import onnxruntime
files = [name for _, _, names in os.walk(os.environ["HOME"]) for name in names]
print(json.dumps([os.environ.get("ORT_DISABLE_TELEMETRY"), len(os.listdir("/proc/self/task")), files]))
"""
KEPT = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH")


def imported(home, reporting: bool, **variables: str):
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"HOME": str(home), "OPENBLAS_NUM_THREADS": "1", **variables}
    program = PROGRAM.format(reporting=reporting)
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.linux
def test_nothing_is_reported_and_nothing_left_behind(tmp_path):
    silent, loud = tmp_path / "silent", tmp_path / "loud"
    value, threads, files = imported(silent, reporting=False)
    assert (value, files) == ("1", [])
    _, loud_threads, loud_files = imported(loud, reporting=True)
    if not loud_files:
        pytest.skip("this build of ONNX Runtime reports nothing anyway")
    assert loud_threads > threads


@pytest.mark.linux
def test_a_user_who_wants_it_may_have_it(tmp_path):
    value, _, _ = imported(tmp_path, reporting=False, ORT_DISABLE_TELEMETRY="0")
    assert value == "0"
