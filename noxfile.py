"""Development sessions. `bash .ci/nox -s NAME` runs one on a fresh machine; arguments after -- are passed through."""

import nox

CONSTRAINTS = ("-c", ".ci/constraints.txt")
PACKAGES = ("microvlm", "exporters", "backends", "bench", "training")
SOURCES = (*PACKAGES, "tests", "setup.py", "noxfile.py", ".ci")
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
# A process a core; the tests of a file share what they made, and stay together.
PROCESSES = ("--numprocesses", "auto", "--maxprocesses", "8", "--dist", "loadfile")
WHEEL_TOOLS = ("build", "ziglang", "auditwheel")
REQUIRE_NATIVE = {"MICROVLM_BUILD_NATIVE": "1"}
NO_NATIVE = {"MICROVLM_BUILD_NATIVE": "0"}

nox.options.sessions = ["lint", "build", "equivalence", "tests", "pi"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def tests(session: nox.Session) -> None:
    """The fast test set."""
    need(session, *TEST_TOOLS)
    session.install(".[dev]", *CONSTRAINTS, env=REQUIRE_NATIVE)
    session.run("pytest", *PROCESSES, *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that take gigabytes or minutes."""
    need(session, *TEST_TOOLS, *BOARD)
    session.install(".[dev]", *CONSTRAINTS, env=REQUIRE_NATIVE)
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and the type checker."""
    session.install("ruff", "mypy", "click", "numpy", "nox", *CONSTRAINTS)
    session.run("ruff", "check", *SOURCES)
    session.run("ruff", "format", "--check", *SOURCES)
    session.run("mypy", *PACKAGES, "setup.py")


@nox.session
def bench(session: nox.Session) -> None:
    """The main job: export the bundled checkpoint at 1.58 bit, bench it on every backend that runs here."""
    need(session, *COMPILER)
    session.install(".[bench]", *CONSTRAINTS, env=REQUIRE_NATIVE)
    bundle = f"{session.create_tmp()}/{MODEL}"
    session.run("microvlm-export", MODEL, "-o", bundle, "--bits", "1.58", "--force")
    session.run("microvlm-bench", "run", bundle, *session.posargs)


@nox.session
def equivalence(session: nox.Session) -> None:
    """Are PyTorch and ONNX Runtime the same model? Exit status 1 when they are not."""
    need(session, *COMPILER)
    session.install(".[bench]", *CONSTRAINTS, env=REQUIRE_NATIVE)
    bundle = f"{session.create_tmp()}/{MODEL}"
    session.run("microvlm-export", MODEL, "-o", bundle, "--bits", "1.58", "--force")
    session.run("microvlm-bench", "equivalence", bundle, *session.posargs)
    # Once more on stock ONNX Runtime: the operators' function bodies.
    session.run("microvlm-bench", "equivalence", bundle, *session.posargs, env={"MICROVLM_NATIVE": "0"})


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


@nox.session
def build(session: nox.Session) -> None:
    """The wheel, and what is in it."""
    need(session, *COMPILER)
    session.install("build", *CONSTRAINTS)
    out = session.create_tmp()
    session.run("python", "-m", "build", "--wheel", "--outdir", out, env=REQUIRE_NATIVE)
    session.run("python", "tests/check_wheel.py", out)


@nox.session
def wheels(session: nox.Session) -> None:
    """Wheels for x86-64 and aarch64, each run where nothing else is: the second on an emulated Cortex-A53."""
    need(session, *EMULATOR)
    # The session's own copy only exports and compares: the wheels are built by zig, for each machine.
    session.install(".[export]", *WHEEL_TOOLS, "pytest", *CONSTRAINTS, env=NO_NATIVE)
    session.run("python", ".ci/wheels.py", *session.posargs or [session.create_tmp()])


@nox.session
def pi(session: nox.Session) -> None:
    """Would it still run on a Raspberry Pi, and at the same cost? `-- --update-baseline` accepts a change."""
    need(session, *COMPILER, *EMULATOR, "qemu-aarch64=qemu-user", "make=make")
    # The session's own copy exports and compares; the wheel that is counted is built by zig.
    session.install(".[bench]", *WHEEL_TOOLS, *CONSTRAINTS, env=REQUIRE_NATIVE)
    session.run("python", ".ci/pi.py", session.create_tmp(), *session.posargs)


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
    """Every command of backends/arm64/INSTALL.md on an emulated board, from the distribution and the package index."""
    need(session, *EMULATOR, *BOARD)
    session.install(".[export]", *WHEEL_TOOLS, *CONSTRAINTS, env=NO_NATIVE)
    session.run("python", ".ci/pi_install.py", *session.posargs)


def need(session: nox.Session, *packages: str) -> None:
    """Programs that pip does not bring."""
    session.run("bash", ".ci/apt", *packages, external=True, silent=True)
