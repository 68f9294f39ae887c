"""Comparison of the paper's published numbers with ours, from the committed tables of the studies. Frames in, a frame out.

Every row says how sure our value is (an interval of 95 %), and what becomes of the difference when its supposed cause is removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from lambdascale.core import UserError
from lambdascale.experiments import paper_causes as causes
from lambdascale.experiments.paper_causes import Cause
from lambdascale.experiments.paper_claims import Bounds, Claim, Line, Tried, Values
from lambdascale.experiments.paper_text import SEPARATOR
from lambdascale.metrics.intervals import over_draws

TABLES = (
    *("fig02_host_cache", "fig07_multicast", "fig08_rampup", "fig09_sources", "paper_trace"),
    *("intervals", "explanations"),
)
MODELS = ("llama2_7b", "llama2_13b", "llama2_70b")
NAMES = {
    "lambdascale": "λScale",
    "lambdascale_tuned": "λScale, tuned",
    "lambdascale_prototype": "λScale (prototype)",
    "faasnet_prototype": "FaaSNet (prototype)",
    "nccl_prototype": "NCCL (prototype)",
    "faasnet": "FaaSNet",
    "nccl_broadcast": "NCCL",
    "nccl_no_setup": "NCCL without set-up",
    "serverlessllm": "ServerlessLLM",
    "serverlessllm_prototype": "ServerlessLLM (prototype)",
}


def load_tables(directory: Path) -> dict[str, pd.DataFrame]:
    """Read the tables of this comparison, by name; UserError if one is missing."""
    for name in TABLES:
        if not (directory / f"{name}.csv").is_file():
            raise UserError(f"no table {name}.csv in {directory}; scripts/run.py experiment={name} -m makes it")
    return {name: pd.read_csv(directory / f"{name}.csv") for name in TABLES}


def paper_table(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per published number: our value (median over seeds), its interval, and the value with the cause removed."""
    parts: list[Callable[[pd.DataFrame, pd.DataFrame], Iterator[Line]]] = [_host_cache, _multicast, _rampup, _sources, _trace]
    rows = [
        _row(line, tables[name], tables["explanations"]) | {"backend": str(tables[name].backend.iloc[0])}
        for part, name in zip(parts, TABLES, strict=False)
        for line in part(tables[name], tables["intervals"])
    ]
    return pd.DataFrame(rows).sort_values("figure", key=lambda figures: figures.astype(int), kind="stable", ignore_index=True)


def _row(line: Line, table: pd.DataFrame, explanations: pd.DataFrame) -> dict[str, str]:
    claim, values = line.claim, line.values(table)
    ours, least, most = float(values.median()), float(values.min()), float(values.max())
    error, distance = claim.error(ours)
    tried = [_tried(line, cause, explanations) for cause in line.causes[: 1 if distance <= 1 else None] if cause.run]
    verdict = _verdict(distance, tried)
    closest = _closest(tried, bounds=verdict == "by a bound") if tried else None
    if distance > 1 and line.causes and line.causes[-1].value is not None:
        tried.append(_by_files(claim, line.causes[-1].value))
        if verdict != "explained" and _agree(claim, ours, line.causes[-1].value):
            verdict, closest = "contradicted", len(tried) - 1
    # A reason that changes nothing about an agreement is no news.
    agrees = verdict.startswith("agrees")
    return {
        "figure": claim.figure,
        "what": claim.what,
        "model": line.model,
        "paper": claim.text,
        "ours": f"{ours:.3g}",
        "range_over_seeds": f"{least:.3g} to {most:.3g}" if most > least else "",
        "interval": _interval(line, values),
        "unit": claim.unit,
        "error": error,
        "setup": line.setup,
        "why": "" if agrees else SEPARATOR.join(cause.note for cause in line.causes[: len(tried) or None]),
        "without": "" if agrees else SEPARATOR.join(each.value for each in tried),
        "interval_without": "" if agrees else SEPARATOR.join(each.interval for each in tried),
        "error_without": "" if agrees else SEPARATOR.join(each.left for each in tried),
        "closest": "" if agrees or closest is None else str(closest),
        "verdict": verdict,
    }


