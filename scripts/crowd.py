"""A crowd of streams at once, and another client beside it: TTFT of those that are accepted, and how the other fares.

Needs a server with two API keys, ``crowd`` and ``other`` in a file:
``lambdascale serve --model tiny --blocks 8 --api-key @FILE``. With ``--out`` a row is added to ``FOLDER/reliability.csv``.
Status 1 if a stream broke, or had another answer than 200 or 429.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.core import UserError
from lambdascale.testing.reliability import Row, add_row, check_writable

_EVERY_S = 0.25
_QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))


@dataclass
class Outcome:
    """Answers of one client: statuses, seconds to the first token, estimates of those that were refused."""

    statuses: Counter[int] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    retry_after_s: list[int] = field(default_factory=list)
    broken: int = 0

    @property
    def asked(self) -> int:
        return self.statuses.total()

    @property
    def unforeseen(self) -> int:
        """Streams that broke, or were neither answered nor refused."""
        return self.broken + sum(count for status, count in self.statuses.items() if status not in (200, 429))

    def detail(self, name: str) -> str:
        ttft = " ".join(f"{label}={np.quantile(self.ttft_s, q):.2f}" for label, q in _QUANTILES) if self.ttft_s else "none"
        return f"{name}: {self.statuses[200]} answered, {self.statuses[429]} refused, TTFT s {ttft}"

    def row(self, name: str) -> str:
        ttft = [f"{np.quantile(self.ttft_s, q):8.3f}" for q in (0.5, 0.9, 0.99, 1.0)] if self.ttft_s else ["-"] * 4
        refused = sum(count for status, count in self.statuses.items() if status != 200)
        retry = f"{min(self.retry_after_s)} to {max(self.retry_after_s)} s" if self.retry_after_s else "-"
        return f"{name:<8}{self.statuses[200]:>9}{refused:>9}{self.broken:>8}  {' '.join(ttft)}  {retry}"


async def ask(host: str, port: int, key: str, tokens: int, number: int, outcome: Outcome) -> None:
    """Ask for one stream and read all of it."""
    body = json.dumps({"model": "tiny", "prompt": f"{number}", "max_tokens": tokens, "stream": True, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        status = int((await reader.readline()).split()[1])
        outcome.statuses[status] += 1
        last = b""
        while line := await reader.readline():
            if line.lower().startswith(b"retry-after:"):
                outcome.retry_after_s.append(int(line.split()[1]))
            if line.startswith(b"data: "):
                if not last:
                    outcome.ttft_s.append(time.monotonic() - began)
                last = line
        outcome.broken += status == 200 and b"[DONE]" not in last
    finally:
        writer.close()


async def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address of the server (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port of the server (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=300, help="requests of the crowd, all at once (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of reliability.csv (default: no row)")
    given = parser.parse_args()
    try:
        with socket.create_connection((given.host, given.port)):
            pass
    except OSError as error:
        raise UserError(f"no server answers at {given.host}, port {given.port}: {error.strerror}") from error
    if given.out is not None:
        check_writable(given.out)
    crowd, other = Outcome(), Outcome()
    began = time.monotonic()
    streams = [
        asyncio.ensure_future(ask(given.host, given.port, "crowd", given.max_tokens, number, crowd))
        for number in range(given.streams)
    ]
    gathered = asyncio.gather(*streams)
    await asyncio.sleep(_EVERY_S)
    while not gathered.done():
        await ask(given.host, given.port, "other", given.max_tokens, 0, other)
        await asyncio.sleep(_EVERY_S)
    await gathered
    seconds = time.monotonic() - began
    print(f"{given.streams} streams of {given.max_tokens} tokens in {seconds:.1f} s; TTFT in s")
    print("client   answered  refused  broken       P50      P90      P99      max  Retry-After")
    print(crowd.row("crowd"))
    print(other.row("other"))
    unforeseen = crowd.unforeseen + other.unforeseen
    if given.out is not None:
        row = Row(
            what="a crowd of streams beside another client, queue bounded",
            tried=f"{given.streams} streams at once",
            requests=crowd.asked + other.asked,
            lost=crowd.broken + other.broken,
            wrong=unforeseen,
            detail=f"{crowd.detail('crowd')}; {other.detail('other')}; {seconds:.0f} s",
            command=shlex.join(["python", *sys.argv]),
        )
        add_row(row, given.out)
    return int(unforeseen > 0)


sys.exit(run_guarded(lambda: asyncio.run(main())))
