"""Writes the initial RAM disk of an emulated board, a cpio archive: a static busybox, the kernel's modules for disks
and ports, and a script that mounts both disks and starts the supervisor script. Needs no root, mount or device.
"""

from __future__ import annotations

import re
from pathlib import Path

from microvlm.errors import UserError

MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "ext4")
"""Modules for the disks, the ports and the network; the module files name their dependencies."""

# The root disk becomes `/`; the data disk, `/srv`, has the commands of this boot.
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done </modules/order
until [ -b /dev/vdb ]; do sleep .1; done
mount -t ext4 -o noatime /dev/vda /newroot
mount -t ext4 -o ro,noatime /dev/vdb /newroot/srv
umount /proc
mount -o move /dev /newroot/dev
exec switch_root /newroot /bin/busybox sh /srv/supervise
"""
FOLDERS = ("bin", "dev", "modules", "newroot", "proc")


def write_initrd(target: Path, busybox: Path, modules: Path) -> None:
    """Write `target` from a static busybox and the folder of a kernel's modules. Raises UserError."""
    needed = load_order(modules, MODULES)
    files = {"init": (INIT.encode(), 0o755), "bin/busybox": (busybox.read_bytes(), 0o755)}
    files["modules/order"] = ("".join(f"{path.name}\n" for path in needed).encode(), 0o644)
    files |= {f"modules/{path.name}": (path.read_bytes(), 0o644) for path in needed}
    entries = [_entry(name, b"", 0o040755) for name in FOLDERS]
    entries += [_entry(name, content, 0o100000 | mode) for name, (content, mode) in files.items()]
    target.write_bytes(b"".join([*entries, _entry("TRAILER!!!", b"", 0)]))


def load_order(modules: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of the modules `names` and of their dependencies, each after its dependencies.

    A built-in module needs no file; which ones are built in differs between point releases. Raises UserError for a
    module that is neither a file nor built in.
    """
    files = {_name(path.name): path for path in modules.rglob("*.ko")}
    builtin = {
        _name(line.rpartition("/")[2])
        for listing in modules.rglob("modules.builtin")
        for line in listing.read_text().split()
    }
    order: list[str] = []

    def add(name: str) -> None:
        if name in order or name in builtin:
            return
        if name not in files:
            raise UserError(
                f"the kernel's package has no module '{name}': its modules are compressed or renamed."
            )
        # `.modinfo` holds NAME=VALUE texts, each ended by a zero byte.
        depends = re.search(rb"(?<=\0)depends=([\w,-]*)(?=\0)", files[name].read_bytes())
        for dependency in filter(None, depends[1].decode().split(",") if depends else ()):
            add(_name(dependency))
        order.append(name)

    for name in names:
        add(name)
    return [files[name] for name in order]


def _name(file: str) -> str:
    return file.removesuffix(".ko").replace("-", "_")


def _entry(name: str, content: bytes, mode: int) -> bytes:
    """One file of a `newc` archive: magic, 13 fields of 8 hexadecimal digits, name, content, each padded to 4 bytes."""
    encoded = name.encode() + b"\0"
    # inode (the kernel asks only for those of hard links), mode, owner, group, links, time, bytes, 4 device numbers.
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4)
