"""An emulated board like a new SD card: Debian with apt, sudo, a user `pi` and a network, without microvlm.

Packages are unpacked here and entered into dpkg's database as installed, which takes seconds; the distribution's
installer would run for minutes under emulation. Maintainer scripts do not run; this module writes their results.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from microvlm.backends.emulation.cache import cached_folder
from microvlm.backends.emulation.cpus import CORES, DEFAULT_CPU
from microvlm.backends.emulation.progress import Progress, StderrProgress
from microvlm.backends.emulation.sites import compile_library
from microvlm.backends.emulation.sysroot import (
    LINKED,
    apt_sources,
    system_name,
    unpack_archives,
    unpack_packages,
)
from microvlm.bench.pi.board.disk_image import (
    DiskImage,
    kernel_package,
    need_program,
    take_kernel,
    write_disk,
)
from microvlm.bench.pi.board.emulated_board import EmulatedBoard, find_emulator
from microvlm.bench.pi.board.guest_program import GuestCommand

USER = "pi"
ESSENTIAL = (
    *(
        "base-files",
        "base-passwd",
        "bash",
        "bsdutils",
        "coreutils",
        "dash",
        "debianutils",
        "diffutils",
        "dpkg",
    ),
    *("findutils", "grep", "gzip", "hostname", "init-system-helpers", "libc-bin", "login", "ncurses-base"),
    *("ncurses-bin", "perl-base", "sed", "sysvinit-utils", "tar", "util-linux"),
)
"""Debian's packages of priority `essential`, which apt assumes to be installed."""
BOARD_PACKAGES = (
    *ESSENTIAL,
    "apt",
    "ca-certificates",
    "mawk",
    "mount",
    "passwd",
    "procps",
    "python3",
    "sudo",
)
HELPERS = ("busybox-static", "time")
"""Programs that the supervisor script needs."""
FREE_BYTES = 1 << 30
ETC = {
    "hosts": "127.0.0.1 localhost board\n",
    "sudoers.d/pi": f"{USER} ALL=(ALL) NOPASSWD: ALL\n",
    **{
        f"pam.d/common-{name}": f"{name.partition('-')[0]} required pam_permit.so\n"
        for name in ("auth", "account", "password", "session", "session-noninteractive")
    },
}
ACCOUNTS = {
    "passwd": f"_apt:x:42:65534::/nonexistent:/usr/sbin/nologin\n{USER}:x:1000:1000::/home/{USER}:/bin/bash\n",
    "group": f"{USER}:x:1000:\n",
}
# QEMU's own network: the board is .15, the gateway .2, the name server .3. The builder of the image owned its files.
PREPARE = """\
export HOME=/root LANG=C.UTF-8
chown -R 0:0 /etc /usr/bin/sudo /usr/libexec/sudo /var
chmod 4755 /usr/bin/sudo
cp -r /srv/etc/. /etc
cp -r /etc/skel /home/pi
touch /home/pi/.hushlogin
chown -R 1000:1000 /home/pi
mkdir -p /boot/firmware
cp -r /srv/boot/. /boot/firmware
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
echo nameserver 10.0.2.3 >/etc/resolv.conf
"""


def open_debian(
    ram_mb: int, boot: Mapping[str, Path | str], etc: Mapping[str, str], report: Progress | None = None
) -> EmulatedBoard:
    """A board with `boot` on its boot partition (/boot/firmware) and `etc` in /etc, on this machine's network.

    Raises UserError as `open_emulated_board` does.
    """
    emulator = find_emulator()
    image = ensure_debian(report or StderrProgress())
    files: dict[str, Path | str] = {f"boot/{name}": source for name, source in boot.items()}
    sources = {f"apt/{name}": text for name, text in apt_sources().items()}
    files |= {f"etc/{name}": text for name, text in {**sources, **etc}.items()}
    return EmulatedBoard(
        emulator, DEFAULT_CPU, CORES, ram_mb, image, {**files, "prepare": PREPARE}, network=True
    )