def _tried(line: Line, cause: Cause, explanations: pd.DataFrame) -> Tried:
    """Try a cause: our value in the runs without it."""
    rows = without(explanations, cause.run, line.claim.figure)
    if cause.instead:
        rows = rows.assign(first_token_s=rows[cause.instead])
    if cause.any_model:
        rows = rows.assign(model=line.model)
    values = line.values(rows)
    value = float(values.median())
    left, distance = line.claim.error(value)
    interval = _span(*sorted(line.bounds(rows))) if line.bounds else _over_seeds(values)
    return Tried(value=f"{value:.3g}", interval=interval, left=left, distance=distance, bound=cause.bound)


def _by_files(claim: Claim, value: float) -> Tried:
    """Show what the authors' own times give, beside what was tried."""
    left, distance = claim.error(value)
    return Tried(value=f"{value:.3g}", interval="exact", left=left, distance=distance)


def _agree(claim: Claim, ours: float, value: float) -> bool:
    """True if our value needs no explanation beside what the authors' own times give."""
    return replace(claim, low=value, high=value).error(ours)[1] <= 1


def _closest(tried: Sequence[Tried], *, bounds: bool) -> int:
    """Index of the cause without which least is left of a difference, or most of an agreement's loss is seen: the first such.

    Bounds come after all others, unless the verdict rests on them.
    """
    return min(range(len(tried)), key=lambda index: (tried[index].bound and not bounds, tried[index].distance))


def _setup(table: pd.DataFrame) -> str:
    """Basis of the largest set-up in the rows of a system; empty if all its communicators were measured."""
    found = set(table.setup.dropna().astype(str)) - {""}
    return max(found, key=lambda text: int(text.split()[2]), default="")


def without(explanations: pd.DataFrame, run: str, figure: str) -> pd.DataFrame:
    """Rows of the runs without a cause; figure 11 is made of figure 10's runs."""
    name = f"explanations/{run}/{'10' if figure == '11' else figure}"
    rows = explanations[explanations.run == name]
    if rows.empty:
        raise UserError(f"no runs {name} in the table of explanations; scripts/run.py experiment=explanations -m makes it")
    return rows


def _verdict(distance: float, tried: Sequence[Tried]) -> str:
    """Fate of a difference, or of an agreement, when its causes are removed one by one; in units of what needs no explanation."""
    least = min((each.distance for each in tried), default=math.inf)
    known = min((each.distance for each in tried if not each.bound), default=math.inf)
    if distance <= 1:
        return "agrees, not tested" if not tried else "coincidence" if least > 1 else "agrees"
    if not tried:
        return "not tested"
    if known <= 1:
        return "explained"
    return "in part" if known < distance / 2 else "by a bound" if least < distance / 2 else "not explained"


def _interval(line: Line, values: pd.Series) -> str:
    return (_over_seeds(values) if line.interval is None else _span(*sorted(line.interval))) + line.interval_of


def _over_seeds(values: pd.Series) -> str:
    if len(values) == 1:
        return "exact"
    found = over_draws(list(values))
    return _span(found.low, found.high)


def _span(low: float, high: float) -> str:
    return "none" if math.isnan(low) else "exact" if low == high else f"{low:.3g} to {high:.3g}"


def _of(table: pd.DataFrame, model: str, system: str) -> pd.DataFrame:
    return table[(table.model == model) & (table.system == system)]


def _host_cache(_: pd.DataFrame, __: pd.DataFrame) -> Iterator[Line]:
    for name, title in {"ArrivalsTrace": "authors' trace", "AzureTrace": "Azure trace"}.items():
        claim = Claim(figure="2", what=f"loads from SSD, {title}", low=36.0, high=64.0, unit="%", points=True)
        yield Line(claim=claim, model="12 x 7B", values=_from_ssd(name), causes=[causes.TRACES])
        claim = Claim(figure="2", what=f"copies that live ≤ 15 s, {title}", low=95.0, high=np.inf, unit="%", points=True)
        yield Line(claim=claim, model="12 x 7B", values=_short_lives(name), causes=[causes.LIVES])


