"""Leases on shared memory: a node that may write to a peer's memory holds a lock on it, which the kernel frees if it dies.

The lock is on one byte of the memory's file, whose number belongs to one connection: open file description locks (fcntl(2)),
which belong to the opened file and not to a process, so that they also tell apart endpoints of one process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import struct
import time
from dataclasses import dataclass

_NAME = "lambdascale"
_LOOK_S = 0.001
_FLOCK = struct.Struct("@hhqqi4x")  # type, whence, start, length, process (0)
_NUMBERS = 1 << 62


def make_file() -> int:
    """Return the descriptor of a new file in memory, which only processes of this user can open, and without a name on disk."""
    return os.memfd_create(_NAME)


def open_file(process: int, descriptor: int) -> int:
    """Open the file in memory that another process has made; OSError if that is another file, or another user's or host's."""
    path = f"/proc/{process}/fd/{descriptor}"
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise OSError(f"{path} is not the memory of a node")
    return os.open(path, os.O_RDWR)


def new_number() -> int:
    """Return the number of a lease that no other connection has."""
    return secrets.randbelow(_NUMBERS)


@dataclass(frozen=True)
class TheirLease:
    """A peer's lease on this node's memory, without which it writes nothing. ``descriptor``: of this node's file, -1 for none."""

    descriptor: int
    number: int

    def wait(self) -> None:
        """Return when the peer has let go."""
        while self.descriptor >= 0 and is_held(self.descriptor, self.number):
            time.sleep(_LOOK_S)


class Lease:
    """Holds a lock on an opened file, which it owns. OSError if that is not possible."""

    def __init__(self, descriptor: int, number: int) -> None:
        self.descriptor, self._number = descriptor, number
        try:
            _lock(descriptor, fcntl.F_WRLCK, number)
        except OSError:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Let go, also if the file stays mapped."""
        _lock(self.descriptor, fcntl.F_UNLCK, self._number)
        os.close(self.descriptor)


def is_held(descriptor: int, number: int) -> bool:
    """Return True while another open description of the file holds the lock ``number``.

    ``descriptor``: of a file that the caller has opened itself, since a description never conflicts with its own locks.
    """
    try:
        _lock(descriptor, fcntl.F_WRLCK, number)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    _lock(descriptor, fcntl.F_UNLCK, number)
    return False


def _lock(descriptor: int, kind: int, number: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, number, 1, 0))
