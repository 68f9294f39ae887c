"""The simulation of a live run beside it: errors, the constants that would have to change, and the errors with them changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from msgspec import structs
from omegaconf import DictConfig, OmegaConf

from lambdascale.core import TracedRequest, UserError
from lambdascale.core.units import parse_rate
from lambdascale.experiments.build import Experiment, build
from lambdascale.experiments.compose import compose
from lambdascale.experiments.folder import MANIFEST, SUMMARY, check_whole, read_json
from lambdascale.experiments.runner import drive_experiment
from lambdascale.experiments.work import EVENTS_PER_REQUEST
from lambdascale.metrics import Recorder, events_table, requests_table, summarise
from lambdascale.metrics.fidelity import compute_factor, errors, extra_s, rate_factors, startup_s
from lambdascale.workload import RecordedRun

_GPU = ("hbm_bytes_per_s", "peak_flops")
_OVERHEAD = "cluster.compute.iteration_overhead_s"


@dataclass(frozen=True)
class Constant:
    """A constant of the configuration, and its value by the live run; of a table (None) each value times ``factor``."""

    key: str
    value: float | None
    suggested: float | None
    factor: float | None = None

    def apply(self, config: DictConfig) -> None:
        """Change it in a configuration."""
        scaled: Any = self.suggested
        if self.factor is not None and self.value is None:
            scaled = [each * self.factor for each in OmegaConf.select(config, self.key)]
        OmegaConf.update(config, self.key, scaled)


@dataclass(frozen=True)
class Calibration:
    """Outcome: a row per metric with ``error_percent`` and ``error_after_percent``, with the constants as suggested.

    ``startup_s``: by how much longer than simulated a new instance takes to its first token, beyond its iterations; None if none
    is to be seen. ``left_out``: requests that are not simulated (see recorded); ``failed``: those that the live run failed and
    the simulation served.
    """

    backend: str
    errors: pd.DataFrame
    constants: tuple[Constant, ...]
    startup_s: float | None
    left_out: int
    failed: int


@dataclass(frozen=True)
class _Outcome:
    requests: pd.DataFrame
    events: pd.DataFrame
    summary: Mapping[str, Any]


def calibrate(folder: Path) -> Calibration:
    """Simulate the live run in ``folder`` and compare; once more with longer iterations, and with an overhead for each of them.

    What comes nearer to the live run counts. UserError for what is no finished live run.
    """
    live = _finished(folder)
    config = _config(folder)
    if not (live.requests.status == "ok").any():
        raise UserError(f"the run in {folder} answered no request")
    models = build(config).models
    requests = recorded(folder, [model.name for model in models], config.max_events // EVENTS_PER_REQUEST)
    config.backend = compose(["backend=sim"]).backend
    before = _simulate(config, models, requests)
    rates = _rates(config, live, before)
    tried = []
    for compute in (_compute(config, models[0].name, live, before), _overhead(config, live, before)):
        constants = (*rates, *compute)
        outcome = _simulate(_changed(config, constants), models, requests)
        tried.append((constants, outcome, errors(live.requests, outcome.requests, live.summary, outcome.summary)))
    constants, after, left = min(tried, key=lambda each: _mean_error(each[2]))
    table = errors(live.requests, before.requests, live.summary, before.summary)
    table["error_after_percent"] = left.error_percent
    starts = startup_s(live.events), startup_s(after.events)
    return Calibration(
        backend=str(live.summary["backend"]),
        errors=table,
        constants=constants,
        startup_s=None if starts[0] is None or starts[1] is None else starts[0] - starts[1],
        left_out=len(live.requests) - len(requests),
        failed=len(requests) - int((live.requests.status == "ok").sum()),
    )


def _changed(config: DictConfig, constants: Sequence[Constant]) -> DictConfig:
    changed = copy.deepcopy(config)
    for constant in constants:
        constant.apply(changed)
    return changed


def _mean_error(table: pd.DataFrame) -> float:
    """Mean of the MAPEs, in per cent."""
    return float(table.error_percent[table.statistic == "MAPE"].mean())


def recorded(folder: Path, models: Sequence[str], most: float) -> tuple[TracedRequest, ...]:
    """Requests of a run as ``workload=run`` replays them, at most ``most``, under the ids that they have in requests.parquet.

    Those that failed are served again, except the ones that the run's own trace records as failed, and those of which no answer
    is known: older runs, and live runs whose end nobody knew.
    """
    trace = RecordedRun(path=str(folder), failures="count").load(models=models, seed=0, max_requests=most)
    rows = pd.read_parquet(folder / "requests.parquet").sort_values("arrival_s", kind="stable")
    known = rows.answer_tokens.fillna(rows.output_tokens) if "answer_tokens" in rows else rows.output_tokens
    numbers = rows.request_id[(known.fillna(0) > 0) & (rows.prompt_tokens > 0)]
    return tuple(
        structs.replace(each, request=structs.replace(each.request, request_id=int(number)))
        for number, each in zip(numbers, trace.requests, strict=True)
    )


def _finished(folder: Path) -> _Outcome:
    if not (folder / MANIFEST).is_file() or not (folder / SUMMARY).is_file():
        raise UserError(f"{folder} is not the folder of a finished run: it has no {MANIFEST} and {SUMMARY}")
    check_whole(folder)
    summary = read_json(folder / SUMMARY)
    if summary["backend"] == "sim":
        raise UserError(f"the run in {folder} is simulated: calibrate takes a live one (backend=live)")
    return _Outcome(pd.read_parquet(folder / "requests.parquet"), pd.read_parquet(folder / "events.parquet"), summary)


def _config(folder: Path) -> DictConfig:
    """Configuration of a run, with today's defaults of keys at its root that its version did not have."""
    present, loaded = OmegaConf.to_container(compose()), OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(present, dict), "a configuration is a mapping"
    assert isinstance(loaded, dict), "a configuration is a mapping"
    return OmegaConf.create({**present, **loaded})


