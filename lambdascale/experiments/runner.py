"""One run of a configuration: build, drive, derive tables, write. A finished run of the same configuration is reused."""

from __future__ import annotations

import gc
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from omegaconf import DictConfig, OmegaConf

from lambdascale.control import Observer, build_system, drive
from lambdascale.core import TracedRequest, UserError
from lambdascale.core.checks import require, shown
from lambdascale.core.token_gaps import TokenGaps
from lambdascale.experiments.build import Experiment, build
from lambdascale.experiments.finished import finished_run
from lambdascale.experiments.folder import (
    FILES,
    MANIFEST,
    SUMMARY,
    check_usable,
    check_whole,
    fingerprints,
    is_finished,
    new_run_folder,
    read_json,
)
from lambdascale.experiments.manifest import environment, run_digest
from lambdascale.experiments.progress import Progress
from lambdascale.experiments.setups import simulated_setup
from lambdascale.experiments.work import EVENTS_PER_REQUEST, MAX_EVENTS, check_requests
from lambdascale.metrics import Recorder, events_table, gpu_usage, requests_table, summarise, write_json, write_table
from lambdascale.metrics.scaleouts import host_byte_seconds
from lambdascale.metrics.session import SessionRecorder
from lambdascale.metrics.summary import HostMemoryUse
from lambdascale.sim import SimBackend, SimConfig
from lambdascale.workload import LoadedTrace, Provenance, bounded

if TYPE_CHECKING:
    from lambdascale.live.controller.backend import LiveBackend  # with torch, which simulations do without

_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,59}")
# Share of failed requests beyond which a run says so.
_FAILED_AT_MOST = 0.01
# Objects that a simulation makes and keeps between two garbage collections (Python's default: 700).
_YOUNG_OBJECTS = 50_000


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, its summary, and ``reused``, true if it had finished before."""

    folder: Path
    summary: dict[str, Any]
    reused: bool


def run(config: DictConfig, group: str = "") -> RunResult:
    """Run ``config`` or reuse its finished run; ``group`` names the sweep it is part of. UserError for a user's mistake."""
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict), "a run's configuration is a mapping"
    settings = {str(key): value for key, value in resolved.items()}
    experiment = build(config)
    begin = time.perf_counter()
    trace = experiment.workload.load(
        models=[model.name for model in experiment.models],
        seed=config.seed,
        max_requests=config.max_events // EVENTS_PER_REQUEST,
    )
    digest = run_digest(settings, trace.provenance.sha256)
    folder = run_folder(settings, experiment, digest)
    if not config.force or config.out is not None:
        check_usable(folder, digest)
    if not config.force and is_finished(folder, digest):
        check_whole(folder)
        result = RunResult(folder, read_json(folder / SUMMARY), reused=True)
    else:
        result = RunResult(folder, _execute(settings, experiment, trace, digest, folder, begin), reused=False)
    # Reused runs too: one that ran without this logger, or was killed before it was logged, is logged now.
    experiment.logger.log_run(finished_run(folder, group))
    return result


def run_folder(settings: dict[str, Any], experiment: Experiment, digest: str) -> Path:
    """Folder of a run: ``out``, or results/raw/<experiment>/<system>-<model>-<cluster>-<workload>-s<seed>-<hash>."""
    if settings["out"] is not None:
        return Path(settings["out"])
    for part in settings["name"].split("/"):
        _check_name("name", part)
    workload = type(experiment.workload).__name__.removesuffix("Workload").removesuffix("Trace").lower()
    names = {group: getattr(experiment, group).name for group in ("system", "cluster")} | {"model": experiment.models[0].name}
    for group, name in names.items():
        _check_name(f"{group}.name", name)
    parts = (names["system"], names["model"], names["cluster"], workload, f"s{settings['seed']}")
    return Path(settings["results"], "raw", settings["name"], "-".join((*parts, digest[:8])))