def _at_15(table: pd.DataFrame, trace: str) -> pd.DataFrame:
    rows: pd.DataFrame = table[(table.keep_alive_s == 15.0) & table.trace.str.endswith(trace).astype(bool)]
    return rows


def _from_ssd(trace: str) -> Values:
    return lambda t: 100 * _at_15(t, trace).loads_ssd / _at_15(t, trace)[["loads_ssd", "loads_host"]].sum(axis=1)


def _short_lives(trace: str) -> Values:
    return lambda t: 100 * _at_15(t, trace).lives_within_15s


def _gains(table: pd.DataFrame, system: str) -> pd.DataFrame:
    """Time to all nodes over λScale's of its kind, per seed, where its median over seeds is largest."""
    ours = table[table.system == _reference(system)][["model", "nodes", "all_nodes_s"]]
    both = table[table.system == system].merge(ours, on=["model", "nodes"], suffixes=("", "_ours"))
    both["gain"] = both.all_nodes_s / both.all_nodes_s_ours
    both["median"] = both.groupby(["model", "nodes"]).gain.transform("median")
    best: pd.DataFrame = both[both["median"] == both["median"].max()]
    return best


def _gain(system: str) -> Values:
    return lambda t: _gains(t, system).gain


def _multicast(table: pd.DataFrame, _: pd.DataFrame) -> Iterator[Line]:
    reasons = {
        "faasnet_prototype": (1.82, [causes.EAGER]),
        "faasnet": (1.82, [causes.BARRIER]),
        "nccl_broadcast": (1.53, [causes.SETUP, causes.SLEEPS, causes.MULTICAST_FILES]),
        "nccl_no_setup": (1.53, [causes.RATE, causes.SLEEPS, causes.MULTICAST_FILES]),
    }
    for system, (published, found) in reasons.items():
        best = _gains(table, system)
        claim = Claim(figure="7", what=f"multicast, largest gain on {NAMES[system]}", low=published, high=published, unit="x")
        place = f"{best.model.iloc[0]}, {best.nodes.iloc[0]} nodes"
        yield Line(claim=claim, model=place, values=_gain(system), causes=found, setup=_setup(best))


# Causes that could differ in any burst of figures 8 and 9.
_BURST = [causes.PROTOTYPES, causes.HOLDING, causes.BATCHES, causes.PROMPTS, causes.SMALL, causes.LARGE]


def _rampup(table: pd.DataFrame, intervals: pd.DataFrame) -> Iterator[Line]:
    model = "llama2_13b"
    claim = Claim(figure="8", what="50 requests: until all are served", low=1.1, high=1.1, unit="s")
    yield Line(claim=claim, model=model, values=_served(model, "lambdascale"), causes=[causes.MODEL, *_BURST, causes.EIGHT])
    published = {
        "faasnet": (2.0, causes.BARRIER, [causes.BURST_FILES]),
        "nccl_broadcast": (1.4, causes.SETUP, []),
        "serverlessllm": (8.0, causes.LOADER, []),
    }
    for system, (times, cause, files) in published.items():
        claim = Claim(figure="8", what=f"the same, {NAMES[system]} over λScale", low=times, high=times, unit="x")
        yield Line(
            claim=claim,
            model=model,
            values=_served_later(model, system),
            causes=[cause, *_BURST, causes.EIGHT, *files],
            interval=_known(intervals, "Burst", model, system, "longest"),
            interval_of=" if spread over 0.1 s",
            setup=_setup(_of(table, model, system)),
        )


def _served(model: str, system: str) -> Values:
    """Time in seconds, per seed, at which the last request has its first token."""
    return lambda t: _of(t, model, system).groupby("seed").first_token_s.max()


def _served_later(model: str, system: str) -> Values:
    return lambda t: _served(model, system)(t) / _served(model, "lambdascale")(t).iloc[0]


