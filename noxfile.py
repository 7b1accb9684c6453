"""Development sessions. `bash .ci/nox -s NAME` runs one on a fresh machine; arguments after -- are passed through."""

import nox

CONSTRAINTS = ("-c", ".ci/constraints.txt")
SOURCES = ("microvlm", "exporters", "backends", "bench", "training", "tests", "noxfile.py")
PACKAGES = ("microvlm", "exporters", "backends", "bench", "training")
MODEL = "nano"

nox.options.sessions = ["lint", "build", "equivalence", "tests"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def tests(session: nox.Session) -> None:
    """The fast test set."""
    session.install(".[dev]", *CONSTRAINTS)
    session.run("pytest", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that take gigabytes or minutes."""
    session.install(".[dev]", *CONSTRAINTS)
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and the type checker."""
    session.install("ruff", "mypy", "click", "numpy", "nox", *CONSTRAINTS)
    session.run("ruff", "check", *SOURCES)
    session.run("ruff", "format", "--check", *SOURCES)
    session.run("mypy", *PACKAGES)


@nox.session
def bench(session: nox.Session) -> None:
    """The main job: export the bundled checkpoint at 1.58 bit, bench it on every backend that runs here."""
    session.install(".[bench]", *CONSTRAINTS)
    bundle = f"{session.create_tmp()}/{MODEL}"
    session.run("microvlm-export", MODEL, "-o", bundle, "--bits", "1.58", "--force")
    session.run("microvlm-bench", "run", bundle, *session.posargs)


@nox.session
def equivalence(session: nox.Session) -> None:
    """Are PyTorch and ONNX Runtime the same model? Exit status 1 when they are not."""
    session.install(".[bench]", *CONSTRAINTS)
    bundle = f"{session.create_tmp()}/{MODEL}"
    session.run("microvlm-export", MODEL, "-o", bundle, "--bits", "1.58", "--force")
    session.run("microvlm-bench", "equivalence", bundle, *session.posargs)


@nox.session
def native(session: nox.Session) -> None:
    """The native kernels under the sanitizers: every variant that runs here against the reference."""
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
    session.install("build")
    out = session.create_tmp()
    session.run("python", "-m", "build", "--wheel", "--outdir", out)
    session.run("python", "tests/check_wheel.py", out)
