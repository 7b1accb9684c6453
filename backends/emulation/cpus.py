"""The CPUs that can be emulated, and the files in which Linux describes them.

ONNX Runtime reads the features of a core from /proc/cpuinfo and /sys: without a board's files it reads the host's and
crashes at import. Features and part numbers are those that Linux prints on the boards named.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CORES = 4


@dataclass(frozen=True)
class Cpu:
    """A CPU that QEMU's option `-cpu` names."""

    board: str
    part: int
    """Arm's part number, as in MIDR_EL1."""
    features: str


CPUS = {
    "cortex-a53": Cpu("Raspberry Pi Zero 2 W and 3", 0xD03, "fp asimd evtstrm crc32 cpuid"),
    "cortex-a72": Cpu("Raspberry Pi 4", 0xD08, "fp asimd evtstrm crc32 cpuid"),
    "cortex-a76": Cpu(
        "Raspberry Pi 5",
        0xD0B,
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    ),
}
DEFAULT_CPU = "cortex-a53"
"""The one with the fewest features: a program that runs on it runs on every board above."""


def write_description(cpu: Cpu, root: Path) -> None:
    """Write `proc/cpuinfo` and `sys/devices/system/cpu/{possible,present,online}` below `root`."""
    core = (
        f"BogoMIPS\t: 38.40\nFeatures\t: {cpu.features}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
        f"CPU variant\t: 0x0\nCPU part\t: {cpu.part:#05x}\nCPU revision\t: 4\n"
    )
    (root / "proc").mkdir(parents=True)
    (root / "proc" / "cpuinfo").write_text("\n".join(f"processor\t: {n}\n{core}" for n in range(CORES)))
    system = root / "sys" / "devices" / "system" / "cpu"
    system.mkdir(parents=True)
    for name in ("possible", "present", "online"):
        (system / name).write_text(f"0-{CORES - 1}\n")
