"""``lambdascale multicast``: time one multicast between real node processes, beside the limit of its link."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table

from lambdascale.control import SystemConfig, drive
from lambdascale.core import ClusterSpec, MulticastPlan, UserError, parse_rate
from lambdascale.experiments.compose import choosing, compose
from lambdascale.live.forkserver import prepare

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from lambdascale.calibration.multicast_runs import Timed, Trial
    from lambdascale.checkpoints import PackedModel

_GB = 1e9
_FAST = "1TB/s"


def add_parser(subcommands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subcommands.add_parser(
        "multicast",
        help="time one multicast between real node processes",
        description="Start node processes on this machine, send a packed model from the sources to the other nodes, and print "
        "the time until the last node holds every block, verified unless --verify says otherwise. Beside it: the time of the "
        "plan at the rate of the link, measured in the same run.",
    )
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="a packed model or a built-in one's name")
    parser.add_argument("--blocks", type=int, metavar="B", help="blocks of a built-in model (default: 16)")
    parser.add_argument("--nodes", type=int, default=4, metavar="N", help="sources and destinations (default: %(default)s)")
    parser.add_argument("--sources", type=int, default=1, metavar="K", help="nodes that hold the model (default: %(default)s)")
    parser.add_argument("--transport", choices=("shm", "tcp", "cuda_ipc"), default="shm", help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda for cuda_ipc, else cpu)")
    parser.add_argument(
        "--system",
        default="lambdascale",
        help="its plan is used: a choice of conf/system, or a YAML file of a system (default: %(default)s)",
    )
    parser.add_argument("--link", metavar="RATE", help="pace every node's link, for example 12.5GB/s (default: not paced)")
    parser.add_argument(
        "--repeat", type=int, default=5, metavar="R", help="multicasts one after the other (default: %(default)s)"
    )
    parser.add_argument(
        "--verify", choices=("full", "sampled", "off"), default="full", help="blocks that receivers verify (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    _check(arguments)
    found = measure(arguments)
    if arguments.json:
        print(json.dumps(found))
    else:
        _show(found)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.repeat < 1:
        raise UserError(f"--repeat must be at least 1, not {arguments.repeat}")
    if not 1 <= arguments.sources < arguments.nodes:
        raise UserError(f"--sources must be at least 1 and below --nodes ({arguments.nodes}), not {arguments.sources}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the document of ``--json``: seconds of each multicast, of the plan at the link's rate, and the setting."""
    prepare()  # the nodes import modules while this process does
    # torch takes seconds to import: only here.
    from lambdascale.calibration.multicast_rates import link_rate, planned_s
    from lambdascale.calibration.multicast_runs import Trial
    from lambdascale.checkpoints.builtin import open_model

    model = open_model(arguments.model, arguments.blocks)
    link = None if arguments.link is None else parse_rate(arguments.link)
    device: Literal["cpu", "cuda"] = arguments.device or ("cuda" if arguments.transport == "cuda_ipc" else "cpu")
    setting = Setting(arguments.system, arguments.nodes, arguments.transport, device, link, verify=arguments.verify)
    sizes = {"sources": arguments.sources, "destinations": arguments.nodes - arguments.sources}
    plan = setting.plan(**sizes, blocks=len(model.blocks))
    rate = link or link_rate(arguments.transport)
    (timed,), start_parts = run_trials(setting, {model.name: model}, [Trial(((model.name, plan),), repeat=arguments.repeat)])
    return {
        "model": model.name,
        "bytes": sum(model.block_bytes),
        "blocks": len(model.blocks),
        **sizes,
        "transport": arguments.transport,
        "device": device,
        "verify": arguments.verify,
        "seconds": timed.seconds,
        "set_up_s": timed.set_up_s,
        "start_parts_s": start_parts,
        "link_bytes_per_s": rate,
        "plan_s": None if rate is None else planned_s(plan, model.block_bytes, rate),
    }


