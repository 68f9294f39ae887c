"""AIPerf's file of records, ``profile_export.jsonl``: a JSON object per request, metrics with their units.

Metrics are in milliseconds, times in nanoseconds. A run's clock begins with the run, which its times have at the beginning of
1970. ``inter_chunk_latency`` needs the token times (``itl_s``). Records of AIPerf's warm-up are left out when a file is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from lambdascale.core import UserError
from lambdascale.exchange.results import Results, mean_gap_s, read_text, tidy

_MS, _NS = 1e3, 1e9


class _Value(msgspec.Struct):
    value: float | list[float] | None
    unit: str


class _Metadata(msgspec.Struct):
    session_num: int
    request_start_ns: int
    request_end_ns: int
    benchmark_phase: str


class _Error(msgspec.Struct):
    message: str


class _Record(msgspec.Struct):
    metadata: _Metadata
    metrics: dict[str, _Value]
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Record).decode
_MILLISECONDS = {"ms": 1.0, "s": 1e3, "sec": 1e3, "us": 1e-3, "ns": 1e-6}


def text(results: Results) -> str:
    """Records of all requests, in the order of their ids."""
    return "".join(msgspec.json.encode(_record(row, results)).decode() + "\n" for row in results.requests.itertuples())


def _record(row: Any, results: Results) -> dict[str, Any]:
    start_ns = round(row.arrival_s * _NS)
    ok = row.status == "ok"
    metadata = {
        "session_num": int(row.request_id),
        "conversation_id": f"request-{int(row.request_id)}",
        "turn_index": 0,
        "credit_issued_ns": start_ns,
        "request_start_ns": start_ns,
        "request_end_ns": start_ns + (round(row.e2e_s * _NS) if ok else 0),
        "worker_id": f"lambdascale {results.system} ({results.backend})",
        "record_processor_id": "lambdascale export",
        "benchmark_phase": "profiling",
        "was_cancelled": False,
    }
    error = None if ok else {"code": None, "type": "RequestFailed", "message": row.failure or "failed"}
    return {"metadata": metadata, "metrics": _metrics(row) if ok else {}, **({} if ok else {"error": error})}


def _metrics(row: Any) -> dict[str, dict[str, Any]]:
    """Metrics of an answered request, under AIPerf's names."""
    first_ms, whole_ms, tokens = row.ttft_s * _MS, row.e2e_s * _MS, int(row.output_tokens)
    gap_s = mean_gap_s(row.ttft_s, row.e2e_s, tokens)
    found: dict[str, tuple[Any, str]] = {
        "time_to_first_token": (first_ms, "ms"),
        "request_latency": (whole_ms, "ms"),
        "input_sequence_length": (int(row.prompt_tokens), "tokens"),
        "output_sequence_length": (tokens, "tokens"),
        "output_token_count": (tokens, "tokens"),
    }
    if gap_s is not None:
        found["inter_token_latency"] = gap_s * _MS, "ms"
    if gap_s:
        found["output_token_throughput_per_user"] = 1 / gap_s, "tokens/sec/user"
    if row.itl_s:
        found["time_to_second_token"] = row.itl_s[0] * _MS, "ms"
        found["inter_chunk_latency"] = [gap * _MS for gap in row.itl_s], "ms"
    return {name: {"value": value, "unit": unit} for name, (value, unit) in found.items()}


def read(path: Path) -> Results:
    """Read a file of AIPerf's, or of ours; UserError, with the line, for anything else."""
    records: list[_Record] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(_decode(line))
        except msgspec.MsgspecError as error:
            raise UserError(f"{path}:{number}: not a record of AIPerf: {error}") from error
    measured = [record for record in records if record.metadata.benchmark_phase != "warmup"]
    if not measured:
        raise UserError(f"{path} has no record of a measured request")
    begin_ns = min(record.metadata.request_start_ns for record in measured)
    rows = [_row(record, begin_ns, path) for record in measured]
    rows.sort(key=lambda row: (row["arrival_s"], row["request_id"]))
    return Results(requests=tidy(rows), backend="aiperf", system=path.name)


class _Answer(NamedTuple):
    """Numbers of an answered request; times in seconds."""

    prompt_tokens: float
    output_tokens: float
    ttft_s: float
    e2e_s: float


def _row(record: _Record, begin_ns: int, path: Path) -> dict[str, Any]:
    metadata = record.metadata
    row: dict[str, Any] = {"request_id": metadata.session_num, "arrival_s": (metadata.request_start_ns - begin_ns) / _NS}
    if record.error is not None:
        return row | {"status": "failed", "failure": record.error.message}
    numbers = _Answer(
        prompt_tokens=_one(record, "input_sequence_length", path),
        output_tokens=_one(record, "output_sequence_length", path),
        ttft_s=_one(record, "time_to_first_token", path) / _MS,
        e2e_s=_one(record, "request_latency", path) / _MS,
    )
    gaps = record.metrics.get("inter_chunk_latency")
    # A chunk may hold several tokens: then its gaps are not those between tokens.
    known = gaps is not None and isinstance(gaps.value, list) and len(gaps.value) == numbers.output_tokens - 1
    if gaps is not None and isinstance(gaps.value, list) and known:
        row["itl_s"] = [value * _scale(gaps.unit, path) / _MS for value in gaps.value]
    tpot_s = mean_gap_s(numbers.ttft_s, numbers.e2e_s, numbers.output_tokens)
    return row | numbers._asdict() | {"tpot_s": tpot_s, "status": "ok"}


def _one(record: _Record, name: str, path: Path) -> float:
    """Value of a metric; times in milliseconds."""
    metric = record.metrics.get(name)
    if metric is None or not isinstance(metric.value, int | float):
        raise UserError(
            f"{path}: the record of request {record.metadata.session_num} has no {name}; was it made with --streaming?"
        )
    return metric.value * (1 if metric.unit == "tokens" else _scale(metric.unit, path))


def _scale(unit: str, path: Path) -> float:
    if unit not in _MILLISECONDS:
        raise UserError(f"{path}: {unit!r} is no unit of time that is known here")
    return _MILLISECONDS[unit]
