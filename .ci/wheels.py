"""Builds the wheels for x86-64 and aarch64, and runs each where nothing else is installed; needs ziglang, build,
auditwheel and microvlm[export] beside it, and QEMU. `nox -s wheels` provides them.

Both run every operator against its reference and caption the same pictures from one bundle; the captions must be equal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from microvlm.backends.emulation import EmulatedMachine, open_machine, runtime_requirements

ROOT = Path(__file__).resolve().parent.parent
TAG = "manylinux_2_17"
"""The platform tag names the oldest glibc that the compiler builds for (zig.cmake)."""
PICTURES = ("1f41c.png", "1f0cf.png", "1f191.png")
CAPTION = "import sys; from microvlm.commands.main import main; sys.argv[0] = 'microvlm'; main()"
Run = Callable[..., str]
"""Runs the Python of an environment with arguments -> what it prints."""


def build(machine: str, out: Path) -> Path:
    """The wheel for one kind of machine, checked by us and by auditwheel."""
    settings = {
        "CMAKE_TOOLCHAIN_FILE": str(ROOT / ".ci" / "zig.cmake"),
        "MICROVLM_ZIG_PYTHON": sys.executable,
        "MICROVLM_MACHINE": machine,
        "MICROVLM_BUILD_NATIVE": "1",
    }
    option = f"--config-setting=--build-option=bdist_wheel --plat-name={TAG}_{machine}"
    command = ["-m", "build", "--wheel", "--outdir", str(out / machine), option, str(ROOT)]
    log = python(*command, env={**os.environ, **settings})
    (out / f"{machine}.log").write_text(log)
    print(python(str(ROOT / "tests" / "check_wheel.py"), str(out / machine)), end="")
    wheel = next((out / machine).glob("*.whl"))
    audit = " ".join(python("-m", "auditwheel", "show", str(wheel)).split())
    if f'platform tag: "{TAG}_{machine}"' not in audit:
        raise SystemExit(f"auditwheel disagrees about {wheel.name}: {audit}")
    return wheel


def x86_environment(wheel: Path, folder: Path) -> Run:
    """A fresh virtual environment with the wheel and what it requires."""
    venv.create(folder, clear=True, with_pip=True)
    program = str(folder / "bin" / "python")
    constraints = str(ROOT / ".ci" / "constraints.txt")
    python("-m", "pip", "install", "--quiet", str(wheel), "-c", constraints, program=program)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONSAFEPATH": "1", "LANG": "C.UTF-8"}
    return lambda *arguments: python(*arguments, program=program, env=environment, cwd=folder)


def emulated_environment(wheel: Path) -> Run:
    """An emulated Cortex-A53 with the wheel, and what it requires at this environment's versions."""
    machine: EmulatedMachine = open_machine("cortex-a53", runtime_requirements(), [wheel])
    return lambda *arguments: checked(machine.run(*arguments, cwd="/"))


def exercise(run: Run, inputs: Path, bundle: Path) -> dict[str, Any]:
    """The document of smoke_wheel.py, and the captions of some images by `microvlm caption`."""
    document = json.loads(run(str(ROOT / "tests" / "smoke_wheel.py"), str(inputs)))
    pictures = [str(ROOT / "bench" / "evalset" / "images" / name) for name in PICTURES]
    arguments = ["--model", str(bundle), "--backend", "ort", "--threads", "2", "--json"]
    results = json.loads(run("-c", CAPTION, "caption", *pictures, *arguments))["results"]
    return {**document, "captions": [[result["caption"], result["tokens"]] for result in results]}


def python(*arguments: str, program: str = sys.executable, **options: Any) -> str:
    return checked(subprocess.run([program, *arguments], capture_output=True, text=True, **options))


def checked(process: subprocess.CompletedProcess[str]) -> str:
    """The output of a program. Exits with that output where the program failed."""
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, process.args))}\n{process.stdout}{process.stderr}")
    return process.stdout


@contextmanager
def step(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)


def main(out: Path) -> None:
    wheels = {}
    for machine in ("x86_64", "aarch64"):
        with step(f"build for {machine}"):
            wheels[machine] = build(machine, out)
    inputs, bundle = out / "inputs", out / "bundle"
    with step("export and smoke inputs"):
        python(str(ROOT / "tests" / "smoke_inputs.py"), str(inputs))
        export = "from microvlm.exporters.export_command import main; main()"
        python("-c", export, "nano", "-o", str(bundle), "--bits", "1.58", "--force", cwd=out)
    with step("install for x86_64"):
        host_python = x86_environment(wheels["x86_64"], out / "venv")
    with step("run on x86_64"):
        host = exercise(host_python, inputs, bundle)
    print(json.dumps(host))
    with step("install for aarch64"):
        device_python = emulated_environment(wheels["aarch64"])
    with step("run on an emulated Cortex-A53"):
        board = exercise(device_python, inputs, bundle)
    print(json.dumps(board))
    if (host["machine"], board["machine"]) != ("x86_64", "aarch64"):
        raise SystemExit("a wheel ran on another machine than its own.")
    if host["captions"] != board["captions"]:
        raise SystemExit("the captions of the two machines differ.")
    print(f"{host['operators']} operators exact on both machines, {len(PICTURES)} captions equal")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
