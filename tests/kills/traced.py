"""Kills a forked child right before its n-th system call that changes files, by ptrace. Linux on x86-64 or aarch64."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import time
import traceback
from collections.abc import Callable

_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_TRACESYSGOOD, _EXITKILL = 1, 1 << 20
_ENTRY = 1
_NUMBERS = {
    "x86_64": {
        **{"write": 1, "open": 2, "pwrite64": 18, "writev": 20, "sendfile": 40, "flock": 73, "fsync": 74},
        **{
            "fdatasync": 75,
            "truncate": 76,
            "ftruncate": 77,
            "rename": 82,
            "mkdir": 83,
            "rmdir": 84,
            "creat": 85,
        },
        **{"link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93},
        **{"sync": 162, "openat": 257, "mkdirat": 258, "fchownat": 260, "unlinkat": 263, "renameat": 264},
        **{"linkat": 265, "symlinkat": 266, "fchmodat": 268, "utimensat": 280, "fallocate": 285},
        **{"renameat2": 316, "copy_file_range": 326},
    },
    "aarch64": {
        **{
            "flock": 32,
            "mkdirat": 34,
            "unlinkat": 35,
            "symlinkat": 36,
            "linkat": 37,
            "renameat": 38,
            "truncate": 45,
        },
        **{
            "ftruncate": 46,
            "fallocate": 47,
            "fchmod": 52,
            "fchmodat": 53,
            "fchownat": 54,
            "fchown": 55,
            "openat": 56,
        },
        **{
            "write": 64,
            "writev": 66,
            "pwrite64": 68,
            "sendfile": 71,
            "sync": 81,
            "fsync": 82,
            "fdatasync": 83,
        },
        **{"utimensat": 88, "renameat2": 276, "copy_file_range": 285},
    },
}
_NAMES = {number: name for name, number in _NUMBERS.get(platform.machine(), {}).items()}
_STREAMS = (1, 2)
_OPEN_FLAGS = {"open": 1, "openat": 2}
"""The argument of the flags: opening changes something only where it creates."""


class _Info(ctypes.Structure):
    """ptrace_syscall_info at the entry of a call."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("pointers", ctypes.c_uint64 * 2),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def can_trace() -> bool:
    """Whether this machine's system calls are known and a child may be traced."""
    if not _NAMES:
        return False
    try:
        kill_at_call(lambda: None, 1 << 30)
    except OSError:
        return False
    return True


def kill_at_call(work: Callable[[], object], number: int) -> str | None:
    """Run `work` in a forked child, killed before its `number`-th call from 0 -> that call, None if it has fewer.

    Raises OSError where tracing is not allowed, and RuntimeError when the child fails.
    """
    child = _fork(work, traced=True)
    try:
        _wait(child)
        _ptrace(_SETOPTIONS, child, _TRACESYSGOOD | _EXITKILL)
        delivered = 0
        while True:
            _ptrace(_SYSCALL, child, delivered)
            status = _wait(child)
            if not os.WIFSTOPPED(status):
                child = 0
                _require_success(status)
                return None
            delivered = os.WSTOPSIG(status)
            if delivered != signal.SIGTRAP | 0x80:
                continue
            delivered = 0
            name = _changing_call(child)
            number -= name is not None
            if number < 0:
                return name
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            _wait(child)


def kill_after(work: Callable[[], object], seconds: float | None) -> bool:
    """Run `work` in a forked child, killed after that time, never for None -> whether it was killed.

    Raises RuntimeError when the child fails.
    """
    child = _fork(work)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = _wait(child)
    if not os.WIFSIGNALED(status):
        _require_success(status)
    return os.WIFSIGNALED(status)


def _fork(work: Callable[[], object], traced: bool = False) -> int:
    child = os.fork()
    if child:
        return child
    try:
        if traced:
            _ptrace(_TRACEME, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _changing_call(child: int) -> str | None:
    """The name of the call that the child is about to make, if it may change files."""
    info = _Info()
    _ptrace(_GET_SYSCALL_INFO, child, ctypes.addressof(info), ctypes.sizeof(info))
    name = _NAMES.get(info.number) if info.op == _ENTRY else None
    if name in _OPEN_FLAGS and not info.arguments[_OPEN_FLAGS[name]] & os.O_CREAT:
        return None
    return None if name == "write" and info.arguments[0] in _STREAMS else name


def _ptrace(request: int, child: int, data: int, address: int = 0) -> None:
    if _libc.ptrace(request, child, address, data) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _wait(child: int) -> int:
    return os.waitpid(child, 0)[1]


def _require_success(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"the writer failed with status {status}")
