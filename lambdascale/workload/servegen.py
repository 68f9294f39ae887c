"""ServeGen's client tables: rates, burstiness and lengths of each client of a service, by windows of ten minutes (Apache-2.0)."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol

import msgspec
import numpy as np

from lambdascale.core import TraceError
from lambdascale.core.checks import shown
from lambdascale.workload.base import Provenance
from lambdascale.workload.columns import Columns, Floats, Ints, Objects, Streams
from lambdascale.workload.processes import gamma_renewal
from lambdascale.workload.rows import BadRow, real_number
from lambdascale.workload.scan import opened
from lambdascale.workload.shaping import check_count
from lambdascale.workload.tracefile import WindowedWorkload

_CHUNK = re.compile(r"chunk-(\d+)-trace\.csv")
_WINDOW_S = 600.0
# Shapes of Gamma gaps: a CV of 10 down to one of 0.01.
_SHAPES = (0.01, 1e4)


class Hash(Protocol):
    """A digest under construction."""

    def update(self, data: bytes, /) -> None:
        """Include further bytes."""
        ...


class Rate(NamedTuple):
    """Rate of a client (requests/s) from ``start_s`` on, and the coefficient of variation of its gaps."""

    start_s: float
    rate: float
    cv: float


@dataclass(frozen=True)
class Distribution:
    """Token counts and their probabilities."""

    tokens: Ints
    chances: Floats

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        """Draw ``count`` independent token counts."""
        return rng.choice(self.tokens, size=count, p=self.chances)


class Part(NamedTuple):
    """A rate of a client from ``begin_s`` to ``end_s``, in seconds of the workload."""

    rate: Rate
    begin_s: float
    end_s: float

    @property
    def expected(self) -> float:
        """Number of requests on average."""
        return self.rate.rate * (self.end_s - self.begin_s)


@dataclass(frozen=True, kw_only=True)
class ServeGenClients(WindowedWorkload):
    """Requests of the clients of a service, from the tables of ServeGen's repository.

    ``path`` is the folder of a model, such as data/language/m-small: chunk-N-trace.csv (no header: start in seconds, rate in
    requests/s, CV of gaps, and the fitted process with its two parameters, which are not used) and chunk-N-dataset.json
    (start -> input_tokens and output_tokens, each a Python dictionary of token count -> probability in a text). ``clients``
    takes only so many, those with the most requests in the window (None: all). In each window of ten minutes a client's requests
    are a Gamma renewal process of its rate and CV. A client is a session: it has one model.
    """

    clients: int | None = None
    popularity: Literal["first", "zipf"] = "zipf"

    how_to_get: ClassVar[str] = " (a folder of github.com/alibaba/ServeGen, such as data/language/m-small)"

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        self._within("clients", low=1)

    def _produce(self, streams: Streams, most: float, models: int) -> tuple[Columns, Provenance]:
        assert self.path is not None, "checked on construction"
        folder = Path(self.path).expanduser()
        found = sorted((int(name[1]), path) for path in _files(folder) if (name := _CHUNK.fullmatch(path.name)))
        if not found:
            raise TraceError(f"{self.path}: no chunk-N-trace.csv there{self.how_to_get}")
        digest = hashlib.sha256()
        tables = {number: _rates(path, digest) for number, path in found}
        end_s = max((rates[-1].start_s + _WINDOW_S for rates in tables.values() if rates), default=0.0)
        stop_s = end_s if self.duration_s is None else min(self.start_s + self.duration_s, end_s)
        parts = {number: self._parts(rates, stop_s) for number, rates in tables.items()}
        expected = {number: sum(part.expected for part in of) for number, of in parts.items()}
        chosen = sorted(expected, key=lambda number: (-expected[number], number))[: self.clients]
        check_count(sum(expected[number] for number in chosen), most)
        # Streams by client, so that fewer clients have the requests that they have among all.
        rngs = zip(tables, streams.arrivals.spawn(len(tables)), streams.lengths.spawn(len(tables)), strict=True)
        requests = [
            _requests(number, parts[number], _lengths(folder / f"chunk-{number}-dataset.json", digest), arrivals, lengths)
            for number, arrivals, lengths in rngs
            if number in chosen and parts[number]
        ]
        none = (np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, object))
        times, prompt, output, session = (np.concatenate(column) for column in zip(none, *requests, strict=True))
        columns = Columns(
            arrival_s=times,
            prompt_tokens=prompt,
            output_tokens=output,
            period_s=max(stop_s - self.start_s, 0.0),
            session=session,
        ).at(times)
        return columns, Provenance(source=self.path, sha256=digest.hexdigest(), rows=sum(map(len, tables.values())))

    def _parts(self, rates: tuple[Rate, ...], stop_s: float) -> list[Part]:
        """Windows of a client that overlap that of the workload."""
        parts = (
            Part(rate, max(rate.start_s, self.start_s) - self.start_s, min(rate.start_s + _WINDOW_S, stop_s) - self.start_s)
            for rate in rates
        )
        return [part for part in parts if part.begin_s < part.end_s and part.rate.rate > 0]


def _requests(
    number: int,
    parts: list[Part],
    lengths: Mapping[float, tuple[Distribution, Distribution]],
    arrivals: np.random.Generator,
    drawn: np.random.Generator,
) -> tuple[Floats, Ints, Ints, Objects]:
    """Times, prompt and answer tokens of a client's requests, and its name for each."""
    times, prompts, outputs = [], [], []
    for part in parts:
        rate = part.rate
        shape = float(np.clip(rate.cv**-2.0 if rate.cv > 0 else np.inf, *_SHAPES))
        events = part.begin_s + gamma_renewal(part.expected, shape, arrivals) / rate.rate
        prompt, output = lengths[max((start for start in lengths if start <= rate.start_s), default=min(lengths))]
        times.append(events)
        prompts.append(prompt.draw(len(events), drawn))
        outputs.append(output.draw(len(events), drawn))
    count = sum(map(len, times))
    return np.concatenate(times), np.concatenate(prompts), np.concatenate(outputs), np.full(count, f"client {number}", object)


