"""Builds the disks of an emulated board: Debian's arm64 cloud kernel, an initial RAM disk, a root disk with a Python.

Images are built from packages without root, mount or loop device, named by content and kept in the user's cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from microvlm.backends.emulation.cache import STAMP, cached_folder
from microvlm.backends.emulation.progress import Progress
from microvlm.backends.emulation.sites import compile_library, ensure_site
from microvlm.backends.emulation.sysroot import PACKAGES, ensure_sysroot, system_name, unpack_packages
from microvlm.bench.pi.board.initrd import write_initrd
from microvlm.errors import UserError

KERNEL_PACKAGES = {"debian": "linux-image-cloud-arm64", "ubuntu": "linux-image-virtual"}
SYSTEM_PACKAGES = (*PACKAGES, "busybox-static", "time")
PYTHON_SITE = "opt/python"
"""Folder of the requirements on the root disk."""
FREE_BYTES = 128 << 20
"""Free bytes on a root disk, for files that programs write."""
_DISK_PATHS = "/usr/sbin:/sbin"


@dataclass(frozen=True)
class DiskImage:
    """Files for QEMU. Machines write to a snapshot of the disk, never to the disk itself."""

    kernel: Path
    initrd: Path
    disk: Path


def ensure_image(cpu: str, requirements: Sequence[str], report: Progress) -> DiskImage:
    """The image whose Python has `requirements` (as pip takes them). Raises UserError."""
    kernel = kernel_package()
    need_program("mke2fs", "e2fsprogs")
    packages = (*SYSTEM_PACKAGES, kernel)
    recipe: dict = {
        "system": system_name(),
        "packages": sorted(packages),
        "requirements": sorted(requirements),
    }
    site = ensure_site(ensure_sysroot(cpu, report), requirements, report) if requirements else None

    def build(folder: Path) -> None:
        root = folder.with_name("root")
        root.mkdir()
        unpack_packages(root, packages, report)
        report("system: writing the disk", 0)
        take_kernel(root, folder)
        for name in ("dev", "proc", "sys", "srv", "run", "tmp", "root", "opt"):
            (root / name).mkdir(exist_ok=True)
        if site is not None:
            shutil.copytree(site, root / PYTHON_SITE, ignore=shutil.ignore_patterns(STAMP), symlinks=True)
        compile_library(root)
        write_disk(root, folder / "root.ext4", FREE_BYTES)
        report("system: writing the disk", 1)

    folder = cached_folder("system", recipe, build)
    return DiskImage(folder / "vmlinuz", folder / "initrd", folder / "root.ext4")


def kernel_package() -> str:
    """Name of the distribution's arm64 kernel package. Raises UserError for an unknown distribution."""
    distribution = system_name().split()[0]
    if distribution not in KERNEL_PACKAGES:
        raise UserError(
            f"no arm64 kernel is known for {distribution}: the emulated board needs Debian or Ubuntu."
        )
    return KERNEL_PACKAGES[distribution]


def take_kernel(root: Path, folder: Path) -> None:
    """Move the kernel from an unpacked tree into `folder`, with an initial RAM disk of its modules."""
    kernels = sorted((root / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise UserError(
            "the kernel's package has no boot/vmlinuz-*: its layout has changed; update microvlm."
        )
    shutil.move(kernels[-1], folder / "vmlinuz")
    modules = next(path for path in (root / "usr/lib/modules", root / "lib/modules") if path.is_dir())
    write_initrd(folder / "initrd", root / "bin" / "busybox", modules)
    shutil.rmtree(modules)
    shutil.rmtree(root / "boot")


def write_disk(root: Path, target: Path, free_bytes: int) -> None:
    """Write an ext4 file system with the files below `root` and `free_bytes` free (sparse). Raises UserError."""
    content = inodes = 0
    for directory, folders, names in os.walk(root):
        inodes += len(folders) + len(names)
        content += sum(-(-os.lstat(os.path.join(directory, name)).st_size // 4096) * 4096 for name in names)
        content += 4096 * len(folders)
    mebibytes = (content * 21 // 20 + free_bytes + inodes * 512 >> 20) + 8
    options = ("-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0")
    command = [
        "mke2fs",
        *options,
        "-N",
        str(inodes + 4096 + free_bytes // 16384),
        "-d",
        str(root),
        str(target),
        f"{mebibytes}M",
    ]
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{_DISK_PATHS}", "LC_ALL": "C"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or [f"exit status {result.returncode}"]
        raise UserError(
            f"mke2fs could not write a disk ({reason[0].rstrip('.')}): free some space in the cache."
        )


def write_data_disk(files: Mapping[str, Path | str], target: Path) -> None:
    """Write an ext4 file system with `files`: path there -> a file or folder here, or the text of a file."""
    tree = target.with_name(f"{target.name}.tree")
    for name, source in files.items():
        path = tree / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, str):
            path.write_text(source)
            path.chmod(0o755 if source.startswith("#!") else 0o644)
        elif source.is_dir():
            ignored = shutil.ignore_patterns(STAMP)
            shutil.copytree(source, path, copy_function=_link, ignore=ignored, dirs_exist_ok=True)
        else:
            _link(source, path)
    write_disk(tree, target, 0)
    shutil.rmtree(tree)


def need_program(program: str, package: str) -> None:
    """Raise UserError, with the Debian package to install, where `program` is not found."""
    if shutil.which(program, path=f"{os.environ.get('PATH', '')}:{_DISK_PATHS}") is None:
        raise UserError(f"{program} was not found: apt-get install {package}.")


def _link(source: str | Path, target: str | Path) -> None:
    """Hard-link a file where the file system allows it, else copy it: bundles are large."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
