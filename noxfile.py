"""Development sessions: `nox -s NAME`, or `bash .ci/nox -s NAME` where nox is not installed.

Arguments after -- are passed through. Sessions that test this machine's wheel share one environment: PyTorch is
installed once, and the wheel that `build` checks is the one that the others run.
"""

import os
import shutil
import sys
from pathlib import Path

import nox

CONSTRAINTS = ("-c", ".ci/constraints.txt")
PACKAGES = ("microvlm", "exporters", "backends", "bench", "training", "plugins")
SOURCES = (*PACKAGES, "tests", "setup.py", "noxfile.py", ".ci")
# The default model is timed; sessions that compare, mutate and kill take the small one.
MODEL, SMALL_MODEL = "photo", "nano"
OLDEST_PYTHON = "3.11"
# Tests that need nothing but Python packages; pyproject.toml says what each marker means.
QUICK = "not (slow or native or emulated or ssh or build or export or pages or training or fetched)"
# COMMAND=PACKAGE: apt installs the package where the command is missing.
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
    "zsh=zsh",
    "fish=fish",
    "sixel2png=libsixel-bin",
)
PAGE_TOOLS = ("chromium=chromium", "npm=npm")
AXE = "axe-core@4.14.1"
# One process per core. The tests of a file share fixtures, so they stay together; tests/conftest.py orders the files.
PROCESSES = ("--numprocesses", "auto", "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder")
TEST_RUNNERS = ("pytest", "pytest-xdist", "hypothesis", "pyyaml", "nox", "httpx", "openai")
WHEEL_TOOLS = ("build", "ziglang", "auditwheel")
# llama-cpp-python has no wheels on the package index; xllamacpp has llama.cpp inside of its own.
PEERS = ("xllamacpp>=2026.10", "onnxruntime-genai>=0.18", "gguf>=0.10")
SHARED = Path(".nox", "shared").resolve()
NO_NATIVE = {"MICROVLM_BUILD_NATIVE": "0"}
# Windows would read files in the user's own encoding.
UTF8 = {"PYTHONUTF8": "1"}

built_wheels: list[Path] = []
exported: dict[str, Path] = {}