def _files(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (OSError, RuntimeError) as error:
        raise TraceError(f"cannot read {shown(str(folder))}, which must be a folder of client tables: {error!s:.100}") from error


def _rates(path: Path, digest: Hash) -> tuple[Rate, ...]:
    with opened(str(path)) as file:
        data = file.read()
    digest.update(data)
    found = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split(",")
        try:
            if len(fields) < 3:
                raise BadRow(f"{len(fields)} fields, fewer than start, rate and CV")
            row = Rate(*(real_number(text, name) for text, name in zip(fields, ("start", "rate", "CV"), strict=False)))
        except BadRow as fault:
            raise TraceError(f"{path}:{number}: {fault}") from None
        found.append(row)
    return tuple(sorted(found))


def _lengths(path: Path, digest: Hash) -> Mapping[float, tuple[Distribution, Distribution]]:
    """Distributions of prompt and answer tokens by window; windows in which they are empty are left out."""
    with opened(str(path)) as file:
        data = file.read()
    digest.update(data)
    try:
        windows = msgspec.json.decode(data, type=dict[str, dict[str, str | None]])
    except (UnicodeError, msgspec.MsgspecError) as error:
        raise TraceError(f"{path}: {error!s:.200}") from None
    found = {}
    for start, window in windows.items():
        try:
            begin_s = real_number(start, "the start of a window")
            pair = [_distribution(window.get(name) or "{}", name) for name in ("input_tokens", "output_tokens")]
        except BadRow as fault:
            raise TraceError(f"{path}: window {shown(start)}: {fault}") from None
        if pair[0] is not None and pair[1] is not None:
            found[begin_s] = (pair[0], pair[1])
    if not found:
        raise TraceError(f"{path}: no window has input_tokens and output_tokens")
    return found


def _distribution(text: str, name: str) -> Distribution | None:
    """Distribution that a text such as ``{12: 0.25, 40: 0.75}`` states; None for an empty one; BadRow for another text."""
    try:
        chances = ast.literal_eval(text)
        if not isinstance(chances, dict):
            raise ValueError
        tokens = np.array([*chances], dtype=np.float64)
        weights = np.array([*chances.values()], dtype=np.float64)
        whole = (tokens >= 0) & (tokens < 1e9) & (tokens == np.rint(tokens))
        usable = bool(np.all(whole & (weights >= 0) & (weights <= 1e18)))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        usable = False
    if not usable:
        raise BadRow(f"{name} must be a dictionary of token count and probability, not {shown(text)}")
    if not weights.sum():
        return None
    # A request has at least one token.
    return Distribution(np.maximum(tokens, 1).astype(np.int64), weights / weights.sum())
