"""An aarch64 Python on this machine: QEMU's user mode over a tree of Debian packages, with a Raspberry Pi's CPU.

`open_machine` builds what is missing into the user's cache. It knows nothing about models, and nothing runs at import.
"""

from microvlm.backends.emulation.cpus import CPUS, DEFAULT_CPU
from microvlm.backends.emulation.machine import Machine, open_machine
from microvlm.backends.emulation.sites import runtime_requirements

__all__ = ["CPUS", "DEFAULT_CPU", "Machine", "open_machine", "runtime_requirements"]