nox.options.sessions = ["lint", "build", "equivalence", "fuzz", "tests", "pi"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def quick(session: nox.Session) -> None:
    """Lint, and the tests that need Python alone: under two minutes on two cores"""
    session.install("-e", ".[dev]", *CONSTRAINTS, env=NO_NATIVE)
    check_style(session)
    session.run("python", "-m", "pytest", "-m", QUICK, *PROCESSES, *session.posargs, env=UTF8)


@nox.session
def trackio(session: nox.Session) -> None:
    """Test the tracker trackio, which needs an older Pillow than the other sessions have"""
    session.install("-e", ".[trackers]", *TEST_RUNNERS, env=NO_NATIVE)
    session.run("python", "-m", "pytest", "tests/test_watching_tracking.py", *session.posargs)


@nox.session(python=OLDEST_PYTHON)
def lowest(session: nox.Session) -> None:
    """The quick tests on the oldest Python and packages that pyproject.toml allows: gigabytes, minutes"""
    session.install("uv")
    install = ("uv", "pip", "install", "-q")
    # pip always takes the newest. The extra dev is left out: transformers needs newer packages than we do.
    session.run(*install, "--resolution", "lowest-direct", "-e", ".[train,bench,serve]", env=NO_NATIVE)
    session.run(*install, *TEST_RUNNERS, *CONSTRAINTS)
    session.run("uv", "pip", "list")
    session.run("python", "-m", "pytest", "-m", QUICK, *PROCESSES, *session.posargs, env=UTF8)


@nox.session
def latest(session: nox.Session) -> None:
    """The quick tests on the newest versions of all packages, before CI's own are moved"""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[dev]", env=NO_NATIVE)
    session.run("python", "-m", "pip", "list")
    session.run("python", "-m", "pytest", "-m", QUICK, *PROCESSES, *session.posargs, env=UTF8)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Every test but the slow ones, on this machine's wheel"""
    need(session, *TEST_TOOLS)
    install(session, "dev")
    run(session, "pytest", *PROCESSES, "--durations", "60", *session.posargs)


@nox.session(venv_backend="none")
def slow(session: nox.Session) -> None:
    """Tests that take gigabytes or minutes"""
    need(session, *TEST_TOOLS, *BOARD)
    install(session, "dev")
    run(session, "pytest", "-m", "slow", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and mypy"""
    session.install("ruff", "mypy", "click", "numpy", "msgspec", "nox", *CONSTRAINTS)
    check_style(session)


@nox.session(venv_backend="none")
def page(session: nox.Session) -> None:
    """Drive the pages of serve and report in Chromium, and send a thousand requests, a third hostile"""
    need(session, *COMPILER, *PAGE_TOOLS)
    install(session, "dev", "playwright")
    folder = session.create_tmp()
    session.run("npm", "install", "--silent", "--prefix", folder, AXE, external=True)
    axe = f"{folder}/node_modules/axe-core/axe.min.js"
    run(
        session,
        "pytest",
        "tests/page/page_in_a_browser.py",
        "tests/page/report_in_a_browser.py",
        *session.posargs,
        AXE=axe,
        SHOTS=f"{folder}/shots",
    )
    run(session, "python", "-P", "tests/page/load.py")


@nox.session
def elsewhere(session: nox.Session) -> None:
    """Run bundles in optimum, onnxruntime-genai, optimum-onnx and lmms-eval: gigabytes, three environments"""
    bundles = Path(session.create_tmp(), "bundles")
    shutil.rmtree(bundles, ignore_errors=True)
    bundles.mkdir()
    session.install(".[export]", "./plugins/optimum", "onnxruntime-genai>=0.18", "pytest", *CONSTRAINTS)
    for model in (SMALL_MODEL, MODEL):
        session.run("microvlm-export", model, "--genai", "-o", str(bundles / model))
    variables = {"BUNDLES": str(bundles), "PYTHONSAFEPATH": "1"}
    session.run("pytest", "tests/elsewhere/optimum_plugin.py", "tests/elsewhere/genai.py", env=variables)
    # Their packages and this environment's exclude each other. torchvision's wheels are of another torch than CI's, and
    # lmms-eval imports a module that later versions of filelock lack.
    for name, packages, unwanted in (
        ("ort_model", ("optimum-onnx==0.1.0",), ()),
        ("lmms", ("lmms-eval==0.7.3", "filelock==3.20.0"), ("torchvision",)),
    ):
        folder = Path(session.create_tmp(), name)
        session.run(sys.executable, "-m", "venv", str(folder), external=True)
        python = str(folder / "bin" / "python")
        pip = (python, "-m", "pip", "-q")
        torch = ("torch==2.13.0", "onnxruntime==1.32.0", "pytest")
        session.run(*pip, "install", ".", *packages, *torch, env=NO_NATIVE, external=True)
        if unwanted:
            session.run(*pip, "uninstall", "-y", *unwanted, external=True)
        environment = {**variables, "MICROVLM_NATIVE": "0"}
        session.run(python, "-m", "pytest", f"tests/elsewhere/{name}.py", env=environment, external=True)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Export photo at 1.58 bits, time and compare it on every backend here; ends with a report's path"""
    need(session, *COMPILER, *EMULATOR)
    install(session, "bench")
    (bundle,) = export(session, MODEL)
    folder = SHARED / "report"
    folder.mkdir(exist_ok=True)
    store = str(folder / "results.jsonl")
    measured = ("-o", str(folder / "run.json"), "--store", store)
    run(session, "microvlm-bench", "run", bundle, *measured, *session.posargs)
    compared = ("--images", "12", "-o", str(folder / "equivalence.json"), "--store", store)
    run(session, "microvlm-bench", "equivalence", bundle, *compared)
    page = str(folder / "report.html")
    run(session, "microvlm-bench", "report", str(folder), "docs/results", "--html", page, "--store", store)


@nox.session
def peers(session: nox.Session) -> None:
    """Time llama.cpp, genai and PyTorch beside ours: `-- BUNDLE... --gguf FILE`, else at full size"""
    need(session, *COMPILER)
    session.install(".[export]", "pytest", *PEERS, *CONSTRAINTS)
    bundle = str(Path(session.create_tmp(), SMALL_MODEL))
    session.run("microvlm-export", SMALL_MODEL, "--genai", "--force", "-o", bundle, silent=True)
    session.run("pytest", "tests/elsewhere/peers.py", env={"BUNDLE": bundle, "PYTHONSAFEPATH": "1"})
    session.run("microvlm-bench", "peers", *session.posargs)


@nox.session(venv_backend="none")
def equivalence(session: nox.Session) -> None:
    """Compare PyTorch and ONNX Runtime; exit status 1 when they are not the same model"""
    need(session, *COMPILER)
    install(session, "bench")
    bundles = export(session, SMALL_MODEL, MODEL)
    for bundle, samples in zip(bundles, ((), ("--images", "6")), strict=True):
        run(session, "python", ".ci/equivalence.py", bundle, *samples, *session.posargs)


@nox.session(venv_backend="none")
def verdicts(session: nox.Session) -> None:
    """Hold `microvlm-bench compare` to its bar: 20 comparisons with a slowed kernel, 20 without"""
    need(session, *COMPILER)
    install(session, "bench", "cmake")
    (bundle,) = export(session, SMALL_MODEL)
    run(session, "python", "-P", ".ci/compare_bar.py", bundle, *session.posargs)


@nox.session(venv_backend="none")
def road(session: nox.Session) -> None:
    """From photographs that packages carry to a trained, exported, captioning model; `-- 120` steps"""
    need(session, *COMPILER)
    install(session, "dev")
    run(session, "python", ".ci/road.py", session.create_tmp(), *session.posargs)


@nox.session(venv_backend="none")
def fuzz(session: nox.Session) -> None:
    """20 mutated files of every kind: right or refused; `-- --count 3000` takes an hour"""
    need(session, *COMPILER)
    install(session, "dev")
    (bundle,) = export(session, SMALL_MODEL)
    run(session, "python", "-P", "tests/fuzz", "--bundle", bundle, *session.posargs or ["--count", "20"])
    # Wheels of atheris exist for some versions of Python only.
    guided = ("python", "-m", "pip", "install", "-q", "--only-binary", "atheris", "atheris", *CONSTRAINTS)
    session.run(*(str(SHARED / "bin" / guided[0]), *guided[1:]), success_codes=[0, 1], silent=True)
    run(session, "python", "-P", "tests/fuzz/guided.py", bundle)


@nox.session(venv_backend="none")
def kills(session: nox.Session) -> None:
    """Kill every writer of files at each system call and at 200 random moments: old or new, and whole"""
    need(session, *COMPILER)
    install(session, "dev")
    (bundle,) = export(session, SMALL_MODEL)
    run(session, "python", "-P", "tests/kills", "--bundle", bundle, *session.posargs)


@nox.session
def native(session: nox.Session) -> None:
    """Test every kernel variant that runs here, and the glue with hostile graphs, under the sanitizers"""
    need(session, *COMPILER, "make=make")
    session.install("cmake", *CONSTRAINTS)
    # The thread sanitizer sees nothing new in nodes that run one after the other.
    for sanitizers, nodes in (("address,undefined", "20000"), ("thread", "2000")):
        out = f"{session.create_tmp()}/{sanitizers}"
        options = (f"-DMICROVLM_SANITIZE={sanitizers}", "-DMICROVLM_TESTS=ON")
        session.run("cmake", "-S", "backends/native", "-B", out, *options)
        session.run("cmake", "--build", out, "--target", "test_kernels", "test_glue", "--parallel", "2")
        session.run(f"{out}/test_kernels", external=True)
        session.run(f"{out}/test_glue", *session.posargs or [nodes], external=True)


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """Build this machine's wheel and check its contents"""
    need(session, *COMPILER)
    run(session, "python", "tests/check_wheel.py", str(wheel(session).parent))


@nox.session
def wheels(session: nox.Session) -> None:
    """Build wheels for x86-64 and aarch64 and run each alone, the second on an emulated Cortex-A53"""
    need(session, *EMULATOR)
    # This environment only exports and compares: zig builds the wheels, for each machine.
    session.install(".[export]", *WHEEL_TOOLS, "pytest", *CONSTRAINTS, env=NO_NATIVE)
    session.run("python", ".ci/wheels.py", *session.posargs or [session.create_tmp()])


@nox.session(venv_backend="none")
def pi(session: nox.Session) -> None:
    """Count instructions on an emulated Raspberry Pi; `-- --update-baseline` accepts a change"""
    tools = ("qemu-aarch64=qemu-user", "make=make", "llvm-mca=llvm", ARM_TOOLS[1])
    need(session, *COMPILER, *EMULATOR, *tools)
    # This environment exports and compares; zig builds the wheel whose instructions are counted.
    install(session, "bench", *WHEEL_TOOLS)
    run(session, "python", ".ci/pi.py", session.create_tmp(), *session.posargs)


@nox.session(name="pi-files")
def pi_files(session: nox.Session) -> None:
    """Write what a Raspberry Pi installs from to a folder: wheel, bundle, picture"""
    session.install(".[export]", *WHEEL_TOOLS, *CONSTRAINTS, env=NO_NATIVE)
    session.run("python", ".ci/pi_files.py", *session.posargs or ["board"])


@nox.session(name="pi-fit")
def pi_fit(session: nox.Session) -> None:
    """Measure memory of caption, chat and serve on emulated boards with 512 and 448 MB"""
    need(session, *EMULATOR, *BOARD)
    session.install(".[bench]", *WHEEL_TOOLS, *CONSTRAINTS, env=NO_NATIVE)
    session.run("python", ".ci/pi_fit.py", *session.posargs)


@nox.session(name="pi-install")
def pi_install(session: nox.Session) -> None:
    """Run every command of docs/raspberry-pi.md on an emulated board"""
    need(session, *EMULATOR, *BOARD)
    session.install(".[export]", *WHEEL_TOOLS, *CONSTRAINTS, env=NO_NATIVE)
    session.run("python", ".ci/pi_install.py", *session.posargs)


def check_style(session: nox.Session) -> None:
    """Runs ruff and mypy from the session's environment."""
    session.run("ruff", "check", *SOURCES)
    session.run("ruff", "format", "--check", *SOURCES)
    session.run("mypy", "microvlm", "setup.py")


def need(session: nox.Session, *packages: str) -> None:
    """Installs programs that pip does not bring; a machine without apt gets a list to install."""
    session.run("bash", ".ci/apt", *packages, external=True, silent=True)


def install(session: nox.Session, extra: str, *packages: str) -> None:
    """Installs this checkout's wheel with an extra, and `packages`, into the shared environment."""
    run(
        session, "python", "-m", "pip", "install", "-q", f"{wheel(session)}[{extra}]", *packages, *CONSTRAINTS
    )


def export(session: nox.Session, *models: str) -> list[str]:
    """Exports models at 1.58 bits with the shared environment, once per run of nox; returns the bundles' folders.

    Sessions that come later find the same bundles in the user's cache.
    """
    missing = [model for model in models if model not in exported]
    if missing:
        run(session, "python", ".ci/export.py", str(SHARED), *missing)
        exported.update((model, SHARED / model) for model in missing)
    return [str(exported[model]) for model in models]


def run(session: nox.Session, program: str, *arguments: str, **environment: str) -> None:
    """Runs a program of the shared environment, with that environment first on PATH."""
    path = os.pathsep.join([str(SHARED / "bin"), os.environ["PATH"]])
    session.run(str(SHARED / "bin" / program), *arguments, env={"PATH": path, **environment})


def wheel(session: nox.Session) -> Path:
    """Builds and installs this checkout's wheel for this machine, once per run of nox; returns its path."""
    if not built_wheels:
        folder = SHARED / "wheel"
        session.run(sys.executable, "-m", "venv", str(SHARED))
        shutil.rmtree(folder, ignore_errors=True)
        pip = ("python", "-m", "pip", "-q")
        run(session, *pip, "wheel", ".", "--no-deps", "-w", str(folder), MICROVLM_BUILD_NATIVE="1")
        built_wheels.extend(folder.glob("*.whl"))
        # pip would keep an installed wheel of the same version.
        run(session, *pip, "install", str(built_wheels[0]), "--no-deps", "--force-reinstall")
    return built_wheels[0]