def _check_name(key: str, name: str) -> None:
    require(
        _NAME.fullmatch(name) is not None,
        f"{key} names a folder: it must be 1 to 60 letters, digits, _, ., + or -, and not begin with a dot, unlike {shown(name)}",
    )


def _execute(
    settings: dict[str, Any], experiment: Experiment, trace: LoadedTrace, digest: str, folder: Path, begin: float
) -> dict[str, Any]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    recorder = Recorder()
    title = f"{experiment.system.name} {experiment.models[0].name}"
    driven = drive_experiment(experiment, trace.requests, settings["seed"], recorder, title, settings["max_events"])
    ended = Ended(recorder, trace, driven, started, time.perf_counter() - begin)
    return write_run(settings, experiment, ended, digest, folder)


@dataclass(frozen=True)
class Ended:
    """A run that is over: its record, requests and times. ``wall_s``: seconds that it took."""

    recorder: Recorder
    trace: LoadedTrace
    driven: Driven
    started: str
    wall_s: float


def write_session(config: DictConfig, session: SessionRecorder, folder: Path, *, started: str, wall_s: float) -> dict[str, Any]:
    """Write a served session as the run of ``config`` in ``folder``; return its summary. UserError if it served no request.

    Requests that were under way at its end have failed.
    """
    if not session.taken:
        raise UserError(f"no request was served: {folder} is not written")
    settings: Any = OmegaConf.to_container(config, resolve=True)
    recorder = session.finish()
    served = LoadedTrace(requests=(), provenance=Provenance(rows=session.taken))
    ended = Ended(recorder, served, Driven(None, {}), started, wall_s)
    return write_run(settings, build(config), ended, run_digest(settings, started), folder)


def write_run(settings: dict[str, Any], experiment: Experiment, ended: Ended, digest: str, folder: Path) -> dict[str, Any]:
    """Derive tables and summary of a run and write its folder; return the summary."""
    recorder, trace, driven, wall_s = ended.recorder, ended.trace, ended.driven, ended.wall_s
    events = events_table(recorder)
    requests = requests_table(recorder, experiment.system.name, trace.requests, trace.failed, driven.token_gaps)
    summary = summarise(
        recorder,
        requests,
        system=experiment.system.name,
        backend=experiment.backend.label,
        usd_per_gpu_hour=experiment.cluster.usd_per_gpu_hour,
        host=_host_memory(experiment, events),
        wall_s=wall_s,
        slo=experiment.slo,
        gaps=driven.token_gaps,
    )
    summary["communicator_setup"] = simulated_setup(experiment.backend, recorder)
    _warn_of_failures(summary)
    manifest = {
        "experiment": settings["name"],
        "run_sha256": digest,
        "seed": settings["seed"],
        "backend": experiment.backend.label,
        "communicator": _communicator(experiment),
        "hardware_profile": {"cluster": asdict(experiment.cluster), "provenance": experiment.cluster.provenance},
        "workload": asdict(trace.provenance),
        "started": ended.started,
        "wall_s": wall_s,
        "start_parts_s": driven.start_parts_s,
        **environment(),
    }
    with new_run_folder(folder, replace=bool(settings["force"])) as temporary:
        # Without the study that the run is part of: its grids are longer than all the rest, and say nothing about the run.
        (temporary / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings | {"study": None})))
        write_table(temporary / "requests.parquet", requests)
        write_table(temporary / "events.parquet", events)
        write_table(temporary / "gpus.parquet", gpu_usage(recorder))
        write_json(temporary / SUMMARY, summary)
        write_json(temporary / MANIFEST, manifest | {FILES: fingerprints(temporary)})
    return summary


def _host_memory(experiment: Experiment, events: pa.Table) -> HostMemoryUse:
    """Host memory that copies of models took, and its price."""
    sizes = {model.name: model.size_bytes for model in experiment.models}
    # Host memories without a keep-alive keep their copies.
    memory = experiment.system.memory
    keep_alive_s, lasting = getattr(memory, "keep_alive_s", None), getattr(memory, "lasting_nodes", 0)
    held = host_byte_seconds(events, keep_alive_s, sizes, lasting_nodes=lasting)
    return HostMemoryUse(held, experiment.cluster.usd_per_host_gb_hour)


