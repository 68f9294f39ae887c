"""Bursts on GPUs, with execution pipelines and without: settings, measures of each burst, their simulation, and pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from lambdascale.control import Observer
from lambdascale.core.checks import require
from lambdascale.core.commands import AllocateNode, Command, ReleaseNode, Serve
from lambdascale.core.events import BlockArrived, Event, RequestArrived, RequestFinished, TokensProduced
from lambdascale.core.plan import NodeId
from lambdascale.experiments.build import Experiment, build
from lambdascale.experiments.compose import compose
from lambdascale.experiments.gpu_runs import (
    BURST_AT_S,
    CONFIGURED,
    NO_FILES,
    UNPACED,
    DisturbedRunError,
    Site,
    check_undisturbed,
    network,
    settings,
)
from lambdascale.experiments.runner import drive_experiment
from lambdascale.metrics.intervals import Interval, over_draws

_LOOK_S = 0.1  # of autoscaler.interval_s
KEEP_ALIVE_S = 0.3  # of replicas between bursts
_LONG_S = 1e4  # longer than any burst
_PCIE = "50GB/s"  # of an H200, about
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BurstRun:
    """Bursts of ``count`` equal requests on a cluster that holds ``sources`` replicas when each begins.

    ``tier`` "host": no replica, but a copy in every node's host memory; "gpu": no copies in host memory. ``cluster``: a choice
    of conf/cluster, on which live runs decide and simulations run. ``link``: the rate of every node's links, or, from host
    memory, of its PCIe; "none" for no limit. ``kv``: what becomes of KV at mode switches. With ``pipelines`` false, λScale's
    nodes serve once they are complete.
    """

    model: str
    system: str
    pipelines: bool
    nodes: int
    cluster: str
    link: str
    sources: int
    count: int
    prompt_tokens: int
    output_tokens: int
    kv: str
    tier: str = "gpu"

    def __post_init__(self) -> None:
        """Validate."""
        require(self.tier in ("gpu", "host"), f"tier must be gpu or host, not {self.tier}")
        require(self.tier == "gpu" or self.sources == 0, "copies in host memory are of every node: sources must be 0")

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> BurstRun:
        """Return the run of a table's row."""
        return cls(**settings(cls, row))

    def row(self) -> Row:
        """Return the settings as columns of a table."""
        return asdict(self)

    def __str__(self) -> str:
        how = "pipelines" if self.pipelines else "none"
        link = self.link.replace("/", "")
        sources = "host" if self.tier == "host" else self.sources
        return f"{self.model}-{self.system}-{how}-{link}-{sources}-{self.count}-{self.output_tokens}-{self.kv}"

    def live(self, site: Site, *, bursts: int, period_s: float, seed: int, timeline: str | None = None) -> Experiment:
        """Return ``bursts`` of these on real processes, one every ``period_s``."""
        how = site.overrides(paced=self.link != UNPACED, slot_tokens=self.prompt_tokens + self.output_tokens)
        where = [] if timeline is None else [f"backend.timeline={timeline}"]
        return build(compose([*self._shared(bursts, period_s), f"seed={seed}", *how, *where]))

    def simulated(self, blocks: int, *, bursts: int = 1, period_s: float = _LONG_S) -> Experiment:
        """Return the same bursts as a simulated run of ``blocks`` blocks; UserError for a model without known sizes."""
        require(self.model in CONFIGURED, f"{self.model} cannot be simulated: known are {', '.join(CONFIGURED)}")
        sizes = [f"model={CONFIGURED[self.model]}", f"system.blocks={blocks}", f"cluster.nodes={self.nodes}"]
        return build(compose([*self._shared(bursts, period_s), *sizes, NO_FILES]))

    def _shared(self, bursts: int, period_s: float) -> list[str]:
        ours = self.system == "lambdascale"
        return [
            f"cluster={self.cluster}",
            f"system={self.system}",
            *([f"system.kv={self.kv}"] if ours else []),  # others have no mode switches
            *([] if self.pipelines or not ours else ["system.start.pipelines._target_=lambdascale.pipelines.NoPipelines"]),
            *self._held(),
            "cluster.ssd_bytes_per_s=50GB/s",
            f"system.autoscaler.min_replicas={self.sources}",
            f"system.autoscaler.keep_alive_s={KEEP_ALIVE_S}",
            f"system.autoscaler.interval_s={_LOOK_S}",
            "workload=burst",
            f"workload.count={self.count}",
            f"workload.at_s={BURST_AT_S}",
            f"workload.repeat={bursts}",
            f"workload.period_s={period_s}",
            f"workload.prompt_tokens={self.prompt_tokens}",
            f"workload.output_tokens={self.output_tokens}",
        ]

    def _held(self) -> list[str]:
        if self.tier == "gpu":
            return ["system.memory.enabled=false", *network(self.link), f"cluster.pcie_bytes_per_s={_PCIE}"]
        rate = _PCIE if self.link == UNPACED else self.link
        kept = ["system.memory.keep_alive_s=null", f"system.memory.initial_copies={self.nodes}"]
        return [*kept, f"cluster.pcie_bytes_per_s={rate}"]


