"""The newest wheel in a folder: its only top-level name is microvlm, it is at most 25 MB, the parts are in it, and its
tag tells whether it carries the native library, for which machine and which glibc. Standard library only.
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_BYTES = 25_000_000
LIBRARY_LIMIT_BYTES = 1_000_000
LIBRARY = "microvlm/backends/native/libmicrovlm_ops.so"
REASON = "microvlm/backends/native/not_built.txt"
WANTED = (
    "microvlm/commands/main.py",
    "microvlm/serve/static/page.html",
    "microvlm/serve/static/page.css",
    "microvlm/serve/static/page.js",
    "microvlm/exporters/contract.py",
    "microvlm/backends/ort.py",
    "microvlm/backends/native/__init__.py",
    "microvlm/backends/emulation/__init__.py",
    "microvlm/backends/arm64/device/worker.py",
    "microvlm/bench/bench_command.py",
    "microvlm/training/recipes/nano.json",
    "microvlm/training/recipes/photo.json",
    "microvlm/training/emoji/data/test_emoji.txt",
    "microvlm/training/emoji/data/names.json",
    "microvlm/training/emoji/data/scene_objects.txt",
    "microvlm/training/photo/data/imagenet_names.json",
    "microvlm/training/photo/language/question_forms.json",
    "microvlm/bench/pi/profiles/zero2w.json",
    "microvlm/bench/pi/baselines/nano-cortex-a53.json",
    "microvlm/bench/pi/counting/sources/instruction_count.c",
    "microvlm/bench/evalset/evalset.json",
    "microvlm/bench/photographs/photographs.json",
    "microvlm/bench/memoryset/memoryset.json",
    *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("microvlm/checkpoints/*/*")),
    "microvlm/py.typed",
)
ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
# Where people and build machines keep sources; a library's own strings hold no such path.
HOST_PATH = re.compile(
    rb"(?:/(?:home|root|tmp|build|work|Users|mnt|opt|var)/|[\w.-]+/)[\w./+-]+\.(?:cpp|cc|hpp|h|o)\b"
)


def check(wheel: Path) -> list[str]:
    """Every complaint, one sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = archive.read(LIBRARY) if LIBRARY in names else None
        tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
        metadata = next(archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
    complaints = [f"top-level names are {sorted(tops)}, not microvlm alone"] if tops != {"microvlm"} else []
    complaints += [f"{name} is missing" for name in WANTED if name not in names]
    sources = [
        name for name in names if name.startswith("microvlm/backends/") and name.endswith((".cpp", ".h"))
    ]
    complaints += [f"{name} is a source of the library" for name in sources]
    complaints += (
        [] if (REASON in names) == (library is None) else [f"{REASON} and {LIBRARY}: not one of them"]
    )
    if wheel.stat().st_size > LIMIT_BYTES:
        complaints.append(f"{wheel.stat().st_size} bytes are over {LIMIT_BYTES}")
    python, abi, platform = wheel.stem.split("-")[-3:]
    if f"Tag: {python}-{abi}-{platform}" not in metadata or (python, abi) != ("py3", "none"):
        complaints.append(f"the tag {python}-{abi}-{platform} is not py3-none, or not that of WHEEL")
    if f"Root-Is-Purelib: {str(library is None).lower()}" not in metadata:
        complaints.append("Root-Is-Purelib does not tell whether there is a library")
    if library is None:
        return complaints + ([] if platform == "any" else [f"it is for {platform}, but has no library"])
    return complaints + check_library(library, platform)


def check_library(library: bytes, platform: str) -> list[str]:
    """Complaints about the library of a wheel for `platform`, as in `linux_x86_64` or `manylinux_2_17_aarch64`."""
    complaints = []
    machine = ELF_MACHINES.get(int.from_bytes(library[18:20], "little"), "another machine")
    if library[:4] != b"\x7fELF" or not platform.endswith(machine):
        complaints.append(f"the library is for {machine} and the wheel for {platform}")
    newest = max((int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library)), default=0)
    promised = re.match(r"manylinux_2_(\d+)_", platform)
    if promised and newest > int(promised[1]):
        complaints.append(f"the library needs glibc 2.{newest} and the wheel says 2.{promised[1]}")
    if promised and re.search(rb"lib(?:std)?c\+\+\.so", library):
        complaints.append("the library needs a C++ runtime, which manylinux does not promise at its version")
    if len(library) > LIBRARY_LIMIT_BYTES:
        complaints.append(f"the library's {len(library)} bytes are over {LIBRARY_LIMIT_BYTES}")
    paths = {match.group().decode() for match in HOST_PATH.finditer(library)}
    complaints += [
        f"the library holds the path {path} of the machine that built it" for path in sorted(paths)
    ]
    return complaints


def describe(wheel: Path) -> str:
    """One line: sizes."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    native = f"native library {sizes[LIBRARY]} bytes" if LIBRARY in sizes else "no native library"
    return f"{wheel.name}: {wheel.stat().st_size} bytes, {native}, microvlm only"


if __name__ == "__main__":
    newest = max(Path(sys.argv[1]).glob("*.whl"), key=lambda path: path.stat().st_mtime)
    complaints = check(newest)
    print("\n".join(complaints) or describe(newest))
    sys.exit(1 if complaints else 0)