def _warn_of_failures(summary: dict[str, Any]) -> None:
    """Say on stderr that more than one request in a hundred failed: percentiles of the others would look better than the run."""
    failed, submitted = summary["requests"]["failed"], summary["requests"]["submitted"]
    if failed > _FAILED_AT_MOST * submitted:
        print(f"{failed} of {submitted} requests failed; times are those of the others", file=sys.stderr)


@dataclass(frozen=True)
class Driven:
    """Results of a run besides its record: gaps between tokens, if asked for, and seconds of each part of a live start."""

    token_gaps: TokenGaps | None
    start_parts_s: Mapping[str, float]


def drive_experiment(
    experiment: Experiment,
    requests: Sequence[TracedRequest],
    seed: int,
    observer: Observer,
    title: str = "",
    max_events: int = MAX_EVENTS,
    *,
    also: Sequence[Observer] = (),
) -> Driven:
    """Drive the experiment's system over its backend before the observers; show progress on a terminal.

    UserError for a simulation of more than ``max_events``.
    """
    if isinstance(experiment.backend, SimConfig):
        check_requests(experiment, requests, max_events)
    system = build_system(experiment.system, cluster=experiment.seen, models=experiment.models)
    requests, cut = _bounded(experiment, requests)
    with ExitStack() as stack:
        if isinstance(experiment.backend, SimConfig):
            stack.enter_context(_collecting_new_objects_only())
        backend = _backend(experiment, requests, seed, stack)
        progress = Progress.on_terminal(len(requests), title)
        observers = [observer, *also]
        if progress is not None:
            observers.append(stack.enter_context(progress))
        drive(system, backend, observers, max_events=max_events if isinstance(experiment.backend, SimConfig) else None)
        # Said last: a run that ends with an error says nothing else.
        if cut:
            print(f"{cut} answers are cut to what the KV memory of the nodes holds beside the prompt", file=sys.stderr)
        return Driven(backend.token_gaps(), {} if isinstance(backend, SimBackend) else backend.start_parts)


@contextmanager
def _collecting_new_objects_only() -> Iterator[None]:
    """Exclude existing objects (libraries, requests) from garbage collection: scanning them takes as long as 20,000 events.

    What a simulation drops is in no cycle (tests/unit/test_no_cycles.py), so it is freed at once: collections find nothing,
    and rare ones cost less than frequent ones.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    if thresholds[0]:  # 0: the caller has switched collections off
        gc.set_threshold(max(_YOUNG_OBJECTS, thresholds[0]), *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _communicator(experiment: Experiment) -> str | None:
    """Communicator of a live run's broadcasts; None for a simulation or a run without broadcasts."""
    config = experiment.backend
    return None if isinstance(config, SimConfig) else config.communicator(experiment.system, experiment.cluster.nodes)[0]


def _bounded(experiment: Experiment, requests: Sequence[TracedRequest]) -> tuple[Sequence[TracedRequest], int]:
    """Requests with limits that the KV memory of the largest node can hold, and the number of answers that this cuts."""
    cluster = experiment.seen
    room = {model.name: max(kind.kv_tokens(model) for kind in cluster.kinds) for model in experiment.models}
    return bounded(requests, room)


def _backend(experiment: Experiment, requests: Sequence[TracedRequest], seed: int, stack: ExitStack) -> SimBackend | LiveBackend:
    config, system, cluster, models = experiment.backend, experiment.system, experiment.cluster, experiment.models
    kept = experiment.token_times
    if isinstance(config, SimConfig):
        return config.build(
            cluster=cluster, models=models, requests=requests, batching=system.batching, seed=seed, token_times=kept
        )
    backend = config.build(cluster=cluster, models=models, requests=requests, system=system, seed=seed, token_times=kept)
    stack.callback(backend.close)
    return backend