@dataclass
class _Burst:
    """Times of one burst, in seconds of the run."""

    start_s: float
    arrived: dict[int, float] = field(default_factory=dict)
    first: dict[int, float] = field(default_factory=dict)
    by_pipeline: int = 0
    ends: list[float] = field(default_factory=list)
    began: float | None = None
    formed: list[float] = field(default_factory=list)
    last_block: float = 0.0
    released: float = 0.0

    def row(self) -> Row:
        began = self.began or 0.0
        ttft = np.array([self.first[request] - at for request, at in self.arrived.items()])
        return {
            "requests": len(self.arrived),
            "finished": len(self.ends),
            "ttft_p50_s": float(np.quantile(ttft, 0.5)),
            "ttft_p90_s": float(np.quantile(ttft, 0.9)),
            "ttft_max_s": float(ttft.max()),
            "all_finished_s": max(self.ends) - self.start_s,
            "first_tokens_of_pipelines": self.by_pipeline,
            "pipeline_formed_s": min(self.formed) - began if self.formed else None,
            "last_block_s": self.last_block - began if self.last_block else None,
            "released_s": self.released - self.start_s if self.released else None,
        }


class BurstTimes:
    """Observer of a run of bursts: TTFT, ends, and the steps of each scale-out. DisturbedRunError if a node is lost.

    ``disturbed``: numbers of the bursts that do not count, since they met requests of the one before, or of the next one, or
    began with other than ``sources`` replicas.
    """

    def __init__(self, sources: int) -> None:
        self._sources = sources
        self._held: set[NodeId] = set()
        self._bursts: list[_Burst] = []
        self.disturbed: set[int] = set()

    def on_event(self, event: Event) -> None:
        """Note an event."""
        check_undisturbed(event)
        if isinstance(event, RequestArrived):
            at = event.request.arrival_s
            if not self._bursts or at != self._bursts[-1].start_s:
                self._begin(at)
            self._bursts[-1].arrived[event.request.request_id] = at
        elif not self._bursts:
            return
        elif isinstance(event, TokensProduced):
            burst = self._of(event.request_id)
            if event.request_id not in burst.first:
                burst.first[event.request_id] = event.at
                burst.by_pipeline += event.mode == "pipeline"
        elif isinstance(event, RequestFinished):
            self._of(event.request_id).ends.append(event.at)
        elif isinstance(event, BlockArrived):
            self._bursts[-1].last_block = event.at

    def on_command(self, at: float, command: Command) -> None:
        """Note a command."""
        if isinstance(command, AllocateNode):
            self._held.add(command.node)
        elif isinstance(command, ReleaseNode):
            self._held.discard(command.node)
        if not self._bursts:
            return
        burst = self._bursts[-1]
        if isinstance(command, AllocateNode) and burst.began is None:
            burst.began = at
        elif isinstance(command, ReleaseNode):
            burst.released = at
        elif isinstance(command, Serve) and command.is_pipeline:
            burst.formed.append(at)

    def rows(self) -> list[Row]:
        """Return the measures of each burst that counts: TTFT in seconds, and times since its scale-out began."""
        numbered = enumerate(self._bursts, start=1)
        return [{"burst": number, **burst.row()} for number, burst in numbered if number not in self.disturbed]

    def _of(self, request_id: int) -> _Burst:
        """Return the request's burst: the last one, if bursts do not meet."""
        return next(burst for burst in reversed(self._bursts) if request_id in burst.arrived)

    def _begin(self, at: float) -> None:
        number = len(self._bursts) + 1
        if self._bursts and len(self._bursts[-1].ends) < len(self._bursts[-1].arrived):
            self.disturbed |= {number - 1, number}
        elif self._bursts and len(self._held) != self._sources:
            self.disturbed.add(number)
        self._bursts.append(_Burst(start_s=at))