def _sources(_: pd.DataFrame, __: pd.DataFrame) -> Iterator[Line]:
    for k, published in ((1, 0.6), (4, 0.15)):
        for tier in ("gpu", "host"):
            what = f"ramp-up, k = {k}, sources in {tier} memory"
            claim = Claim(figure="9", what=what, low=published, high=published, unit="s")
            found = [causes.BARRIER] if tier == "gpu" else [causes.PCIE, causes.HOST_RATE, causes.HOST_READS]
            yield Line(claim=claim, model="llama2_7b", values=_ramp(tier, k), causes=[*found, *_BURST[:-2]])


def _ramp(tier: str, k: int) -> Values:
    return lambda t: t[(t.model == "llama2_7b") & (t[f"{tier}_sources"] == k)].groupby("seed").first_token_s.max()


def p90_title(system: str) -> str:
    """Title of the row that compares P90 TTFT."""
    return f"P90 TTFT, {NAMES[system]} over {NAMES[_reference(system)]}"


def gpu_title(system: str) -> str:
    """Title of the row that compares GPU time."""
    return f"GPU time of {NAMES[_reference(system)]} below {NAMES[system]}"


def _reference(system: str) -> str:
    """λScale of a system's kind: as the authors ran both, or each at its best."""
    return "lambdascale_prototype" if system.endswith("_prototype") else "lambdascale"


# GPU time that λScale saves in the paper, in per cent; causes for 7B and 13B, and for 70B, with baselines as the authors ran them
# and at their best.
_SAVED = {"faasnet": 17.8, "nccl": 18.1, "serverlessllm": 31.3}
_UNKNOWN = [causes.NO_COPIES, causes.ENGINE, causes.TOGETHER, causes.ZERO, causes.PLAN, causes.PLAN_LOOK]
_WHOLE = [causes.WHOLE, causes.WHOLE_KEPT]
_SMALLER = [causes.HOST_RATE, *_UNKNOWN, causes.SECOND, causes.TURNS, causes.KEPT, *_WHOLE]
_PROTOTYPES = {
    "faasnet_prototype": [causes.LOOK, causes.EXPIRY, *_SMALLER],
    "nccl_prototype": [causes.SLEEPS, causes.LOOK, causes.EXPIRY, *_SMALLER],
    "serverlessllm_prototype": [causes.EXPIRY, causes.LOOK, *_SMALLER],
}
_LARGER = [causes.TURNS, causes.KEPT, *_WHOLE, causes.NODE_EACH, causes.SINGLE]
_LARGE_PROTOTYPES = {name: [causes.OVERLOAD, causes.LOOK, causes.EXPIRY, *_UNKNOWN, *_LARGER] for name in _PROTOTYPES}
_LARGE_PROTOTYPES["nccl_prototype"] = [causes.SLEEPS, *_LARGE_PROTOTYPES["nccl_prototype"]]
_ALWAYS = [causes.PROTOTYPES, causes.ZERO, causes.PLAN]
_FAIR = {
    "faasnet": [causes.SOURCES, *_ALWAYS],
    "nccl_broadcast": [causes.SETUP, *_ALWAYS],
    "serverlessllm": [causes.COPIES, *_ALWAYS, causes.TRACE_LOADER, causes.LOADER_ZERO],
}
_LARGE_FAIR = {name: [causes.OVERLOAD, *_ALWAYS, causes.NODE_EACH, causes.SINGLE] for name in _FAIR}
_LARGE_FAIR["nccl_broadcast"] = [*_LARGE_FAIR["nccl_broadcast"], causes.SLEEPS]
_LARGE_FAIR["serverlessllm"] = [*_LARGE_FAIR["serverlessllm"], causes.TRACE_LOADER, causes.LOADER_ZERO]


