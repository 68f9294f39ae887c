"""Lines for the operator on stderr. Equal lines are counted, not repeated: a fault in a loop must not hide the other lines."""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

_EVERY_S = 10.0
_MOST_LINES = 256


@dataclass
class _Said:
    """A line, the time ``at`` which it was written, and the number of repetitions since."""

    at: float
    repeats: int = 0


def _write(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Log:
    """Writes a line when it is new, then at most every 10 s with the number of times it was said meanwhile.

    Belongs to one thread. ``flush`` writes the counts that are due; call it now and then, and with ``all_of_them`` at the end.
    """

    def __init__(self, write: Callable[[str], None] = _write, clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._said: OrderedDict[str, _Said] = OrderedDict()

    def say(self, line: str) -> None:
        """Write the line, or count it if it was written a moment ago."""
        said = self._said.get(line)
        if said is not None:
            said.repeats += 1
        else:
            self._write(line)
            self._said[line] = _Said(self._clock())
            if len(self._said) > _MOST_LINES:
                self._count(*self._said.popitem(last=False))
        self.flush()

    def flush(self, *, all_of_them: bool = False) -> None:
        """Write the numbers of repetitions. Lines without any are forgotten, and count as new the next time."""
        now = self._clock()
        for line, said in list(self._said.items()):
            if all_of_them or now - said.at >= _EVERY_S:
                del self._said[line]
                if self._count(line, said):
                    self._said[line] = _Said(now)

    def _count(self, line: str, said: _Said) -> bool:
        if said.repeats:
            self._write(f"{line} ({said.repeats} {'time' if said.repeats == 1 else 'times'} more)")
        return said.repeats > 0
