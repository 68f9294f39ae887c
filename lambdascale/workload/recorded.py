"""Replay of a run: the requests of its requests.parquet, as they were."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lambdascale.core import TraceError
from lambdascale.core.checks import LARGEST, require, shown
from lambdascale.workload.base import Provenance
from lambdascale.workload.columns import Bools, Columns, Floats, Ints, Streams, natural_period_s
from lambdascale.workload.scan import opened
from lambdascale.workload.shaping import check_count
from lambdascale.workload.tracefile import Failures, WindowedWorkload

_REQUIRED = ("model", "prompt_tokens", "output_tokens", "status")
_OPTIONAL = ("max_tokens", "answer_tokens", "session")


@dataclass(frozen=True, kw_only=True)
class RecordedRun(WindowedWorkload):
    """Requests of a finished run, simulated or live: arrivals, models, lengths, limits and sessions as recorded.

    ``path`` is the folder of the run or its requests.parquet. The first arrival keeps its time, so that the same system at the
    same seed repeats the run. ``arrivals``: as the run's workload had them ("scheduled"), or as its front end received them
    ("received"), which differs in a live run. ``match_models``: models of the run have the names of the recorded ones
    ("name"), or take the place of those in alphabetical order ("order"). ``failures``: requests that the run's own trace
    recorded as failed, and those of which no answer is known (older runs: all that failed): left out ("drop"), failed again
    without being served ("count"), or an error ("refuse"). Requests that failed for another reason are served again.
    """

    arrivals: Literal["scheduled", "received"] = "scheduled"
    match_models: Literal["name", "order"] = "name"
    failures: Failures = "count"
    max_output_tokens: int | None = None

    records_limits: ClassVar[bool] = True
    how_to_get: ClassVar[str] = " (the folder of a run, such as results/raw/NAME/RUN)"

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        require(self.popularity == "first", "RecordedRun has the models that were recorded: leave workload.popularity at first")

    def _produce(self, streams: Streams, most: float, models: int) -> tuple[Columns, Provenance]:
        assert self.path is not None, "checked on construction"
        path = Path(self.path).expanduser()
        file = str(path / "requests.parquet" if path.is_dir() else path)
        with opened(file, self.how_to_get) as raw:
            sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
        table = self._read(file)
        check_count(table.num_rows, most)
        columns, failed = self._columns(table, file)
        if failed.any():
            columns = self._without(columns, failed, file)
        columns = columns.at(columns.arrival_s)
        provenance = Provenance(source=file, sha256=sha256, rows=table.num_rows, dropped_failures=table.num_rows - len(columns))
        return self._windowed(columns), provenance

    @property
    def _time(self) -> str:
        return "arrival_s" if self.arrivals == "scheduled" else "received_s"

    def _read(self, file: str) -> pa.Table:
        try:
            found = pq.ParquetFile(file)
            names = found.schema_arrow.names
            if missing := [name for name in (self._time, *_REQUIRED) if name not in names]:
                raise TraceError(f"{file}: not the requests of a run: it has no column {missing[0]}")
            return found.read([name for name in (self._time, *_REQUIRED, *_OPTIONAL) if name in names])
        except (OSError, pa.ArrowInvalid) as error:
            raise TraceError(f"cannot read {file}: {error!s:.100}") from error

    def _columns(self, table: pa.Table, file: str) -> tuple[Columns, Bools]:
        """Requests in the order of the file, and True for those that are not to be served."""
        if self.arrivals == "received":
            # The front end never had the requests that the run's own trace records as failed.
            failed = pc.equal(table["status"], "failed").fill_null(False)
            table = table.filter(pc.invert(pc.and_(failed, pc.is_null(table["received_s"]))))
        times = _numbers(table, self._time, file, LARGEST).astype(np.float64)
        answers = _answers(table, file)
        if table["model"].null_count:
            raise TraceError(f"{file}: row {pc.index(table['model'].is_null(), True).as_py()}: model must be a name")
        names = sorted(pc.unique(table["model"]).to_pylist())
        columns = Columns(
            arrival_s=times,
            prompt_tokens=_numbers(table, "prompt_tokens", file, 1e9).astype(np.int64),
            output_tokens=answers,
            period_s=float(times.min(initial=np.inf) + natural_period_s(times)) if len(times) else 0.0,
            trace_model=np.asarray(pc.index_in(table["model"], pa.array(names, pa.string())).to_numpy(), dtype=np.int64),
            trace_models=tuple(names),
            session=np.asarray(table["session"].fill_null("").to_pylist(), dtype=object) if _has(table, "session") else None,
            limit=_numbers(table, "max_tokens", file, 1e9).astype(np.int64) if _has(table, "max_tokens") else None,
        )
        return columns, (columns.prompt_tokens == 0) | (columns.output_tokens == 0)

    def _without(self, columns: Columns, failed: Bools, file: str) -> Columns:
        if self.failures == "refuse":
            row = int(np.flatnonzero(failed)[0])
            raise TraceError(
                f"{file}: row {row} has no answer to replay (workload.failures=drop leaves such requests out, count counts them "
                "as failed)"
            )
        return columns.take(np.flatnonzero(~failed)) if self.failures == "drop" else columns

    def _models_of(self, columns: Columns, models: list[str], streams: Streams) -> Ints:
        assert columns.trace_model is not None, "a run records its models"
        recorded = columns.trace_models
        if self.match_models == "order":
            return super()._models_of(columns, models, streams)
        if missing := [name for name in recorded if name not in models]:
            raise TraceError(
                f"{self.path}: the run served {shown(missing[0])}, this one has {', '.join(models)} "
                "(workload=run workload.match_models=order takes them in order)"
            )
        return np.array([models.index(name) for name in recorded], dtype=np.int64)[columns.trace_model]


def _has(table: pa.Table, column: str) -> bool:
    return column in table.column_names and table[column].null_count < table.num_rows


def _numbers(table: pa.Table, column: str, file: str, most: float) -> Floats:
    """Numbers of a column; TraceError for one that is missing or out of range, with its row (from 0)."""
    try:
        values = np.asarray(table[column].cast(pa.float64()).to_numpy(), dtype=np.float64)
    except pa.ArrowInvalid as error:
        raise TraceError(f"{file}: {column} must hold numbers: {error!s:.100}") from error
    bad = np.flatnonzero(~((values >= 0) & (values <= most)))
    if len(bad):
        raise TraceError(f"{file}: row {bad[0]}: {column} must be from 0 to {most:g}, not {values[bad[0]]:g}")
    return values


def _answers(table: pa.Table, file: str) -> Ints:
    """Tokens of each answer: where it ends, or in tables without that how long it was; 0 where neither is known."""
    known = [table[name].cast(pa.float64()) for name in ("answer_tokens", "output_tokens") if name in table.column_names]
    answers = table.set_column(0, "answer", pc.fill_null(pc.coalesce(*known), 0.0))
    return _numbers(answers, "answer", file, 1e9).astype(np.int64)