def as_user(script: str) -> GuestCommand:
    """A command that runs a bash script as `pi` in the home directory; stderr goes to stdout."""
    rights = f"setpriv --reuid={USER} --regid={USER} --init-groups --reset-env"
    # From a file: a program that reads stdin would read the rest of the script.
    start = f"cat >/tmp/script && cd /home/{USER} && exec {rights} bash -l /tmp/script </dev/null 2>&1"
    return GuestCommand(("sh", "-c", start), stdin=script)


def ensure_debian(report: Progress) -> DiskImage:
    """The disk image, from the user's cache or newly built. Raises UserError."""
    need_program("mke2fs", "e2fsprogs")
    kernel = kernel_package()
    packages = (*BOARD_PACKAGES, f"{system_name().split()[0]}-archive-keyring", *HELPERS)
    recipe = {"system": system_name(), "packages": sorted({*packages, kernel}), "layout": 3}

    def build(folder: Path) -> None:
        kernel_root, root = folder.with_name("kernel"), folder.with_name("root")
        kernel_root.mkdir()
        # In a separate tree, so that dpkg's database has no kernel whose installation apt would finish.
        unpack_packages(kernel_root, ("busybox-static", kernel), report)
        take_kernel(kernel_root, folder)
        for name in LINKED:
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        for archive in unpack_archives(root, packages, report):
            register(archive, root)
        report("system: writing the disk", 0)
        write_system_files(root)
        compile_library(root)
        write_disk(root, folder / "root.ext4", FREE_BYTES)
        report("system: writing the disk", 1)

    folder = cached_folder("debian", recipe, build)
    return DiskImage(folder / "vmlinuz", folder / "initrd", folder / "root.ext4")


def register(archive: Path, root: Path) -> None:
    """Enter an unpacked package into dpkg's database below `root`: its status, files and scripts."""
    database = root / "var" / "lib" / "dpkg"
    information = database / "info"
    information.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "--control", str(archive), folder], check=True)
        control = Path(folder, "control").read_text()
        fields = dict(re.findall(r"(?m)^(Package|Architecture|Multi-Arch): (.*)$", control))
        shared = fields.get("Multi-Arch") == "same"
        name = f"{fields['Package']}:{fields['Architecture']}" if shared else fields["Package"]
        for path in Path(folder).iterdir():
            if path.name != "control":
                shutil.copy(path, information / f"{name}.{path.name}")
    result = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(result.stdout)) as content:
        names = [member.name.removeprefix(".").rstrip("/") or "/." for member in content]
    (information / f"{name}.list").write_text("".join(f"{each}\n" for each in names))
    with (database / "status").open("a") as status:
        status.write(re.sub(r"(?m)^(Package: .*)$", r"\1\nStatus: install ok installed", control, count=1))
        status.write("\n")


def write_system_files(root: Path) -> None:
    """Write what maintainer scripts and the imager would write: accounts, certificates, rights of `pi`."""
    for name, lines in ACCOUNTS.items():
        master = (root / "usr" / "share" / "base-passwd" / f"{name}.master").read_text()
        (root / "etc" / name).write_text(master + lines)
    for name, text in ETC.items():
        (root / "etc" / name).write_text(text)
    authorities = root / "usr" / "share" / "ca-certificates"
    trusted = sorted(authorities.rglob("*.crt"))
    # Without this list the package's trigger would empty the folder.
    listed = "".join(f"{path.relative_to(authorities)}\n" for path in trusted)
    (root / "etc" / "ca-certificates.conf").write_text(listed)
    (root / "etc" / "ssl" / "certs").mkdir(parents=True, exist_ok=True)
    (root / "etc/ssl/certs/ca-certificates.crt").write_text("".join(path.read_text() for path in trusted))
    (root / "usr" / "bin" / "awk").symlink_to("mawk")
    for name in ("dev", "proc", "sys", "srv", "run", "tmp", "root", "home", "boot"):
        (root / name).mkdir(exist_ok=True)
