"""Runs of scripts/gpu_*.py on a machine's GPUs, and their simulations: settings as overrides of the configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lambdascale.core import UserError
from lambdascale.core.checks import require
from lambdascale.core.events import NodeLost
from lambdascale.experiments.build import Experiment, build
from lambdascale.experiments.compose import compose, names

UNPACED = "none"
#: Seconds into a run at which a burst comes: between two looks of an autoscaler that looks every 0.1 s. At one, a live burst is
#: some milliseconds late for it, and waits 0.1 s longer than a simulated one.
BURST_AT_S = 1.05
# No run folder is written, and machines that are lent for minutes may lack what writes one.
NO_FILES = "logger._target_=builtins.dict"
_UNLIMITED = "1TB/s"  # faster than any link
#: Sizes of Llama 2 as scripts pack them -> models of conf/.
CONFIGURED = {"7B": "llama2_7b", "13B": "llama2_13b", "smollm2": "smollm2"}


def settings(kind: type[Any], row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass of numbers and texts from a table's row, each in its type."""
    kinds = {"int": int, "float": float, "bool": bool, "str": str}
    return {name: kinds[str(each.type)](row[name]) for name, each in kind.__dataclass_fields__.items()}


def numbers(text: str) -> list[int]:
    """Return the whole numbers of a comma-separated list."""
    return [int(part) for part in text.split(",")]


def profile_of(card: str) -> str:
    """Return the measured profile of a card; UserError for an unknown one."""
    known = [name for name in names("cluster/measured") if name.upper() in card]
    if not known:
        raise UserError(f"no profile of {card} in conf/cluster/measured: name one with --profile")
    return known[0]


class DisturbedRunError(RuntimeError):
    """A node was lost in a run that is to measure something else."""


def check_undisturbed(event: object) -> None:
    """Raise DisturbedRunError if a node was lost."""
    if isinstance(event, NodeLost):
        raise DisturbedRunError(f"node {event.node} was lost")


@dataclass(frozen=True, kw_only=True)
class Site:
    """The machine of live runs: ``nodes`` processes on its ``device``, which hold ``checkpoint`` as ``blocks``."""

    checkpoint: str
    nodes: int = 4
    blocks: int = 16
    device: str = "cuda"
    transport: str = "cuda_ipc"

    def overrides(self, *, paced: bool, slot_tokens: int) -> list[str]:
        """Return the settings of a live run whose sequences have at most ``slot_tokens`` tokens."""
        return [
            "backend=live",
            f"backend.device={self.device}",
            f"transport={self.transport}",
            f"backend.checkpoint={self.checkpoint}",
            f"backend.paced={str(paced).lower()}",
            "backend.kernels=first",
            f"backend.slot_tokens={slot_tokens}",
            f"system.blocks={self.blocks}",
            f"cluster.nodes={self.nodes}",
            NO_FILES,
        ]


def network(link: str) -> list[str]:
    """Return the settings of links that carry exactly ``link``; none for the cluster's own."""
    if link == UNPACED:
        return []
    return [f"cluster.nic_bytes_per_s={link}", "cluster.rdma_efficiency=1.0", "cluster.collective_efficiency=1.0"]


@dataclass(frozen=True, kw_only=True)
class FigureRun:
    """A run for a figure: ``kind`` "trace" (figures 10 and 11) or "burst" (figures 8 and 9); times in seconds.

    ``profile``: of conf/cluster/measured, on which live runs decide and simulations run. ``link``, ``pcie`` and ``ssd``: rates,
    ``link`` "none" for the machine's own. ``arrivals``: "authors" (``length_s`` of their trace, gaps divided by ``compression``,
    from ``start_s`` of it), "generated", or "burst" of ``count`` requests. ``host_copies``: released replicas leave a copy in
    host memory, and one node begins with one. ``switch``: of λScale's pipelines (see ComplementaryPipelines). ``host_source``:
    what paces a source that sends from its host copy, "pcie" beside its link; "link" alone in live runs until 2026-11-28.
    """

    kind: str
    model: str
    system: str
    sources: int
    seed: int
    profile: str
    link: str
    pcie: str
    ssd: str
    arrivals: str
    start_s: float
    length_s: float
    compression: float
    count: int
    prompt_tokens: int
    output_tokens: int
    host_copies: bool
    switch: str = "each"
    host_source: str = "pcie"

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> FigureRun:
        """Return the run of a table's row."""
        return cls(**settings(cls, row))

    def row(self) -> dict[str, Any]:
        """Return the run's settings as columns of a table."""
        return asdict(self)

    @property
    def expected_s(self) -> float:
        """Seconds that a live run takes, about: processes, host memory to register, requests, their last answers."""
        return 8.0 + 8.0 * self.host_copies + (self.length_s if self.kind == "trace" else 4.0)

    def live(self, site: Site, traces: str) -> Experiment:
        """Return the run on real processes; ``traces`` is the folder of the authors' trace. UserError for an earlier pacing."""
        require(self.host_source == "pcie", f"nothing paces host copies by the {self.host_source} alone any more")
        slot = self.prompt_tokens + self.output_tokens
        how = site.overrides(paced=self.link != UNPACED, slot_tokens=slot)
        return build(compose([*self._shared(), *self._requests(), f"traces={traces}", *how]))

    def simulated(self, nodes: int, blocks: int) -> Experiment:
        """Return the simulation of the run, whose requests the caller has; UserError for a model without known sizes."""
        require(self.model in CONFIGURED, f"{self.model} cannot be simulated: known are {', '.join(CONFIGURED)}")
        unpaced = [f"backend.transfers.host_source_bytes_per_s={_UNLIMITED}"] if self.host_source == "link" else []
        return build(compose([*self._shared(), f"cluster.nodes={nodes}", f"system.blocks={blocks}", NO_FILES, *unpaced]))

    def _shared(self) -> list[str]:
        leave = [f"+system.start.pipelines.switch={self.switch}"] if self.system == "lambdascale" else []
        rates = [] if self.link == UNPACED else [f"cluster.pcie_bytes_per_s={self.pcie}", f"cluster.ssd_bytes_per_s={self.ssd}"]
        return [
            f"experiment={'paper_trace' if self.kind == 'trace' else 'fig08_rampup'}",
            f"model={CONFIGURED.get(self.model, 'smollm2')}",  # live, a name: sizes are the checkpoint's
            f"cluster=measured/{self.profile}",
            "cluster.usd_per_gpu_hour=3.0",
            f"system={self.system}",
            f"system.autoscaler.min_replicas={self.sources}",
            f"system.memory.enabled={str(self.host_copies).lower()}",
            "token_times=false",
            f"seed={self.seed}",
            *network(self.link),
            *rates,
            *leave,
        ]

    def _requests(self) -> list[str]:
        lengths = [f"workload.prompt_tokens={self.prompt_tokens}", f"workload.output_tokens={self.output_tokens}"]
        if self.arrivals == "burst":
            return [*lengths, f"workload.count={self.count}", f"workload.at_s={BURST_AT_S}"]
        window = f"workload.duration_s={self.length_s * self.compression}"
        lengths += [window, f"workload.time_compression={self.compression}"]
        if self.arrivals == "generated":
            return ["workload=bursty", "workload.lengths=fixed", "workload.popularity=first", *lengths]
        return [*lengths, f"workload.start_s={self.start_s}"]
