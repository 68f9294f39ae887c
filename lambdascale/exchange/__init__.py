"""Results of requests in the formats of other harnesses: written for their tools, and read back. Frames and files, no runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lambdascale.core import UserError
from lambdascale.exchange import aiperf, table, vllm_bench
from lambdascale.exchange.results import Results


@dataclass(frozen=True)
class Format:
    """A file format: how results become its text, and come back from a file."""

    text: Callable[[Results], str]
    read: Callable[[Path], Results]


FORMATS = {
    "vllm-bench": Format(vllm_bench.text, vllm_bench.read),
    "aiperf": Format(aiperf.text, aiperf.read),
    "csv": Format(table.text, table.read),
}
_BY_ENDING = {".json": "vllm-bench", ".jsonl": "aiperf", ".csv": "csv"}


def read_results(path: Path) -> Results:
    """Read a harness's file, whose format its ending tells; UserError if it has none of them."""
    name = _BY_ENDING.get(path.suffix)
    if name is None:
        raise UserError(f"{path} is neither a run's folder nor a file of {', '.join(FORMATS)} ({', '.join(_BY_ENDING)})")
    return FORMATS[name].read(path)


__all__ = ["FORMATS", "Format", "Results", "read_results"]
