"""Azure Functions 2019 and 2021 as sources of popularity and bursts for several models: a model is a function, or many.

ServerlessLLM, HydraServe and SLINFER make their workloads so. Token counts come from ``lengths``, since functions have none.
"""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from lambdascale.core import TraceError, UserError
from lambdascale.core.checks import require
from lambdascale.workload.base import Provenance
from lambdascale.workload.columns import Bools, Columns, Floats, Ints, Streams
from lambdascale.workload.lengths import LengthsMixin
from lambdascale.workload.processes import gamma_renewal
from lambdascale.workload.scan import opened
from lambdascale.workload.shaping import check_count
from lambdascale.workload.tracefile import WindowedWorkload

_MINUTES = 1440
_ROW = re.compile(r"Row #(\d+): ")


@dataclass(frozen=True, kw_only=True)
class FunctionsTrace(WindowedWorkload, LengthsMixin):
    """Base of the readers of invocations of functions: each is a request for the model that its function stands for.

    ``assign``: the busiest functions of the window, one for each model, busiest first ("busiest"); as many functions drawn at
    random from those with an invocation, by seed ("sample"); all functions, busiest first, dealt to the models in turn
    ("round_robin", as HydraServe does). ``arrivals``: those of the trace ("trace"), or a Gamma renewal process for each model at
    its mean rate in the window, with gaps of ``gap_shape`` ("gamma": popularity from the trace, bursts from the process; CV of
    gaps is gap_shape ** -0.5).
    """

    assign: Literal["busiest", "sample", "round_robin"] = "busiest"
    arrivals: Literal["trace", "gamma"] = "trace"
    gap_shape: float = 0.25

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        self._within("gap_shape", low=0.01)
        require(
            self.popularity == "first",
            f"{type(self).__name__}: functions decide which model a request is for; leave workload.popularity at first",
        )

    def _produce(self, streams: Streams, most: float, models: int) -> tuple[Columns, Provenance]:
        assert self.path is not None, "checked on construction"
        with opened(self.path, self.how_to_get) as raw:
            sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
        table = self._read(self.path)
        counts, period_s = self._counts(table)
        model_of = self._model_of(counts, models, streams)
        check_count(float(counts[model_of >= 0].sum()), most)
        if self.arrivals == "gamma":
            chosen_by = np.flatnonzero(model_of >= 0)
            expected = np.bincount(model_of[chosen_by], counts[chosen_by], models).astype(np.float64)
            times, chosen = _renewals(expected, period_s, self, streams)
        else:
            times, functions = self._invocations(table, model_of >= 0, streams)
            chosen = model_of[functions]
        prompt, output = self._draw_lengths(len(times), streams.lengths)
        columns = Columns(
            arrival_s=times,
            prompt_tokens=prompt,
            output_tokens=output,
            period_s=period_s,
            trace_model=chosen,
            trace_models=tuple(f"model {at}" for at in range(models)),
        ).at(times)
        return columns, Provenance(source=self.path, sha256=sha256, rows=table.num_rows)

    @abstractmethod
    def _read(self, path: str) -> pa.Table:
        """Rows of the trace that bear on the window; TraceError for a malformed one."""

    @abstractmethod
    def _counts(self, table: pa.Table) -> tuple[Ints, float]:
        """Invocations of each function in the window, and the length of the window in seconds."""

    @abstractmethod
    def _invocations(self, table: pa.Table, wanted: Bools, streams: Streams) -> tuple[Floats, Ints]:
        """Times of the invocations of the wanted functions, from the beginning of the window, and the function of each."""

    def _model_of(self, counts: Ints, models: int, streams: Streams) -> Ints:
        """Model of each function, -1 for those left out; UserError for fewer functions than models."""
        active = np.flatnonzero(counts)
        if len(active) < models:
            raise UserError(
                f"{self.path}: {len(active)} functions have an invocation in the window, fewer than the {models} models: "
                "choose a longer window or a smaller model_count"
            )
        if self.assign == "sample":
            active = streams.models.choice(active, size=models, replace=False)
        ranked = active[np.argsort(-counts[active], kind="stable")]
        if self.assign == "busiest":
            ranked = ranked[:models]
        found = np.full(len(counts), -1, dtype=np.int64)
        found[ranked] = np.arange(len(ranked)) % models
        return found


def _renewals(expected: Floats, period_s: float, workload: FunctionsTrace, streams: Streams) -> tuple[Floats, Ints]:
    """Arrivals of each model, as many as ``expected`` on average in ``period_s``, and the model of each."""
    parts = [
        gamma_renewal(float(count), workload.gap_shape, rng) * (period_s / count)
        for count, rng in zip(expected, streams.arrivals.spawn(len(expected)), strict=True)
    ]
    return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def _table(path: str, types: dict[str, pa.DataType]) -> pa.Table:
    """The given columns of a CSV file with a header; TraceError that names file and row (counted from 1, header included)."""
    try:
        return csv.read_csv(
            path,
            csv.ReadOptions(use_threads=False),
            csv.ParseOptions(quote_char=False, double_quote=False),
            csv.ConvertOptions(include_columns=list(types), column_types=types, null_values=[], strings_can_be_null=False),
        )
    except (pa.ArrowInvalid, KeyError) as error:
        text = " ".join(str(error).split())
        row = _ROW.search(text)
        place = f"{path}:{row[1]}" if row else path
        raise TraceError(f"{place}: {_ROW.sub('', text.removeprefix('CSV parse error: '))!s:.200}") from None


