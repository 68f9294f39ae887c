"""Summary of a run: the contents of summary.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lambdascale.core import IncompleteRunError
from lambdascale.core.commands import AllocateNode
from lambdascale.core.events import RequestArrived, RequestPreempted
from lambdascale.core.token_gaps import TokenGaps
from lambdascale.metrics.recorder import Recorder
from lambdascale.metrics.slo import Slo, attainment
from lambdascale.metrics.starts import node_starts
from lambdascale.metrics.tables import answered, gpu_seconds, gpu_usage
from lambdascale.metrics.ttft_parts import PARTS


@dataclass(frozen=True)
class HostMemoryUse:
    """Host memory taken by copies of models, in bytes times seconds, and its price for 10^9 bytes and an hour."""

    byte_seconds: float
    usd_per_gb_hour: float

    def costs(self, gpus_usd: float) -> dict[str, float]:
        """Keys of summary.json about it: its amount and cost, and the cost of the run with that of GPUs."""
        gb_seconds = self.byte_seconds / 1e9
        usd = gb_seconds / 3600 * self.usd_per_gb_hour
        return {"host_gb_seconds": gb_seconds, "host_cost_usd": usd, "total_cost_usd": gpus_usd + usd}


_PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}


def summarise(
    recorder: Recorder,
    requests: pa.Table,
    *,
    system: str,
    backend: str,
    usd_per_gpu_hour: float,
    host: HostMemoryUse | None = None,
    wall_s: float,
    slo: Slo | None = None,
    gaps: TokenGaps | None = None,
) -> dict[str, Any]:
    """Summary of a run as in summary.json; percentiles are interpolated linearly, None without values.

    ``scale_outs`` counts allocations of a node to a model from the first request on; ``node_starts`` and ``multicast_starts``
    are those by the way the weights came (see the function node_starts). IncompleteRunError unless every submitted request was
    completed or failed, and every completed one has a first token. ``host``: what copies of models took of host memory, and its
    price; ``gaps``: between tokens; without them their keys are absent.
    """
    # The gaps between tokens, which may be millions, are taken from ``gaps``.
    frame = requests.drop_columns(["itl_s"]).to_pandas()
    counts = {
        "submitted": len(frame),
        "completed": int((frame.status == "ok").sum()),
        "failed": int((frame.status == "failed").sum()),
    }
    if counts["completed"] + counts["failed"] != counts["submitted"]:
        lost = frame.request_id[~frame.status.isin(["ok", "failed"])].tolist()
        raise IncompleteRunError(f"{len(lost)} of {len(frame)} requests are unaccounted for, the first: {lost[:5]}")
    ok = frame[frame.status == "ok"]
    if ok.ttft_s.isna().any():
        silent = ok.request_id[ok.ttft_s.isna()].tolist()
        raise IncompleteRunError(f"{len(silent)} requests finished without a first token, the first: {silent[:5]}")
    ways, sizes = node_starts(recorder)
    used = gpu_seconds(gpu_usage(recorder), recorder.end_s)
    summary: dict[str, Any] = {
        "system": system,
        "backend": backend,
        "requests": counts,
        "failures": {str(reason): int(count) for reason, count in frame.failure_reason.value_counts().sort_index().items()},
        "rates": _rates(frame),
        "ttft_s": distribution(ok.ttft_s.to_numpy()),
        "tpot_s": distribution(ok.tpot_s.dropna().to_numpy()),
        "e2e_s": distribution(ok.e2e_s.to_numpy()),
        "ntpot_s": distribution((ok.e2e_s / ok.output_tokens).to_numpy()),
        **{f"{part}_s": distribution(ok[f"{part}_s"].to_numpy()) for part in PARTS},
        "beside_multicast_s": distribution(ok.beside_multicast_s.to_numpy()) | {"sum": float(ok.beside_multicast_s.sum())},
        "gpu_seconds": used,
        "cost_usd": used / 3600 * usd_per_gpu_hour,
        **({} if host is None else host.costs(used / 3600 * usd_per_gpu_hour)),
        "scale_outs": _scale_outs(recorder),
        "node_starts": ways,
        "multicast_starts": sizes,
        "pipeline_first_tokens": int((ok.first_token_mode == "pipeline").sum()),
        "restarts": int(frame.restarts.sum()),
        "preemptions": sum(type(entry) is RequestPreempted for _, entry in recorder.entries),
        "simulated_s": recorder.end_s if backend == "sim" else None,
        "wall_s": wall_s,
    }
    if gaps is not None:
        summary["itl_s"] = _between_tokens(requests, gaps)
    if slo is not None:
        summary["slo"] = attainment(
            frame, slo, duration_s=_duration_s(frame), gpu_seconds=used, usd_per_gpu_hour=usd_per_gpu_hour
        )
    if len(frame.model.unique()) > 1:
        summary["per_model"] = {
            str(model): {"requests": len(rows), "ttft_s": distribution(rows.ttft_s.dropna().to_numpy())}
            for model, rows in frame.groupby("model")
        }
    return summary


def _between_tokens(requests: pa.Table, gaps: TokenGaps) -> dict[str, float | None]:
    """Distribution of all gaps between tokens of completed requests in seconds, and ``max``, the longest stall."""
    seconds = answered(requests, gaps).seconds
    longest = float(seconds.max()) if len(seconds) else None
    return distribution(seconds, overwrite=True) | {"max": longest}


def _duration_s(frame: pd.DataFrame) -> float:
    """Seconds from the first arrival to the last end of a request; 0 without a completed request."""
    end = frame.finished_s.max() - frame.arrival_s.min()
    return float(end) if end == end else 0.0


def _rates(frame: pd.DataFrame) -> dict[str, float | None]:
    """Requests per second as asked and as completed, and ``drift_s``: how late the latest one was received, in seconds."""
    asked_s = frame.arrival_s.max() - frame.arrival_s.min() if len(frame) else 0.0
    duration_s = _duration_s(frame)
    return {
        "requested_per_s": len(frame) / float(asked_s) if asked_s else None,
        "achieved_per_s": int((frame.status == "ok").sum()) / duration_s if duration_s else None,
        "drift_s": float((frame.received_s - frame.arrival_s).max()) if len(frame) else None,
    }


def _scale_outs(recorder: Recorder) -> int:
    kinds = [type(entry) for _, entry in recorder.entries]
    first = kinds.index(RequestArrived) if RequestArrived in kinds else len(kinds)
    return kinds[first:].count(AllocateNode)


def distribution(values: np.ndarray[Any, np.dtype[np.float64]], *, overwrite: bool = False) -> dict[str, float | None]:
    """Mean and percentiles (P50 to P99.9) of ``values``, in their unit; all None without values.

    ``overwrite``: their order may be changed, which saves a copy of millions.
    """
    if len(values) == 0:
        return dict.fromkeys(("mean", *_PERCENTILES))
    mean = float(values.mean())
    found = np.percentile(values, [*_PERCENTILES.values()], overwrite_input=overwrite).tolist()
    return {"mean": mean, **dict(zip(_PERCENTILES, found, strict=True))}