@dataclass(frozen=True)
class Setting:
    """A cluster for multicasts: ``nodes`` under ``system``, a choice of conf/system or the path of a YAML file.

    ``link``: a rate in bytes/s to pace at, None: not paced. ``copies``: nodes may keep host copies. ``verify``: see LiveConfig.
    """

    system: str
    nodes: int
    transport: Literal["shm", "tcp", "cuda_ipc"]
    device: Literal["cpu", "cuda"]
    link: float | None = None
    copies: bool = False
    verify: Literal["full", "sampled", "off"] = "full"

    def config(self, blocks: int) -> tuple[ClusterSpec, SystemConfig]:
        """Return the cluster and the system, which moves models of so many blocks. UserError if it has no multicast."""
        enabled = str(self.copies).lower()
        with choosing("system", self.system) as chosen:
            config = compose(["cluster=desk", *chosen, f"++system.blocks={blocks}", f"system.memory.enabled={enabled}"])
        cluster = replace(
            instantiate(config.cluster, _convert_="all"),
            nodes=self.nodes,
            nic_bytes_per_s=self.link or _FAST,
            # Only the links are paced: at the rates of the cluster «desk» the sources would load a large model for minutes.
            ssd_bytes_per_s=_FAST,
            pcie_bytes_per_s=_FAST,
        )
        system: SystemConfig = instantiate(config.system, _convert_="all")
        if system.start.multicast is None:
            raise UserError(f"--system {self.system} starts replicas without a multicast")
        return cluster, system

    def plan(self, *, sources: int, destinations: int, blocks: int) -> MulticastPlan:
        """Return the system's plan over nodes 0 and following."""
        start: Any = self.config(blocks)[1].start
        plan: MulticastPlan = start.planner.plan(sources=sources, destinations=destinations, blocks=blocks)
        return plan


def run_trials(
    setting: Setting, models: Mapping[str, PackedModel], trials: Sequence[Trial]
) -> tuple[list[Timed], dict[str, float]]:
    """Start the cluster, carry the trials out and end it. Return their times, and the parts of the start in seconds."""
    blocks = {len(model.blocks) for model in models.values()}
    if len(blocks) != 1:
        raise UserError(f"models of one cluster are cut into equally many blocks, not {sorted(blocks)}")
    cluster, system = setting.config(blocks.pop())
    # torch takes seconds to import: only here.
    from lambdascale.calibration.multicast_runs import Repeated
    from lambdascale.live.config import LiveConfig

    live = LiveConfig(
        checkpoint=str(next(iter(models.values())).directory),
        transport=setting.transport,
        device=setting.device,
        paced=setting.link is not None,
        slot_tokens=64,
        executor="timed",
        verify=setting.verify,
    )
    plane = Repeated(models, trials, setting.nodes, system.start.multicast or "one_sided")
    backend = live.start(cluster=cluster, models=list(models.items()), system=system)
    try:
        drive(plane, backend)
    finally:
        backend.close()
    return plane.timed, backend.start_parts


def _show(found: dict[str, Any]) -> None:
    seconds, size = found["seconds"], found["bytes"]
    title = (
        f"{found['model']} ({size / _GB:.2f} GB, {found['blocks']} blocks), {found['sources']} to {found['destinations']} nodes, "
        f"{found['transport']} on {found['device']}" + ("" if found["verify"] == "full" else f", verified: {found['verify']}")
    )
    table = Table("multicast", "seconds", "GB/s per destination", title=title)
    rows = [("first", seconds[0])]
    if len(seconds) > 1:
        rows.append((f"later, median of {len(seconds) - 1}", median(seconds[1:])))
    if found["set_up_s"]:
        rows.append(("of it the communicator, median", median(found["set_up_s"])))
    if found["plan_s"] is not None:
        rows.append((f"plan, links of {found['link_bytes_per_s'] / _GB:.1f} GB/s", found["plan_s"]))
    for name, took in rows:
        table.add_row(name, f"{took:.3f}", f"{size / took / _GB:.2f}")
    Console().print(table)