@dataclass(frozen=True, kw_only=True)
class AzureFunctions2019(FunctionsTrace):
    """A day of Azure Functions 2019 (CSV: HashOwner, HashApp, HashFunction, Trigger, 1 to 1440: invocations by minute).

    ``within_minute``: where the invocations of a minute are, which the trace does not record: at random, as in a Poisson
    process ("random"), or evenly spaced, the first at the beginning ("even"). The window may not reach beyond the day.
    """

    within_minute: Literal["random", "even"] = "random"
    duration_s: float | None = 1800.0

    how_to_get: ClassVar[str] = " (python scripts/fetch_traces.py functions_2019 downloads its archive, to be unpacked)"

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        require(
            len(self._minutes) > 0,
            f"AzureFunctions2019: a file is a day, of which start_s={self.start_s:g}, duration_s={self.duration_s} leave nothing",
        )

    @property
    def _stop_s(self) -> float:
        end_s = _MINUTES * 60.0
        return end_s if self.duration_s is None else min(self.start_s + self.duration_s, end_s)

    @property
    def _minutes(self) -> range:
        """Minutes of the day, counted from 0, that overlap the window."""
        return range(int(self.start_s // 60), -int(-self._stop_s // 60)) if self.start_s < self._stop_s else range(0)

    def _read(self, path: str) -> pa.Table:
        types = {"HashFunction": pa.string()} | {str(minute + 1): pa.int64() for minute in self._minutes}
        table = _table(path, types)
        for name in table.column_names[1:]:
            least = pc.min_max(table[name]).as_py()
            if least["min"] is not None and (least["min"] < 0 or least["max"] >= 10**9):
                row = pc.index(pc.or_(pc.less(table[name], 0), pc.greater_equal(table[name], 10**9)), True).as_py()
                raise TraceError(f"{path}:{row + 2}: minute {name} must be a count from 0 to 999,999,999")
        return table

    def _matrix(self, table: pa.Table) -> Ints:
        """Invocations by function and minute."""
        return np.stack([np.asarray(table[str(minute + 1)].to_numpy(), dtype=np.int64) for minute in self._minutes], axis=1)

    def _counts(self, table: pa.Table) -> tuple[Ints, float]:
        # Minutes at the edges count by the part of them that is in the window.
        edges = np.clip([60.0 * minute for minute in (*self._minutes, self._minutes[-1] + 1)], self.start_s, self._stop_s)
        shares = np.diff(edges) / 60
        return np.ceil(self._matrix(table) @ shares - 1e-9).astype(np.int64), self._stop_s - self.start_s

    def _invocations(self, table: pa.Table, wanted: Bools, streams: Streams) -> tuple[Floats, Ints]:
        rows = np.flatnonzero(wanted)
        counts = self._matrix(table)[rows]
        functions, minutes = (np.repeat(each.ravel(), counts.ravel()) for each in np.indices(counts.shape))
        if self.within_minute == "random":
            part = streams.arrivals.random(len(minutes))
        else:
            many = np.repeat(counts.ravel(), counts.ravel())
            first = np.repeat(np.cumsum(counts.ravel()) - counts.ravel(), counts.ravel())
            part = (np.arange(len(minutes)) - first) / many
        times = 60.0 * (minutes + self._minutes[0] + part) - self.start_s
        inside = (times >= 0) & (times < self._stop_s - self.start_s)
        return times[inside], rows[functions[inside]]


@dataclass(frozen=True, kw_only=True)
class AzureFunctions2021(FunctionsTrace):
    """Two weeks of Azure Functions 2021 (CSV: app, func, end_timestamp and duration in seconds; CC-BY-4.0).

    An invocation arrives ``duration`` before its end. Times count from the earliest arrival. A function is named by its app
    and its name in that.
    """

    how_to_get: ClassVar[str] = " (python scripts/fetch_traces.py functions_2021 downloads its archive, to be unpacked)"

    def _read(self, path: str) -> pa.Table:
        numbers = {"end_timestamp": pa.float64(), "duration": pa.float64()}
        table = _table(path, {"app": pa.string(), "func": pa.string()} | numbers)
        if not table.num_rows:
            raise TraceError(f"{path}: the trace has no rows")
        for name in numbers:
            bad = pc.invert(pc.and_(pc.greater_equal(table[name], 0), pc.less(table[name], 1e12)))
            if (row := pc.index(bad, True).as_py()) >= 0:
                raise TraceError(f"{path}:{row + 2}: {name} must be seconds from 0 to 1e12, not {table[name][row].as_py():g}")
        function = pc.dictionary_encode(pc.binary_join_element_wise(table["app"], table["func"], " ")).combine_chunks()
        arrival = pc.subtract(table["end_timestamp"], table["duration"])
        arrival_s = pc.subtract(pc.subtract(arrival, pc.min(arrival)), self.start_s)
        found = pa.table({"function": function.indices, "arrival_s": arrival_s})
        inside = pc.and_(
            pc.greater_equal(arrival_s, 0), pc.less(arrival_s, np.inf if self.duration_s is None else self.duration_s)
        )
        return found.filter(inside)

    def _counts(self, table: pa.Table) -> tuple[Ints, float]:
        last_s = pc.max(table["arrival_s"]).as_py() or 0.0
        counts = np.bincount(np.asarray(table["function"].to_numpy(), dtype=np.int64))
        return counts, float(last_s if self.duration_s is None else self.duration_s)

    def _invocations(self, table: pa.Table, wanted: Bools, streams: Streams) -> tuple[Floats, Ints]:
        functions = np.asarray(table["function"].to_numpy(), dtype=np.int64)
        kept = np.flatnonzero(wanted[functions])
        return np.asarray(table["arrival_s"].to_numpy(), dtype=np.float64)[kept], functions[kept]
