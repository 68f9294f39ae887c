"""``lambdascale plan``: print the multicast plan and pipelines of a system, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table

from lambdascale.control.start import MulticastStart
from lambdascale.core import MulticastPlan, PipelinePlan, UserError
from lambdascale.experiments.compose import choosing, compose

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_MOST_SENDS = 10_000_000  # what a machine's memory holds


def add_parser(subcommands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subcommands.add_parser(
        "plan",
        help="print the multicast plan of a system",
        description="Print the sends of every round (source, destination, block) and the pipelines that can serve after it. "
        "Node ids count from 0, sources first.",
    )
    parser.add_argument(
        "--system", default="lambdascale", help="a choice of conf/system, or a YAML file of a system (default: %(default)s)"
    )
    parser.add_argument("--sources", type=int, default=1, metavar="K", help="nodes that hold the model (default: %(default)s)")
    parser.add_argument("--destinations", type=int, required=True, metavar="N", help="nodes to send it to")
    parser.add_argument("--blocks", type=int, default=16, metavar="B", help="blocks of the model (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plan and print; return the exit status. UserError (PlanError) for an impossible plan."""
    with choosing("system", arguments.system) as chosen:
        system = compose(chosen).system
    start = instantiate(system.start, _convert_="all")
    if not isinstance(start, MulticastStart):
        raise UserError(f"{arguments.system} has no multicast to plan: its nodes load from their own storage")
    sends = max(arguments.destinations, 1) * max(arguments.blocks, 1)
    if sends > _MOST_SENDS:
        raise UserError(
            f"{arguments.destinations} destinations and {arguments.blocks} blocks are {sends} sends: more than {_MOST_SENDS}"
        )
    plan = start.planner.plan(sources=arguments.sources, destinations=arguments.destinations, blocks=arguments.blocks)
    pipelines = list(start.pipelines.pipelines(plan))
    if arguments.json:
        print(json.dumps(as_json(plan, pipelines)))
    else:
        show(system.name, plan, pipelines)
    return 0


def as_json(plan: MulticastPlan, pipelines: list[PipelinePlan]) -> dict[str, Any]:
    """JSON document of a plan: nodes, sources, blocks, rounds of sends, and pipelines with their stages."""
    return {
        "nodes": len(plan.members),
        "sources": list(plan.sources),
        "blocks": plan.blocks,
        "rounds": [[{"src": send.src, "dst": send.dst, "block": send.block} for send in sends] for sends in plan.rounds],
        "pipelines": [
            {
                "ready_round": pipeline.ready_round,
                "stages": [{"node": s.node, "first_block": s.first_block, "last_block": s.last_block} for s in pipeline.stages],
            }
            for pipeline in pipelines
        ],
    }


def show(system: str, plan: MulticastPlan, pipelines: list[PipelinePlan]) -> None:
    """Print a table with one row per round; pipelines appear in the round in which they become ready."""
    title = f"{system}: {len(plan.sources)} to {len(plan.destinations)} nodes, {plan.blocks} blocks, {len(plan.rounds)} rounds"
    table = Table("round", "sends (source>destination:block)", "pipelines ready (node:blocks)", title=title)
    for number, sends in enumerate(plan.rounds, start=1):
        ready = (p for p in pipelines if p.ready_round == number)
        stages = ("  ".join(f"{s.node}:{s.first_block}-{s.last_block}" for s in p.stages) for p in ready)
        table.add_row(str(number), "  ".join(f"{send.src}>{send.dst}:{send.block}" for send in sends), "\n".join(stages))
    console = Console()
    console.print(table)
    if plan.streaming:
        console.print("Nodes forward pieces much smaller than a block: the total time is about that of one hop.")
