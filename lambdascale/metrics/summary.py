"""Summary of a run: the contents of summary.json."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from lambdascale.core import IncompleteRunError
from lambdascale.core.commands import AllocateNode
from lambdascale.core.events import RequestArrived, RequestPreempted
from lambdascale.metrics.recorder import Recorder
from lambdascale.metrics.starts import node_starts
from lambdascale.metrics.tables import gpu_seconds, gpu_usage


def summarise(
    recorder: Recorder, requests: pa.Table, *, system: str, backend: str, usd_per_gpu_hour: float, wall_s: float
) -> dict[str, Any]:
    """Summary of a run as in summary.json; percentiles are interpolated linearly, None without values.

    ``scale_outs`` counts allocations of a node to a model from the first request on; ``node_starts`` and ``multicast_starts``
    are those by the way the weights came (see the function node_starts). IncompleteRunError unless every submitted request was
    completed or failed, and every completed one has a first token.
    """
    frame = requests.to_pandas()
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
        "ttft_s": distribution(ok.ttft_s.to_numpy()),
        "tpot_s": distribution(ok.tpot_s.dropna().to_numpy()),
        "gpu_seconds": used,
        "cost_usd": used / 3600 * usd_per_gpu_hour,
        "scale_outs": _scale_outs(recorder),
        "node_starts": ways,
        "multicast_starts": sizes,
        "pipeline_first_tokens": int((ok.first_token_mode == "pipeline").sum()),
        "restarts": int(frame.restarts.sum()),
        "preemptions": sum(type(entry) is RequestPreempted for _, entry in recorder.entries),
        "simulated_s": recorder.end_s if backend == "sim" else None,
        "wall_s": wall_s,
    }
    if frame.model.nunique() > 1:
        summary["per_model"] = {
            str(model): {"requests": len(rows), "ttft_s": distribution(rows.ttft_s.dropna().to_numpy())}
            for model, rows in frame.groupby("model")
        }
    return summary


def _scale_outs(recorder: Recorder) -> int:
    kinds = [type(entry) for _, entry in recorder.entries]
    first = kinds.index(RequestArrived) if RequestArrived in kinds else len(kinds)
    return kinds[first:].count(AllocateNode)


def distribution(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float | None]:
    """Mean, P50, P90 and P99 of ``values``, in their unit; all None without values."""
    if len(values) == 0:
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    p50, p90, p99 = (float(v) for v in np.percentile(values, [50, 90, 99]))
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99}