def _simulate(config: DictConfig, models: Sequence[Any], requests: Sequence[TracedRequest]) -> _Outcome:
    """Drive the simulation of a configuration with the live run's models and requests."""
    experiment: Experiment = replace(build(config), configured=tuple(models), token_times=False)
    recorder = Recorder()
    drive_experiment(experiment, requests, config.seed, recorder, "simulation", config.max_events)
    table = requests_table(recorder, experiment.system.name)
    summary = summarise(
        recorder, table, system=experiment.system.name, backend="sim", usd_per_gpu_hour=1.0, wall_s=0.0, slo=experiment.slo
    )
    return _Outcome(table.to_pandas(), events_table(recorder).to_pandas(), summary)


def _rates(config: DictConfig, live: _Outcome, simulated: _Outcome) -> list[Constant]:
    factors = rate_factors(live.events, simulated.events)
    return [constant for name, factor in factors.items() for constant in _scaled(config, f"cluster.{name}", factor)]


def _compute(config: DictConfig, model: str, live: _Outcome, simulated: _Outcome) -> list[Constant]:
    """Constants of iterations that take longer in proportion: of the model's measured table, or of the data sheet."""
    factor = compute_factor(live.requests, simulated.requests) or 1.0
    overhead = _scaled(config, _OVERHEAD, factor)
    for index, table in enumerate(config.cluster.compute.get("measured") or []):
        if table.model == model:
            place = f"cluster.compute.measured[{index}]"
            tables = [Constant(f"{place}.{name}", None, None, factor) for name in ("decode_s", "prefill_s")]
            return [*tables, *_scaled(config, f"{place}.decode_s_per_context_token", factor), *overhead]
    return [*(each for name in _GPU for each in _scaled(config, f"cluster.gpu.{name}", 1 / factor)), *overhead]


def _overhead(config: DictConfig, live: _Outcome, simulated: _Outcome) -> list[Constant]:
    """The constant of iterations that all take as much longer; not below 0."""
    present = float(config.cluster.compute.get("iteration_overhead_s") or 0.0)
    return [Constant(_OVERHEAD, present, max(0.0, present + extra_s(live.requests, simulated.requests)))]


def _scaled(config: DictConfig, key: str, factor: float) -> list[Constant]:
    """A number, times ``factor``; nothing for one that is not set, or 0."""
    value = OmegaConf.select(config, key)
    number = float(parse_rate(value)) if value else 0.0
    return [Constant(key, number, number * factor, factor)] if number else []
