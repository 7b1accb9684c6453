"""Runs docs/raspberry-pi.md on an emulated board, command for command. `nox -s pi-install` runs it.

The board has what the page copies to its boot partition, the distribution's packages, and the package index that this
machine's pip is set to, certificates included. Exit status 1: a command failed or printed something else.
"""

from __future__ import annotations

import ast
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pi_files
import wheels

from microvlm.bench.pi.board.debian import as_user, open_debian

sys.path.insert(0, str(wheels.ROOT / "tests"))
import page_commands

PAGE = wheels.ROOT / "docs" / "raspberry-pi.md"
RAM_MB = 512
TIMEOUT_S = 3600
CERTIFICATES = "pip-certificates.crt"


def pip_settings() -> dict[str, str]:
    """Files for /etc: what this machine's pip needs to reach its index, less what lies on this machine's disk."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    settings: dict[str, str] = {}
    for line in sorted(listed.stdout.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = ast.literal_eval(value)
    files = {}
    lines = ["[global]"]
    for name in ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout"):
        urls = [url for url in settings.get(name, "").split() if not url.startswith(("file:", "/"))]
        if urls:
            lines.append(f"{name} = {' '.join(urls)}")
    if settings.get("cert"):
        files[CERTIFICATES] = Path(settings["cert"]).read_text()
        lines.append(f"cert = /etc/{CERTIFICATES}")
    return {**files, "pip.conf": "".join(f"{line}\n" for line in lines)}


def main() -> int:
    steps = page_commands.read_steps(PAGE)
    mark = f"--{secrets.token_hex(8)}--"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "board"
        with wheels.step("what the board is given"):
            pi_files.make(folder)
        board = open_debian(RAM_MB, {"board": folder}, pip_settings())
        with wheels.step(f"{len(steps)} commands on the board"):
            (outcome,) = board.run([as_user(page_commands.script(steps, mark))], TIMEOUT_S)
    print(outcome.stdout)
    available_mb = outcome.available_bytes / 1e6
    print(
        f"peak RSS {outcome.peak_rss_bytes / 1e6:.1f} MB, at least {available_mb:.1f} MB left, OOM: {outcome.oom}"
    )
    wrong = [*page_commands.complaints(steps, outcome.stdout, mark), *outcome.oom_victims]
    print(*wrong, sep="\n\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
