"""Development sessions. `bash .ci/nox -s NAME` runs one on a fresh machine; arguments after -- are passed through.

Those that work with this machine's own wheel share it, and an environment: PyTorch is installed once, and what `build`
checks is what the others run.
"""

import os
import shutil
import sys
from pathlib import Path

import nox

CONSTRAINTS = ("-c", ".ci/constraints.txt")
SOURCES = ("microvlm", "exporters", "backends", "bench", "training", "tests", "setup.py", "noxfile.py", ".ci")
MODEL = "nano"
# COMMAND=PACKAGE: installed by apt where the command is missing.
COMPILER = ("c++=g++",)
EMULATOR = ("qemu-aarch64-static=qemu-user-static",)
BOARD = ("qemu-system-aarch64=qemu-system-arm", "mke2fs=e2fsprogs")
ARM_TOOLS = (
    "aarch64-linux-gnu-g++=g++-aarch64-linux-gnu",
    "aarch64-linux-gnu-objdump=binutils-aarch64-linux-gnu",
)
TEST_TOOLS = (
    *COMPILER,
    "cmake=cmake",
    "make=make",
    *ARM_TOOLS,
    *EMULATOR,
    "qemu-aarch64=qemu-user",
    "llvm-mca=llvm",
    "/usr/sbin/sshd=openssh-server",
    "ssh=openssh-client",
    "mke2fs=e2fsprogs",
)
# A process a core; the tests of a file share what they made, and stay together. tests/conftest.py orders the files.
PROCESSES = ("--numprocesses", "auto", "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder")
WHEEL_TOOLS = ("build", "ziglang", "auditwheel")
SHARED = Path(".nox", "shared").resolve()
NO_NATIVE = {"MICROVLM_BUILD_NATIVE": "0"}

built: list[Path] = []

nox.options.sessions = ["lint", "build", "equivalence", "tests", "pi"]
nox.options.reuse_existing_virtualenvs = True


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The fast test set."""
    need(session, *TEST_TOOLS)
    install(session, "dev")
    run(session, "pytest", *PROCESSES, "--durations", "20", *session.posargs)


@nox.session(venv_backend="none")
def slow(session: nox.Session) -> None:
    """Tests that take gigabytes or minutes."""
    need(session, *TEST_TOOLS, *BOARD)
    install(session, "dev")
    run(session, "pytest", "-m", "slow", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and the type checker."""
    session.install("ruff", "mypy", "click", "numpy", "nox", *CONSTRAINTS)
    session.run("ruff", "check", *SOURCES)
    session.run("ruff", "format", "--check", *SOURCES)
    session.run("mypy", "microvlm", "setup.py")


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """The main job: export the bundled checkpoint at 1.58 bit, bench it on every backend that runs here."""
    need(session, *COMPILER)
    install(session, "bench")
    bundle = f"{session.create_tmp()}/{MODEL}"
    run(session, "microvlm-export", MODEL, "-o", bundle, "--bits", "1.58", "--force")
    run(session, "microvlm-bench", "run", bundle, *session.posargs)


@nox.session(venv_backend="none")
def equivalence(session: nox.Session) -> None:
    """Are PyTorch and ONNX Runtime the same model? Exit status 1 when they are not."""
    need(session, *COMPILER)
    install(session, "bench")
    bundle = f"{session.create_tmp()}/{MODEL}"
    run(session, "microvlm-export", MODEL, "-o", bundle, "--bits", "1.58", "--force")
    run(session, "python", ".ci/equivalence.py", bundle, *session.posargs)


@nox.session
def native(session: nox.Session) -> None:
    """The native kernels under the sanitizers: every variant that runs here against the reference."""
    need(session, *COMPILER, "make=make")
    session.install("cmake", *CONSTRAINTS)
    for sanitizers in ("address,undefined", "thread"):
        out = f"{session.create_tmp()}/{sanitizers}"
        options = (f"-DMICROVLM_SANITIZE={sanitizers}", "-DMICROVLM_TESTS=ON")
        session.run("cmake", "-S", "backends/native", "-B", out, *options)
        session.run("cmake", "--build", out, "--target", "test_kernels")
        session.run(f"{out}/test_kernels", external=True)


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """The wheel, and what is in it."""
    need(session, *COMPILER)
    run(session, "python", "tests/check_wheel.py", str(wheel(session).parent))


