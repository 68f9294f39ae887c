"""Measures of scale-outs and host caches from a run's events.parquet. Frames in, values out; times in seconds of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

_ABOUT_COPIES = ("PlaceCopy", "ReleaseNode", "LoadBlocks", "StartMulticast", "BlockArrived", "EvictBlocks", "NodeLost")


def scale_out_times(events: pd.DataFrame) -> dict[str, float | int | None]:
    """The first scale-out after the first request, in seconds from its first allocation.

    ``new_nodes`` counts the nodes allocated at that moment that later held the whole model; ``first_node_s`` and ``all_nodes_s``
    are the times at which the first and the last of them held it, ``pipeline_s`` that of the first execution pipeline. None for
    what did not happen. ``start_s`` is in seconds of the run.
    """
    arrived = events.index[events.kind == "RequestArrived"]
    later = events.loc[arrived[0] :] if len(arrived) else events.iloc[:0]
    allocations = later[later.kind == "AllocateNode"]
    if allocations.empty:
        return {"start_s": None, "new_nodes": 0, "pipeline_s": None, "first_node_s": None, "all_nodes_s": None}
    start_s = float(allocations.at_s.iloc[0])
    nodes = set(allocations.node[allocations.at_s == start_s])
    blocks = later[(later.kind == "BlockArrived") & later.node.isin(nodes)].drop_duplicates(["node", "block"])
    per_node = blocks.groupby("node").at_s.agg(["max", "size"])
    complete = per_node["max"][per_node["size"] == per_node["size"].max()] - start_s
    serves = later[later.kind == "Serve"]
    formed = serves.at_s[[len(json.loads(detail)["stages"]) > 1 for detail in serves.detail]]
    return {
        "start_s": start_s,
        "new_nodes": len(complete),
        "pipeline_s": None if formed.empty else float(formed.iloc[0]) - start_s,
        "first_node_s": None if complete.empty else float(complete.min()),
        "all_nodes_s": None if complete.empty else float(complete.max()),
    }


def scale_out_durations(events: pd.DataFrame) -> list[float]:
    """Seconds from the start of each multicast or load until its last block has arrived; "instant" loads are excluded."""
    starts = events[events.kind.isin(["StartMulticast", "LoadBlocks"]) & ~events.detail.str.contains('"instant"', na=False)]
    ends = events[events.kind == "BlockArrived"].groupby("transfer_id").at_s.max()
    return [float(ends[t] - at) for t, at in zip(starts.transfer_id, starts.at_s, strict=True) if t in ends.index]


def loads_by_tier(events: pd.DataFrame) -> dict[str, int]:
    """Number of nodes that loaded from their own host memory, loaded from their SSD, or received a multicast."""
    loads = [json.loads(detail)["tier"] for detail in events.detail[events.kind == "LoadBlocks"]]
    multicasts = [len(json.loads(detail)["destinations"]) for detail in events.detail[events.kind == "StartMulticast"]]
    return {"loads_host": loads.count("host"), "loads_ssd": loads.count("ssd"), "loads_multicast": sum(multicasts)}


@dataclass(slots=True)
class _Copy:
    """Times at which a host copy was created and last used."""

    begin_s: float
    used_s: float


def host_copies(
    events: pd.DataFrame, keep_alive_s: float | None, end_s: float | None = None, *, lasting_nodes: int = 0
) -> pd.DataFrame:
    """One row per host copy of the run: node, model, ``begin_s`` and ``end_s``.

    A copy begins when it is placed or kept on a release. Another release and every block read from it renew it. It ends when
    it is evicted, ``keep_alive_s`` after its last use (None, and on the first ``lasting_nodes`` nodes: never), when its node is
    lost, or with the run, at ``end_s`` (None: the time of the last row).
    """
    copies: dict[tuple[int, str], _Copy] = {}
    readers: dict[int, list[int]] = {}
    ended: list[tuple[int, str, float, float]] = []

    def expiry_s(key: tuple[int, str]) -> float:
        return inf if keep_alive_s is None or key[0] < lasting_nodes else copies[key].used_s + keep_alive_s

    def end(key: tuple[int, str], at_s: float) -> None:
        if key in copies:
            ended.append((*key, copies[key].begin_s, min(at_s, expiry_s(key))))
            del copies[key]

    def use(key: tuple[int, str], at_s: float, *, fresh: bool = False) -> None:
        if key in copies and at_s > expiry_s(key):
            end(key, at_s)
        if key in copies:
            copies[key].used_s = at_s
        elif fresh:
            copies[key] = _Copy(at_s, at_s)

    for row in _rows_about_copies(events):
        at_s, kind, model = row.at_s, row.kind, row.model
        if kind == "PlaceCopy" or (kind == "ReleaseNode" and json.loads(row.detail).get("keep_host")):
            use((int(row.node), model), at_s, fresh=True)
        elif kind in ("LoadBlocks", "StartMulticast"):
            readers[int(row.transfer_id)] = _host_readers(row)
            for node in readers[int(row.transfer_id)]:
                use((node, model), at_s)
        elif kind == "BlockArrived":
            for node in readers.get(int(row.transfer_id), ()):
                use((node, model), at_s)
        elif kind == "EvictBlocks":
            end((int(row.node), model), at_s)
        elif kind == "NodeLost":
            for key in [key for key in copies if key[0] == row.node]:
                end(key, at_s)
    last_s = end_s if end_s is not None else float(events.at_s.iloc[-1]) if len(events) else 0.0
    for key in list(copies):
        end(key, last_s)
    return pd.DataFrame(ended, columns=["node", "model", "begin_s", "end_s"])


def host_byte_seconds(events: pa.Table, keep_alive_s: float | None, sizes: Mapping[str, int], *, lasting_nodes: int = 0) -> float:
    """Bytes of host memory that copies of models take, times seconds, over the whole run. ``sizes``: bytes of each model."""
    rows = events.filter(pc.is_in(events["kind"], pa.array(_ABOUT_COPIES))).to_pandas()
    if rows.empty:
        return 0.0
    copies = host_copies(rows, keep_alive_s, events["at_s"][-1].as_py(), lasting_nodes=lasting_nodes)
    return math.fsum((copies.end_s - copies.begin_s) * copies.model.map(sizes))


def _rows_about_copies(events: pd.DataFrame) -> Iterator[Any]:
    yield from events[events.kind.isin(_ABOUT_COPIES)].itertuples()


def _host_readers(row: Any) -> list[int]:
    """Nodes whose host copies a transfer reads."""
    detail = json.loads(row.detail)
    if row.kind == "LoadBlocks":
        return [int(row.node)] if detail["tier"] == "host" else []
    return [node for node, tier in zip(detail["sources"], detail["source_tiers"], strict=True) if tier == "host"]
