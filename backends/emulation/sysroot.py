"""Unpacks aarch64 Debian or Ubuntu packages with a Python into a folder, without root, chroot or containers.

Packages come from this machine's distribution and sources. apt resolves and verifies them under a separate
configuration: another architecture, no installed packages, its own state and cache.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from microvlm.backends.emulation.cache import STAMP, cached_folder
from microvlm.backends.emulation.cpus import CPUS, write_description
from microvlm.backends.emulation.progress import Progress
from microvlm.backends.emulation.sites import compile_library
from microvlm.errors import UserError

PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgomp1", "zlib1g")
LINKED = ("bin", "lib", "lib64", "sbin")
"""Links into /usr that a distribution's base package creates and unpacking does not."""

# The machine's `Post-Invoke` hooks are for its own packages.
_APT = """\
APT::Architecture "arm64";
#clear APT::Architectures;
APT::Architectures { "arm64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
Dir::State "@/state";
Dir::State::status "@/status";
Dir::Cache "@/cache";
Dir::Etc::sourcelist "@/sources.list";
Dir::Etc::sourceparts "@/sources.list.d";
"""


def ensure_sysroot(cpu: str, report: Progress, packages: Sequence[str] = PACKAGES) -> Path:
    """The tree for `qemu-aarch64 -L`, with the description of a board with `cpu`. Raises UserError."""
    if cpu not in CPUS:
        raise UserError(f"'{cpu}' is not an emulated CPU; choose one of {', '.join(CPUS)}.")
    # The tree is compiled only by a Python of the emulated version.
    recipe = {"system": system_name(), "packages": sorted(packages), "compiled": platform.python_version()}

    def build(folder: Path) -> None:
        unpack_packages(folder, packages, report)
        compile_library(folder)

    tree = cached_folder("sysroot", recipe, build)

    def link(view: Path) -> None:
        for entry in sorted(tree.iterdir()):
            if entry.name not in ("proc", "sys", STAMP):
                (view / entry.name).symlink_to(Path("..", tree.name, entry.name))
        write_description(CPUS[cpu], view)

    return cached_folder(cpu, {**recipe, "cpu": str(CPUS[cpu])}, link)


def system_name() -> str:
    """This machine's distribution, as in `debian 12`. Raises UserError where there is no apt."""
    missing = [program for program in ("apt-get", "dpkg-deb") if shutil.which(program) is None]
    if missing:
        raise UserError(f"{missing[0]} was not found: the emulated machine needs Debian or Ubuntu.")
    release = platform.freedesktop_os_release()
    return f"{release['ID']} {release.get('VERSION_ID', release.get('VERSION_CODENAME', ''))}"


def arm64_sources(sources: str) -> str:
    """apt sources for arm64: Ubuntu's mirrors of amd64 are replaced by the mirror of other architectures."""
    mirror = r"(?:https?://[\w.-]*\b(?:archive|security)\.ubuntu\.com/ubuntu|mirror\+file:/etc/apt/apt-mirrors\.txt)(?=[\s/])/?"
    text = re.sub(mirror, "http://ports.ubuntu.com/ubuntu-ports/", sources)
    # A source may name the machine's architecture.
    text = re.sub(r"\barch=[\w,-]+", "arch=arm64", text)
    return re.sub(r"(?m)^Architectures:.*$", "Architectures: arm64", text)


def unpack_packages(folder: Path, packages: Sequence[str], report: Progress) -> None:
    """Unpack `packages` and their dependencies into `folder`; uses a folder `apt` beside it meanwhile."""
    for _ in unpack_archives(folder, packages, report):
        pass
    for name in LINKED:
        if (folder / "usr" / name).is_dir() and not (folder / name).exists():
            (folder / name).symlink_to(f"usr/{name}")
    for unused in ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "var"):
        shutil.rmtree(folder / unused, ignore_errors=True)


def unpack_archives(folder: Path, packages: Sequence[str], report: Progress) -> Iterator[Path]:
    """Unpack all files of `packages` and their dependencies; yields each unpacked archive. Raises UserError."""
    apt = folder.with_name("apt")
    archives = _download(apt, packages, report)
    for count, archive in enumerate(archives):
        report("sysroot: unpacking", count / len(archives))
        _run(["dpkg-deb", "--extract", str(archive), str(folder)])
        yield archive
    shutil.rmtree(apt)
    report("sysroot: unpacking", 1)


def apt_sources(folder: Path = Path("/etc/apt")) -> dict[str, str]:
    """This machine's apt sources, changed for arm64: path below /etc/apt -> content."""
    paths = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    sources = [path for path in paths if path.suffix in (".list", ".sources") and path.is_file()]
    return {str(path.relative_to(folder)): arm64_sources(path.read_text()) for path in sources}


def _download(apt: Path, packages: Sequence[str], report: Progress) -> list[Path]:
    for name in ("state/lists/partial", "cache/archives/partial", "sources.list.d"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "apt.conf").write_text(_APT.replace("@", str(apt)))
    for name, content in apt_sources().items():
        (apt / name).write_text(content)
    base = ["apt-get", "--config-file", str(apt / "apt.conf"), "--quiet=2", "--assume-yes"]
    report("sysroot: reading package lists", 0)
    # A third party's source without arm64 fails here; the packages may still be found.
    update = subprocess.run([*base, "update"], env=_c_locale(), capture_output=True, text=True)
    report("sysroot: reading package lists", 1)
    report("sysroot: downloading packages", 0)
    _run([*base, "install", "--download-only", *packages], update.stderr)
    report("sysroot: downloading packages", 1)
    return sorted((apt / "cache" / "archives").glob("*.deb"))


def _run(command: Sequence[str], earlier: str = "") -> None:
    """Run a program. Raises UserError with the first error that it, or the `earlier` output, has."""
    result = subprocess.run(command, env=_c_locale(), capture_output=True, text=True)
    if result.returncode:
        errors = [
            line for line in (earlier + result.stderr).splitlines() if line.startswith(("E:", "Err:", "dpkg"))
        ]
        reason = errors[0] if errors else f"exit status {result.returncode}"
        raise UserError(
            f"{command[0]} could not get aarch64 packages ({reason}): check the network and the disk."
        )


def _c_locale() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
