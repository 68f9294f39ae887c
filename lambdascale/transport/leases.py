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

_FLOCK = struct.Struct("@hhqqi4x")  # type, whence, start, length, process (0)
_NUMBERS = 1 << 62


def new_number() -> int:
    """Return the number of a lease that no other connection has."""
    return secrets.randbelow(_NUMBERS)


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
    """Return True while somebody holds the lock on the file, which the caller has opened by itself; False if it is closed."""
    try:
        _lock(descriptor, fcntl.F_WRLCK, number)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    _lock(descriptor, fcntl.F_UNLCK, number)
    return False


def _lock(descriptor: int, kind: int, number: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, number, 1, 0))
