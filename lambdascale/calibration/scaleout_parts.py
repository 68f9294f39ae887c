"""Parts of a live scale-out on one clock: what the controller decided, and what each node's compute thread did meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lambdascale.core import UserError
from lambdascale.core.commands import AllocateNode, Command, Serve, SwitchMode
from lambdascale.core.events import BlockArrived, Event, RequestArrived, RequestFinished, TokensProduced

_CONTROLLER = "controller.csv"
# Parts of passes: they lie within others.
_WITHIN = ("make runner", "run", "read KV", "write KV", "close runner")


class ControllerRows:
    """Observer that keeps events and commands with the host's monotonic clock, which the nodes' timelines have, too."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows: list[tuple[float, str, int, int, str]] = []

    def on_event(self, event: Event) -> None:
        """Note an event."""
        if isinstance(event, RequestArrived):
            self._add("request", event.request.request_id, -1, "")
        elif isinstance(event, BlockArrived):
            self._add("block", event.node, event.block, "")
        elif isinstance(event, TokensProduced):
            self._add("token", event.request_id, event.instance, event.mode)
        elif isinstance(event, RequestFinished):
            self._add("finished", event.request_id, event.instance, "")

    def on_command(self, at: float, command: Command) -> None:
        """Note a command."""
        if isinstance(command, AllocateNode):
            self._add("allocate", command.node, -1, "")
        elif isinstance(command, Serve):
            nodes = " ".join(f"{s.node}:{s.first_block}-{s.last_block}" for s in command.stages)
            self._add("pipeline" if command.is_pipeline else "replica", command.stages[0].node, command.instance, nodes)
        elif isinstance(command, SwitchMode):
            self._add("switch", command.pipeline, len(command.moves), command.kv)

    def _add(self, what: str, first: int, second: int, detail: str) -> None:
        self._rows.append((self._clock(), what, first, second, detail))

    def write(self, folder: Path) -> None:
        """Write the rows beside the nodes' timelines."""
        table = pd.DataFrame(self._rows, columns=["clock_s", "what", "first", "second", "detail"])
        table.to_csv(folder / _CONTROLLER, index=False, float_format="%.6f")


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the controller's rows, and those of all nodes, with ``at_s`` counted from the run's first request.

    UserError for a folder without timelines.
    """
    if not (folder / _CONTROLLER).is_file():
        raise UserError(f"{folder} has no timelines: it lacks {_CONTROLLER}; scripts/gpu_bursts.py --timelines DIR keeps them")
    controller = pd.read_csv(folder / _CONTROLLER, keep_default_na=False)
    began = controller.clock_s[controller.what == "request"].min()
    nodes = pd.concat([pd.read_csv(path) for path in sorted(folder.glob("node-*.csv"))], ignore_index=True)
    return controller.assign(at_s=controller.clock_s - began), nodes.assign(at_s=nodes.began_s - began)


def steps(controller: pd.DataFrame) -> pd.DataFrame:
    """Return a scale-out's steps in order: allocations, instances, nodes' last blocks, switches, first tokens by instance."""
    asked = controller[controller.what.isin(["allocate", "pipeline", "replica", "switch"]) & (controller.at_s >= 0)]
    blocks = controller[(controller.what == "block") & (controller.at_s >= 0)].groupby("first", as_index=False).last()
    tokens = controller[controller.what == "token"].groupby("second", as_index=False).first().assign(what="first token")
    return pd.concat([asked, blocks.assign(what="last block"), tokens]).sort_values("at_s", kind="stable")[
        ["at_s", "what", "first", "second", "detail"]
    ]


def busy(nodes: pd.DataFrame, begin_s: float, end_s: float) -> pd.DataFrame:
    """Return, by node and kind of work, the milliseconds between two times, and how many passes or parts began there.

    Passes are told apart by what they ran: prefills, decode steps, those that recorded a replay; ``hand on`` is the rest of them.
    """
    within = nodes[(nodes.at_s >= begin_s) & (nodes.at_s < end_s)].copy()
    runs = within[within.what == "run"]
    kinds = runs.detail.where(
        runs.detail == "recorded", (runs.prefilled > 0).map({True: "prefill ", False: "decode "}) + runs.detail
    )
    within.loc[runs.index, "what"] = kinds
    totals = within.groupby(["node", "what"]).took_s.agg(
        ms=lambda took: 1e3 * took.sum(), count="size", most_ms=lambda t: 1e3 * t.max()
    )
    return totals.round(1).reset_index()


def tokens_by(controller: pd.DataFrame, times_s: list[float]) -> pd.DataFrame:
    """Return how many requests had their first token, and how many had ended, by each time."""
    first, ended = (controller[controller.what == what].groupby("first").at_s.min() for what in ("token", "finished"))
    counts = ([int((at <= t).sum()) for t in times_s] for at in (first, ended))
    return pd.DataFrame(dict(zip(("by_s", "first", "ended"), (times_s, *counts), strict=True)))


def gaps(controller: pd.DataFrame, nodes: pd.DataFrame) -> pd.DataFrame:
    """Return, for each new replica and pipeline, when it was commanded, and milliseconds from then on its first layers' node.

    ``start_ms``: until it is started, which takes ``made_ms``; ``first_pass_ms``: until its first pass begins, which takes
    ``first_pass_took_ms``; ``first_token_ms``: until its first token. The command follows the last block that it needs.
    """
    found = []
    for command in controller[controller.what.isin(["replica", "pipeline"]) & (controller.at_s > 0)].itertuples():
        mine = nodes[(nodes.node == command.first) & (nodes.instance == command.second) & (nodes.at_s >= command.at_s)]
        start, passes = mine[mine.what == "start"], mine[mine.what == "pass"]
        token = controller[(controller.what == "token") & (controller.second == command.second)].at_s.min()
        if len(start) and len(passes):
            began, one = start.iloc[0], passes.iloc[0]
            found.append(
                {
                    "what": command.what,
                    "node": command.first,
                    "instance": command.second,
                    "served_s": command.at_s,
                    "start_ms": 1e3 * (began.at_s - command.at_s),
                    "made_ms": 1e3 * began.took_s,
                    "first_pass_ms": 1e3 * (one.at_s - command.at_s),
                    "first_pass_took_ms": 1e3 * one.took_s,
                    "first_token_ms": 1e3 * (token - command.at_s),
                }
            )
    return pd.DataFrame(found)
