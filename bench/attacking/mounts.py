"""A file system of its own for one process: small, and writable or not. Nobody else sees it; no right is needed."""

import ctypes
import os
from pathlib import Path

# linux/sched.h, linux/mount.h
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1, 32, 16384, 1 << 18


def mount(place: Path, num_bytes: int) -> None:
    """Put a file system in memory on a folder; to be called in a child, once.

    Raises:
        OSError: the system lets nobody do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    _check(libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _check(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    _check(libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, f"size={num_bytes}".encode()))


def remount(place: Path, num_bytes: int, *, writable: bool = True) -> None:
    """Change its size, or whether it can be written."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _MS_REMOUNT | (0 if writable else _MS_RDONLY)
    _check(libc.mount(b"tmpfs", bytes(place), b"tmpfs", flags, f"size={num_bytes}".encode()))


def _check(failed: int) -> None:
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, f"mount: a process must be allowed a file system of its own, got {os.strerror(number)}")
