"""Emulates an aarch64 Python on this machine: QEMU's user mode over a tree of Debian packages, with a Pi's CPU.

`open_machine` builds missing parts into the user's cache. The package knows no models, and nothing runs at import.
"""

from microvlm.backends.emulation.cpus import CPUS, DEFAULT_CPU
from microvlm.backends.emulation.machine import EmulatedMachine, open_machine
from microvlm.backends.emulation.sites import runtime_requirements

__all__ = ["CPUS", "DEFAULT_CPU", "EmulatedMachine", "open_machine", "runtime_requirements"]
