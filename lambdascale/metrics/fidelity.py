"""A simulation beside the live run of the same requests: errors per metric, and estimates of the constants that cause them.

Frames in, values out: the tables of two runs, times in seconds. Errors are of the simulation, in per cent of the live value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

TIMES = {"TTFT": "ttft_s", "TPOT": "tpot_s", "E2E": "e2e_s"}
_LEVELS = (50, 90, 99)
# Constant of the cluster -> the transfers whose duration it determines: their kind, and the tier they read.
_TRANSFERS = {
    "nic_bytes_per_s": ("StartMulticast", "gpu"),
    "pcie_bytes_per_s": ("LoadBlocks", "host"),
    "ssd_bytes_per_s": ("LoadBlocks", "ssd"),
    "remote_bytes_per_s": ("LoadBlocks", "remote"),
}


def errors(
    live: pd.DataFrame, simulated: pd.DataFrame, live_summary: Mapping[str, Any], simulated_summary: Mapping[str, Any]
) -> pd.DataFrame:
    """A row per metric and statistic: ``live``, ``simulated`` and ``error_percent`` (None where the live value is 0 or missing).

    Statistics are percentiles over the requests that both answered, and MAPE, the mean size of these requests' errors.
    """
    both = live[live.status == "ok"].merge(simulated[simulated.status == "ok"], on="request_id", suffixes=("_live", "_sim"))
    rows: list[dict[str, Any]] = []
    for metric, column in TIMES.items():
        pairs = both[[f"{column}_live", f"{column}_sim"]].dropna()
        pairs.columns = pd.Index(["live", "simulated"])
        for level in _LEVELS if len(pairs) else ():
            values = {name: float(np.percentile(pairs[name], level)) for name in ("live", "simulated")}
            rows.append({"metric": metric, "statistic": f"P{level}", **values})
        apart = pairs[pairs.live > 0]
        if len(apart):
            mape = 100 * float((apart.simulated / apart.live - 1).abs().mean())
            rows.append({"metric": metric, "statistic": "MAPE", "live": None, "simulated": None, "error_percent": mape})
    for metric, key in (("scale-outs", "scale_outs"), ("GPU-seconds", "gpu_seconds")):
        rows.append({"metric": metric, "statistic": "total", "live": live_summary[key], "simulated": simulated_summary[key]})
    for row in rows:
        if "error_percent" not in row:
            row["error_percent"] = 100 * (row["simulated"] / row["live"] - 1) if row["live"] else None
    return pd.DataFrame(rows, columns=["metric", "statistic", "live", "simulated", "error_percent"])


def compute_factor(live: pd.DataFrame, simulated: pd.DataFrame) -> float | None:
    """Return how many times longer iterations take live: the median ratio of TPOT by request; None without pairs."""
    both = live.merge(simulated, on="request_id", suffixes=("_live", "_sim"))
    ratios = (both.tpot_s_live / both.tpot_s_sim).replace([np.inf, 0.0], np.nan).dropna()
    return float(ratios.median()) if len(ratios) else None


def extra_s(live: pd.DataFrame, simulated: pd.DataFrame) -> float:
    """Seconds that an iteration takes longer live: the median difference of TPOT, request by request; 0 without pairs."""
    both = live.merge(simulated, on="request_id", suffixes=("_live", "_sim"))
    extra = (both.tpot_s_live - both.tpot_s_sim).dropna()
    return float(extra.median()) if len(extra) else 0.0


def rate_factors(live: pd.DataFrame, simulated: pd.DataFrame) -> dict[str, float]:
    """Factors of the cluster's rates, by the durations of transfers in the two tables of events.

    Transfers with as many destinations are compared: the median duration simulated over the median one live, and of these ratios
    the median. Rates that no transfer of both runs shows are left out.
    """
    ours, theirs = _durations(simulated), _durations(live)
    factors: dict[str, float] = {}
    for constant, (kind, tier) in _TRANSFERS.items():
        keys = [key for key in ours.index.intersection(theirs.index) if key[:2] == (kind, tier)]
        ratios = [ours[key] / theirs[key] for key in keys if ours[key] > 0 and theirs[key] > 0]
        if ratios:
            factors[constant] = float(np.median(ratios))
    return factors


def _durations(events: pd.DataFrame) -> pd.Series[float]:
    """Median seconds to the last block by kind, tier that is read, and number of destinations; instant loads are left out."""
    ends = events[events.kind == "BlockArrived"].groupby("transfer_id").at_s.max()
    rows = []
    for row in events[events.kind.isin(["StartMulticast", "LoadBlocks"])].to_dict("records"):
        detail = json.loads(row["detail"])
        tiers = {detail["tier"]} if row["kind"] == "LoadBlocks" else set(detail["source_tiers"])
        if len(tiers) == 1 and detail.get("loader") != "instant" and row["transfer_id"] in ends.index:
            count = len(detail.get("destinations", (0,)))
            rows.append((row["kind"], tiers.pop(), count, ends[row["transfer_id"]] - row["at_s"]))
    frame = pd.DataFrame(rows, columns=["kind", "tier", "destinations", "seconds"])
    return frame.groupby(["kind", "tier", "destinations"]).seconds.median()


def startup_s(events: pd.DataFrame) -> float | None:
    """Median seconds from when an instance has its nodes and its first request to its first token; None without an instance."""
    serves = _first(events, "Serve", ["instance"], "served_s")
    given = _first(events, "Dispatch", ["instance", "request_id"], "given_s")
    tokens = events[events.kind == "TokensProduced"].drop_duplicates("instance")[["instance", "request_id", "at_s"]]
    found = tokens.merge(serves, on="instance").merge(given, on=["instance", "request_id"])
    return float((found.at_s - found[["served_s", "given_s"]].max(axis=1)).median()) if len(found) else None


def _first(events: pd.DataFrame, kind: str, keys: list[str], name: str) -> pd.DataFrame:
    """Time of the first event of a kind by ``keys``, in a column called ``name``."""
    return events[events.kind == kind].drop_duplicates(keys).rename(columns={"at_s": name})[[*keys, name]]
