"""Tables derived from a run's raw entries: one row per request, one per event, and GPUs in use over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lambdascale.core import Failure, Request, TracedRequest
from lambdascale.core.commands import (
    AllocateNode,
    Command,
    Dispatch,
    EvictBlocks,
    FailRequest,
    LoadBlocks,
    ReleaseNode,
    Serve,
    StartMulticast,
    SwitchMode,
)
from lambdascale.core.events import CommandFailed, Event, NodeJoined, NodeLost, RequestArrived, RequestFinished, TokensProduced
from lambdascale.core.token_gaps import Floats, TokenGaps
from lambdascale.metrics.interference import beside_multicasts
from lambdascale.metrics.recorder import Recorder
from lambdascale.metrics.ttft_parts import PARTS, Dispatched, Starts

_REQUESTS = pa.schema(
    [
        ("request_id", pa.int64()),
        ("model", pa.string()),
        ("system", pa.string()),
        ("arrival_s", pa.float64()),
        ("received_s", pa.float64()),
        ("prompt_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("max_tokens", pa.int64()),
        ("dispatched_s", pa.float64()),
        ("first_token_s", pa.float64()),
        ("finished_s", pa.float64()),
        *((f"{part}_s", pa.float64()) for part in PARTS),
        ("ttft_s", pa.float64()),
        ("tpot_s", pa.float64()),
        ("e2e_s", pa.float64()),
        ("first_token_mode", pa.string()),
        ("restarts", pa.int64()),
        ("status", pa.string()),
        ("failure_reason", pa.string()),
        ("failure", pa.string()),
        ("answer_tokens", pa.int64()),
        ("session", pa.string()),
        ("beside_multicast_s", pa.float64()),
    ]
)
_NO_PARTS = (math.nan,) * len(PARTS)
_TRACED = Failure("traced", "failed in the trace")
_EVENTS = pa.schema(
    [
        ("seq", pa.int64()),
        ("at_s", pa.float64()),
        ("kind", pa.string()),
        ("model", pa.string()),
        ("node", pa.int64()),
        ("instance", pa.int64()),
        ("request_id", pa.int64()),
        ("transfer_id", pa.int64()),
        ("block", pa.int64()),
        ("tokens", pa.int64()),
        ("mode", pa.string()),
        ("detail", pa.string()),
    ]
)
# Columns of gaps between tokens, behind the others.
_GAPS = pa.schema([("itl_s", pa.list_(pa.float32())), ("stall_s", pa.float64())])
# Gaps beyond which those of a run are rounded to milliseconds: then a table of millions is small.
MANY_GAPS = 500_000
_GPUS = pa.schema([("at_s", pa.float64()), ("model", pa.string()), ("delta", pa.int64()), ("gpus", pa.int64())])


class _Life(msgspec.Struct, gc=False):
    """History of one request; times in seconds of the run."""

    request: Request
    received_s: float
    dispatches: int = 0
    dispatched_s: float | None = None
    dispatched: Dispatched | None = None  # the last time before the first token
    parts: Sequence[float] | None = None  # of PARTS
    first_token_s: float | None = None
    mode: str | None = None
    finished_s: float | None = None
    tokens: int = 0
    failure: Failure | None = None

    @property
    def status(self) -> str:
        """State in which the run left the request."""
        return "failed" if self.failure is not None else "lost" if self.finished_s is None else "ok"


def _columns(
    lives: Sequence[_Life], system: str, known: Mapping[int, TracedRequest], beside: Mapping[int, float]
) -> dict[str, Sequence[Any] | Floats]:
    """Columns of requests.parquet; by id, ``known``: what the workload knew of requests, ``beside``: see beside_multicasts.

    Of numbers, NaN stands for null.
    """
    asked = [life.request for life in lives]
    traced = [known.get(r.request_id) for r in asked]
    parts = zip(*(_NO_PARTS if life.parts is None else life.parts for life in lives), strict=True) if lives else [()] * len(PARTS)
    tokens = [None if life.finished_s is None else life.tokens for life in lives]
    arrival_s, first_s, finished_s, count = (
        np.array(column, dtype=np.float64)
        for column in (
            [r.arrival_s for r in asked],
            [life.first_token_s for life in lives],
            [life.finished_s for life in lives],
            tokens,
        )
    )
    return {
        "request_id": [r.request_id for r in asked],
        "model": [r.model for r in asked],
        "system": [system] * len(asked),
        "arrival_s": arrival_s,
        "received_s": [life.received_s for life in lives],
        "prompt_tokens": [r.prompt_tokens for r in asked],
        "output_tokens": tokens,
        "max_tokens": [r.max_tokens for r in asked],
        "dispatched_s": [life.dispatched_s for life in lives],
        "first_token_s": first_s,
        "finished_s": finished_s,
        **{f"{part}_s": column for part, column in zip(PARTS, parts, strict=True)},
        "ttft_s": first_s - arrival_s,
        # Mean seconds between tokens, of answers with two of them.
        "tpot_s": (finished_s - first_s) / np.where(count > 1, count - 1, np.nan),
        "e2e_s": finished_s - arrival_s,
        "first_token_mode": [life.mode for life in lives],
        "restarts": [life.dispatches - 1 if life.dispatches else 0 for life in lives],
        "status": [life.status for life in lives],
        "failure_reason": [None if life.failure is None else life.failure.reason for life in lives],
        "failure": [None if life.failure is None else life.failure.text for life in lives],
        "answer_tokens": [None if t is None else min(t.output_tokens, r.max_tokens) for t, r in zip(traced, asked, strict=True)],
        "session": [None if t is None else t.session for t in traced],
        "beside_multicast_s": [beside.get(r.request_id) for r in asked],
    }


def _unserved_columns(unserved: Sequence[TracedRequest], system: str) -> dict[str, Sequence[Any] | Floats]:
    """Columns of requests that their trace records as failed: nobody was asked to serve them."""
    nothing = [None] * len(unserved)
    known = {each.request_id: each for each in unserved}
    columns = _columns([_Life(each.request, math.nan, failure=_TRACED) for each in unserved], system, known, {})
    return columns | {"answer_tokens": nothing}


def _lives(recorder: Recorder) -> dict[int, _Life]:
    lives: dict[int, _Life] = {}
    starts = Starts()
    at = 0.0  # of the next command
    for entry in recorder.log:
        if type(entry) is TokensProduced:
            life = lives[entry.request_id]
            if life.first_token_s is None:
                life.first_token_s, life.mode = entry.at, entry.mode
                if life.dispatched is not None:
                    life.parts = starts.parts(life.request.arrival_s, life.dispatched, entry.at)
        elif type(entry) is RequestFinished:
            life = lives[entry.request_id]
            life.finished_s, life.tokens = entry.at, entry.tokens
        elif type(entry) is RequestArrived:
            lives[entry.request.request_id] = _Life(entry.request, entry.at)
        elif type(entry) is Dispatch:
            _dispatched(at, entry, lives)
        elif type(entry) is FailRequest:
            lives[entry.request_id].failure = entry.failure
        elif isinstance(entry, Command):
            starts.take(at, entry)
        elif isinstance(entry, Event):
            starts.take(entry.at, entry)
        else:
            at = entry
    return lives


def _dispatched(at: float, dispatch: Dispatch, lives: Mapping[int, _Life]) -> None:
    for request in dispatch.requests:
        life = lives[request.request_id]
        if life.first_token_s is None:
            since_s = life.request.arrival_s if life.dispatched is None else life.dispatched.at_s
            life.dispatched = Dispatched(at, dispatch.instance, since_s)
        if not life.dispatches:
            life.dispatched_s = at
        life.dispatches += 1


def requests_table(
    recorder: Recorder,
    system: str,
    traced: Iterable[TracedRequest] = (),
    unserved: Iterable[TracedRequest] = (),
    gaps: TokenGaps | None = None,
) -> pa.Table:
    """One row per request that arrived, ordered by id, and one for each of ``unserved``; times in seconds of the run.

    ``traced``: the requests of the workload, from which ``answer_tokens`` and ``session`` are taken. ``unserved``: those that
    the workload's trace records as failed. ``gaps``: between the tokens of each request; null without. More than ``MANY_GAPS``
    are rounded to milliseconds, their longest (``stall_s``) is not.

    ``output_tokens`` counts the tokens of the answer, null for a request that did not finish. ``restarts`` counts
    dispatches after the first; a mode switch does not count. ``status`` is ok, failed, or lost for a request that was neither
    answered nor refused, for which :func:`lambdascale.metrics.summarise` raises an error.
    """
    lives = _lives(recorder)
    known = {each.request_id: each for each in traced}
    table = _table(_columns([lives[request_id] for request_id in sorted(lives)], system, known, beside_multicasts(recorder)))
    if failed := [*unserved]:
        table = pa.concat_tables([table, _table(_unserved_columns(failed, system))]).combine_chunks()
    lists, stalls = _gap_columns(table, gaps)
    return table.append_column(_GAPS.field("itl_s"), lists).append_column(_GAPS.field("stall_s"), stalls)


def _table(columns: Mapping[str, Sequence[Any] | Floats]) -> pa.Table:
    return pa.table([pa.array(columns[f.name], f.type, from_pandas=True) for f in _REQUESTS], schema=_REQUESTS)


def answered(requests: pa.Table, gaps: TokenGaps) -> TokenGaps:
    """Gaps of those requests whose status is ok: the end of one may have been too late to count."""
    return gaps.of_requests(requests["request_id"].filter(pc.equal(requests["status"], "ok")).to_numpy())


def _gap_columns(requests: pa.Table, gaps: TokenGaps | None) -> tuple[pa.Array, pa.Array]:
    """Columns ``itl_s`` and ``stall_s`` of requests."""
    if gaps is None:
        return pa.nulls(len(requests), _GAPS.field("itl_s").type), pa.nulls(len(requests), pa.float64())
    numbers, gaps = requests["request_id"].to_numpy(), answered(requests, gaps)
    known = np.isin(numbers, gaps.request_ids)
    lengths = np.zeros(len(numbers), dtype=np.int64)
    lengths[known] = gaps.lengths
    stalls = np.full(len(numbers), np.nan)
    stalls[known] = gaps.longest()
    # Each number is rounded once, however many requests share it.
    pool = gaps.pool.astype(np.float32)
    if gaps.lengths.sum() > MANY_GAPS:
        pool.round(3, out=pool)
    offsets = pa.array(np.cumsum(np.concatenate([[0], lengths])), pa.int32(), mask=np.append(~known, False))
    lists = pa.ListArray.from_arrays(offsets, pa.array(gaps.joined(pool)))
    return lists, pa.array(stalls, pa.float64(), from_pandas=True)


# -- events.parquet ------------------------------------------------------------------------------------------------------

_PLAIN = ("node", "instance", "request_id", "transfer_id", "block", "tokens", "mode", "model")


def _multicast_detail(command: StartMulticast) -> dict[str, Any]:
    plan = command.plan
    return {
        "sources": plan.sources,
        "source_tiers": command.source_tiers,
        "destinations": plan.destinations,
        "blocks": plan.blocks,
        "rounds": len(plan.rounds),
        "bytes": sum(command.block_bytes),
        "multicast": command.multicast,
    }


_DETAILS: dict[type, Callable[[Any], Any]] = {
    StartMulticast: _multicast_detail,
    LoadBlocks: lambda c: {
        "tier": c.tier,
        "loader": c.loader,
        "blocks": c.blocks,
        "bytes": sum(c.block_bytes[b] for b in c.blocks),
    },
    Serve: lambda c: {"stages": [(s.node, s.first_block, s.last_block) for s in c.stages]},
    SwitchMode: lambda c: {"pipeline": c.pipeline, "moves": c.moves, "kv": c.kv},
    EvictBlocks: lambda c: {"tier": c.tier},
    AllocateNode: lambda c: {"gpus": c.gpus},
    ReleaseNode: lambda c: {"gpus": c.gpus, "keep_host": c.keep_host},
    FailRequest: lambda c: {"reason": c.failure.reason, "text": c.failure.text},
    CommandFailed: lambda e: {"command": e.command, "reason": e.reason},
}


def _event_rows(at: float, entry: Event | Command) -> list[tuple[Any, ...]]:
    kind = type(entry)
    if isinstance(entry, RequestArrived):
        request = entry.request
        return [(at, kind.__name__, request.model, None, None, request.request_id, None, None, None, None, None)]
    if isinstance(entry, Dispatch):
        return [
            (at, kind.__name__, r.model, None, entry.instance, r.request_id, None, None, None, None, None) for r in entry.requests
        ]
    node, instance, request_id, transfer_id, block, tokens, mode, model = (getattr(entry, name, None) for name in _PLAIN)
    describe = _DETAILS.get(kind)
    detail = None if describe is None else msgspec.json.encode(describe(entry)).decode()
    return [(at, kind.__name__, model, node, instance, request_id, transfer_id, block, tokens, mode, detail)]


def events_table(recorder: Recorder) -> pa.Table:
    """One row per event and command in the order they happened (a Dispatch: one per request); equal runs give equal bytes."""
    rows = [row for at, entry in recorder.entries for row in _event_rows(at, entry)]
    columns: Sequence[Sequence[Any]] = list(zip(*rows, strict=True)) if rows else [()] * (len(_EVENTS) - 1)
    columns = [range(len(rows)), *columns]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, _EVENTS, strict=True)], schema=_EVENTS)


# -- GPUs in use ---------------------------------------------------------------------------------------------------------


def gpu_usage(recorder: Recorder) -> pa.Table:
    """GPUs allocated over time, as steps: at ``at_s`` the GPUs of ``model`` change by ``delta`` to ``gpus``.

    Loading counts, since it happens after the allocation. Allocations of a lost node end when it is lost, or joins anew. Those
    still held at the end of the run have no closing step.
    """
    rows: list[tuple[float, str, int, int]] = []
    held: dict[tuple[int, str], int] = {}
    in_use: dict[str, int] = {}

    def change(at: float, node: int, model: str, delta: int) -> None:
        held[node, model] = held.get((node, model), 0) + delta
        in_use[model] = in_use.get(model, 0) + delta
        assert held[node, model] >= 0, f"node {node} releases GPUs that {model} does not hold"
        rows.append((at, model, delta, in_use[model]))

    for at, entry in recorder.entries:
        if isinstance(entry, AllocateNode):
            change(at, entry.node, entry.model, entry.gpus)
        elif isinstance(entry, ReleaseNode):
            change(at, entry.node, entry.model, -entry.gpus)
        elif isinstance(entry, NodeLost | NodeJoined):
            for (node, model), gpus in list(held.items()):
                if node == entry.node and gpus:
                    change(at, node, model, -gpus)
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(_GPUS)
    return pa.table([pa.array(column, f.type) for column, f in zip(columns, _GPUS, strict=True)], schema=_GPUS)


def gpu_seconds(usage: pa.Table, end_s: float) -> float:
    """GPU-seconds of a usage table up to ``end_s``: every step counts from its time to ``end_s``."""
    return math.fsum(
        delta * (end_s - at) for at, delta in zip(usage["at_s"].to_pylist(), usage["delta"].to_pylist(), strict=True)
    )
