"""The newest wheel in a folder: its only top-level name is microvlm, it is at most 10 MB, and the parts are in it."""

import sys
import zipfile
from pathlib import Path

LIMIT_BYTES = 10_000_000
WANTED = (
    "microvlm/cli.py",
    "microvlm/exporters/contract.py",
    "microvlm/backends/ort.py",
    "microvlm/bench/cli.py",
    "microvlm/training/recipes/nano.json",
    "microvlm/training/data/test_emoji.txt",
    "microvlm/bench/evalset/evalset.json",
    "microvlm/checkpoints/nano/model.safetensors",
    "microvlm/checkpoints/nano/tokenizer.json",
    "microvlm/py.typed",
)


def check(wheel: Path) -> list[str]:
    """Every complaint, one sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    complaints = [f"top-level names are {sorted(tops)}, not microvlm alone"] if tops != {"microvlm"} else []
    complaints += [f"{name} is missing" for name in WANTED if name not in names]
    if wheel.stat().st_size > LIMIT_BYTES:
        complaints.append(f"{wheel.stat().st_size} bytes are over {LIMIT_BYTES}")
    return complaints


if __name__ == "__main__":
    newest = max(Path(sys.argv[1]).glob("*.whl"), key=lambda path: path.stat().st_mtime)
    found = check(newest)
    print("\n".join(found) or f"{newest.name}: {newest.stat().st_size} bytes, microvlm only")
    sys.exit(1 if found else 0)