@nox.session
def wheels(session: nox.Session) -> None:
    """Wheels for x86-64 and aarch64, each run where nothing else is: the second on an emulated Cortex-A53."""
    need(session, *EMULATOR)
    # The session's own copy only exports and compares: the wheels are built by zig, for each machine.
    session.install(".[export]", *WHEEL_TOOLS, "pytest", *CONSTRAINTS, env=NO_NATIVE)
    session.run("python", ".ci/wheels.py", *session.posargs or [session.create_tmp()])


@nox.session(venv_backend="none")
def pi(session: nox.Session) -> None:
    """Would it still run on a Raspberry Pi, and at the same cost? `-- --update-baseline` accepts a change."""
    need(session, *COMPILER, *EMULATOR, "qemu-aarch64=qemu-user", "make=make")
    # The session's own copy exports and compares; the wheel that is counted is built by zig.
    install(session, "bench", *WHEEL_TOOLS)
    run(session, "python", ".ci/pi.py", session.create_tmp(), *session.posargs)


@nox.session(name="pi-files")
def pi_files(session: nox.Session) -> None:
    """What a Raspberry Pi is given to install from, in the folder that is named: wheel, bundle, picture."""
    session.install(".[export]", *WHEEL_TOOLS, *CONSTRAINTS, env=NO_NATIVE)
    session.run("python", ".ci/pi_files.py", *session.posargs or ["board"])


@nox.session(name="pi-fit")
def pi_fit(session: nox.Session) -> None:
    """Caption and chat in an emulated board with 512 MB and with 448, no swap: peaks, what is left, the OOM killer."""
    need(session, *EMULATOR, *BOARD)
    session.install(".[bench]", *WHEEL_TOOLS, *CONSTRAINTS, env=NO_NATIVE)
    session.run("python", ".ci/pi_fit.py", *session.posargs)


@nox.session(name="pi-install")
def pi_install(session: nox.Session) -> None:
    """Every command of docs/raspberry-pi.md on an emulated board, from the distribution and the package index."""
    need(session, *EMULATOR, *BOARD)
    session.install(".[export]", *WHEEL_TOOLS, *CONSTRAINTS, env=NO_NATIVE)
    session.run("python", ".ci/pi_install.py", *session.posargs)


def need(session: nox.Session, *packages: str) -> None:
    """Programs that pip does not bring."""
    session.run("bash", ".ci/apt", *packages, external=True, silent=True)


def install(session: nox.Session, extra: str, *packages: str) -> None:
    """This copy with an extra, and packages, into the shared environment."""
    run(
        session, "python", "-m", "pip", "install", "-q", f"{wheel(session)}[{extra}]", *packages, *CONSTRAINTS
    )


def run(session: nox.Session, program: str, *arguments: str, **environment: str) -> None:
    """A program of the shared environment, which finds the others there."""
    path = os.pathsep.join([str(SHARED / "bin"), os.environ["PATH"]])
    session.run(str(SHARED / "bin" / program), *arguments, env={"PATH": path, **environment})


def wheel(session: nox.Session) -> Path:
    """This machine's wheel of this copy, installed in the shared environment; built once a run of nox."""
    if not built:
        folder = SHARED / "wheel"
        session.run(sys.executable, "-m", "venv", str(SHARED))
        shutil.rmtree(folder, ignore_errors=True)
        pip = ("python", "-m", "pip", "-q")
        run(session, *pip, "wheel", ".", "--no-deps", "-w", str(folder), MICROVLM_BUILD_NATIVE="1")
        built.extend(folder.glob("*.whl"))
        # pip takes a wheel of the same version for what is installed.
        run(session, *pip, "install", str(built[0]), "--no-deps", "--force-reinstall")
    return built[0]