def measure(run: BurstRun, experiment: Experiment, observers: Sequence[Observer] = (), *, seed: int = 1) -> list[Row]:
    """Drive an experiment of ``run`` to its end; return the measures of each burst that counts.

    DisturbedRunError if a node is lost, or if no burst counts.
    """
    requests = experiment.workload.requests(models=[model.name for model in experiment.models], seed=seed)
    times = BurstTimes(run.sources)
    drive_experiment(experiment, requests, seed, times, also=observers)
    rows = times.rows()
    if not rows:
        raise DisturbedRunError("each burst met another one's requests or replicas: the period is too short")
    return rows


def period_s(run: BurstRun, blocks: int, *, sharing: int = 1) -> float:
    """Return the seconds from one burst to the next in which both sides of a pair end and release their nodes.

    An eighth more than the longer one takes in a simulation, and half a second, in whole looks of the autoscaler, so that all
    bursts wait alike for it. ``sharing`` nodes on one GPU take so many times as long, at most. UserError for a model without
    known sizes.
    """
    both = [replace(run, pipelines=on) for on in (True, False)]
    found = [measure(side, side.simulated(blocks, bursts=2, period_s=_LONG_S))[0] for side in both]
    longest = sharing * max(max(each["all_finished_s"], each["released_s"] or 0.0) for each in found)
    return float(round(_LOOK_S * math.ceil((1.125 * longest + 0.5) / _LOOK_S), 1))


#: Columns that the two sides of a pair have in common, but for kv: without pipelines nothing switches mode.
SETTING = ["model", "nodes", "cluster", "tier", "link", "sources", "count", "prompt_tokens", "output_tokens", "measured_on"]
MEASURES = ("ttft_p50_s", "ttft_p90_s", "ttft_max_s", "all_finished_s")


def paired(runs: pd.DataFrame) -> Iterator[tuple[Row, pd.DataFrame]]:
    """Yield, by setting and ``kv``, λScale's pairs: a row of MEASURES for each, with pipelines («_with») and without."""
    ours = runs[runs.system == "lambdascale"]
    pair = [*SETTING, "seed", "burst"]
    sides = ours[ours.pipelines].merge(ours[~ours.pipelines].drop(columns="kv"), on=pair, suffixes=("_with", ""))
    for key, found in sides.groupby([*SETTING, "kv"]):
        yield dict(zip([*SETTING, "kv"], key, strict=True)), found


def ratio(pairs: pd.DataFrame, measure: str = "ttft_p90_s") -> Interval:
    """Return the typical ratio, with pipelines over without, and its interval of 95 %."""
    return over_draws((pairs[f"{measure}_with"] / pairs[measure]).tolist())
