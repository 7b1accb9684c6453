"""Coverage-guided mutants (atheris, libFuzzer) of what is parsed in Python alone: guided.py BUNDLE [RUNS] [SEED].

Each kind runs in a process of its own, one on each core, and starts from the right files. Ends with status 0 where
atheris is not installed; its wheels exist for some versions of Python only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KINDS = (
    *(
        "bundle-manifest",
        "bundle-config",
        "bundle-prior",
        "bundle-tokenizer-tables",
        "memory",
        "frame",
    ),
    *("recipe", "profile", "report", "checkpoint-config"),
)
RUNS = 300


def main() -> None:
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: no coverage-guided mutants.")
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from seed_files import write_seeds

    bundle, runs, seed = Path(sys.argv[1]), *(sys.argv[2:] + [str(RUNS), "1"][len(sys.argv) - 2 :])
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds"
        write_seeds(seeds, bundle)

        def run(name: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-P", __file__, "--kind", name, str(seeds), folder, runs, seed]
            return subprocess.run(command, capture_output=True, text=True, errors="replace")

        failures = []
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for name, child in zip(KINDS, pool.map(run, KINDS), strict=True):
                print(
                    f"{name}: {runs} guided mutants from seed {seed}, status {child.returncode}", flush=True
                )
                if child.returncode:
                    failures.append(name)
                    output = (child.stdout + child.stderr).splitlines()
                    print("\n".join(line for line in output if not line.startswith("INFO"))[-4000:])
    sys.exit(1 if failures else 0)


def guide(name: str, seeds: Path, folder: Path, runs: str, seed: str) -> None:
    """Run one kind in this process; libFuzzer ends the process, with a status of its own after a defect."""
    import atheris

    sys.path.insert(0, str(Path(__file__).parent))
    with atheris.instrument_imports(include=["microvlm"]):
        import kinds

        import microvlm.bench.report
        import microvlm.commands.info
        import microvlm.loaded_model
        import microvlm.memory.facts
        import microvlm.training.recipe  # noqa: F401
        from microvlm.errors import UserError

    scratch = Path(tempfile.mkdtemp(dir=folder))
    kind = kinds.KINDS[name](seeds, scratch)
    corpus = Path(tempfile.mkdtemp(dir=folder))
    for number, content in enumerate(kind.originals):
        (corpus / str(number)).write_bytes(content)

    def use(content: bytes) -> None:
        kind.put(content)
        with contextlib.suppress(UserError, kinds.Refused):
            kind.use()

    longest = 2 * max(map(len, kind.originals), default=10_000)
    options = [f"-runs={runs}", f"-seed={seed}", f"-max_len={longest}", "-timeout=30", "-rss_limit_mb=2000"]
    atheris.Setup([__file__, *options, f"-artifact_prefix={scratch}/", str(corpus)], use)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--kind"]:
        guide(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5], sys.argv[6])
    else:
        main()
