"""The live view: nodes with their blocks filling, instances, queue and TTFT, drawn by rich."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lambdascale.live.serving.state import ClusterState

_EVERY_S = 0.25
_FULL, _EMPTY = "█", "·"


def draw(snapshot: dict[str, Any], title: str) -> Group:
    """Draw the cluster once."""
    nodes = Table(title=title, title_justify="left", expand=False)
    for column in ("node", "blocks", "serves", "host copies"):
        nodes.add_column(column)
    for node in snapshot["nodes"]:
        nodes.add_row(*_row(node, snapshot))
    return Group(nodes, _numbers(snapshot))


def _row(node: dict[str, Any], snapshot: dict[str, Any]) -> tuple[Text, Text, Text, Text]:
    number = node["node"]
    if not node["alive"]:
        condition = "starts again" if node["returning"] else "lost"
        return Text(str(number), style="red"), Text(condition, style="red"), Text(""), Text("")
    bars = []
    for model in node["models"]:
        held = set(node["gpu_blocks"].get(model, ()))
        bar = "".join(_FULL if block in held else _EMPTY for block in range(snapshot["blocks"]))
        bars.append(Text(bar, style="green" if len(held) == snapshot["blocks"] else "yellow"))
    serves = [f"replica {r['instance']} ({r['running']})" for r in snapshot["replicas"] if r["node"] == number]
    for pipeline in snapshot["pipelines"]:
        parts = [f"{s['first_block']}-{s['last_block']}" for s in pipeline["stages"] if s["node"] == number]
        if parts:
            serves.append(f"pipeline {pipeline['instance']} blocks {', '.join(parts)} ({pipeline['running']})")
    return Text(str(number)), Text("\n").join(bars), Text("\n".join(serves)), Text(", ".join(node["host_copies"]))


def _numbers(snapshot: dict[str, Any]) -> Text:
    requests, ttft = snapshot["requests"], snapshot["ttft_s"]
    lines = [
        f"{snapshot['at_s']:.1f} s   queued {requests['queued']}   running {requests['running']}   "
        f"finished {requests['finished']}   failed {requests['failed']}   restarts {requests['restarts']}"
    ]
    if ttft["p50"] is not None:
        lines.append(
            f"TTFT of the last {ttft['recent']}: P50 {ttft['p50']:.3f} s, P90 {ttft['p90']:.3f} s   "
            f"first tokens from pipelines {requests['first_tokens_from_pipelines']}"
        )
    lines += [f"{t['kind']} {t['transfer_id']}: {t['arrived']} of {t['total']} blocks" for t in snapshot["transfers"]]
    return Text("\n".join(lines))


class View:
    """Draws while the context lasts, on a terminal only, from a thread of its own."""

    def __init__(self, state: ClusterState, title: str) -> None:
        self._state = state
        self._title = title
        self._console = Console(stderr=True)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="view", daemon=True)

    @property
    def visible(self) -> bool:
        """True if standard error is a terminal to draw on."""
        return self._console.is_terminal

    def __enter__(self) -> View:
        if self.visible:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.visible:
            self._stop.set()
            self._thread.join()

    def _draw(self) -> None:
        with Live(console=self._console, auto_refresh=False, transient=False) as live:
            while True:
                live.update(draw(self._state.snapshot(), self._title), refresh=True)
                if self._stop.wait(_EVERY_S):
                    return