def _trace(table: pd.DataFrame, intervals: pd.DataFrame) -> Iterator[Line]:
    """Compare the systems as the authors ran them among each other, and the fair ones beside them."""
    for model in MODELS:
        large = model == "llama2_70b"
        yield from _against(model, _LARGE_PROTOTYPES if large else _PROTOTYPES, table, intervals)
        yield from _above_ideal(model, "ideal_prototype", [causes.LOOK], intervals)
        yield from _against(model, _LARGE_FAIR if large else _FAIR, table, intervals)
        yield from _above_ideal(model, "ideal", [], intervals)


def _against(model: str, systems: Mapping[str, Sequence[Cause]], table: pd.DataFrame, intervals: pd.DataFrame) -> Iterator[Line]:
    for system, found in systems.items():
        claim = Claim(figure="10", what=p90_title(system), low=2.4, high=5.0, unit="x")
        interval, setup = _known(intervals, "ArrivalsTrace", model, system, "p90"), _setup(_of(table, model, system))
        values = p90_ratio(model, system)
        bounds = _bounds(model, system, "p90", lambda end: end)
        yield Line(claim=claim, model=model, values=values, causes=found, interval=interval, setup=setup, bounds=bounds)
    for system, found in systems.items():
        percent = next(value for name, value in _SAVED.items() if system.startswith(name))
        claim = Claim(figure="11", what=gpu_title(system), low=percent, high=percent, unit="%", points=True)
        low, high = (100 * (1 - 1 / end) for end in _known(intervals, "ArrivalsTrace", model, system, "gpu"))
        values, setup = _saved(model, system), _setup(_of(table, model, system))
        bounds = _bounds(model, system, "gpu", lambda end: 100 * (1 - 1 / end))
        yield Line(claim=claim, model=model, values=values, causes=found, interval=(low, high), setup=setup, bounds=bounds)


def _above_ideal(model: str, ideal: str, found: Sequence[Cause], intervals: pd.DataFrame) -> Iterator[Line]:
    what = f"GPU time of {NAMES[_reference(ideal)]} above ideal"
    claim = Claim(figure="11", what=what, low=4.3, high=18.6, unit="%", points=True)
    low, high = (100 * (1 / end - 1) for end in _known(intervals, "ArrivalsTrace", model, ideal, "gpu"))
    bounds = _bounds(model, ideal, "gpu", lambda end: 100 * (1 / end - 1))
    yield Line(claim=claim, model=model, values=_above(model, ideal), causes=found, interval=(low, high), bounds=bounds)


def p90_ratio(model: str, system: str) -> Values:
    """Reader of the ratio of P90 TTFT to λScale's, per seed."""
    return lambda t: _of(t, model, system).ttft_p90_s / _of(t, model, _reference(system)).ttft_p90_s.iloc[0]


def _saved(model: str, system: str) -> Values:
    return lambda t: 100 * (1 - _of(t, model, _reference(system)).gpu_seconds.iloc[0] / _of(t, model, system).gpu_seconds)


def _above(model: str, ideal: str) -> Values:
    return lambda t: 100 * (_of(t, model, _reference(ideal)).gpu_seconds / _of(t, model, ideal).gpu_seconds.iloc[0] - 1)


def _bounds(model: str, system: str, measure: str, of_ratio: Callable[[float], float]) -> Bounds:
    """Reader of a ratio's interval, theirs over λScale's, from the rows of the runs without a cause."""

    def read(table: pd.DataFrame) -> tuple[float, float]:
        row = _of(table, model, system).iloc[0]
        return of_ratio(float(row[f"{measure}_low"])), of_ratio(float(row[f"{measure}_high"]))

    return read


def _known(intervals: pd.DataFrame, workload: str, model: str, system: str, measure: str) -> tuple[float, float]:
    """Interval of a ratio in the table of intervals, NaN if it has none; UserError without the row."""
    rows = _of(intervals, model, system)
    rows = rows[rows.workload.str.endswith(f".{workload}")]
    if len(rows) != 1:
        raise UserError(f"no row of {system}, {model}, {workload} in the table of intervals; experiment=intervals -m makes it")
    return float(rows[f"{measure}_low"].iloc[0]), float(rows[f"{measure}_high"].iloc[0])
