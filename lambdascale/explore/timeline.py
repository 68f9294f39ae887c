"""A run as lines that people read: faults, events, and the commands they lead to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lambdascale.core import Stage
from lambdascale.core.commands import (
    AllocateNode,
    CancelTransfer,
    Command,
    Dispatch,
    EvictBlocks,
    FailRequest,
    LoadBlocks,
    PlaceCopy,
    ReleaseNode,
    Repartition,
    Serve,
    SetTimer,
    StartMulticast,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import (
    BlockArrived,
    CommandFailed,
    ConnectionLost,
    Event,
    NodeGivenUp,
    NodeJoined,
    NodeLost,
    RequestArrived,
    RequestFinished,
    SetUpDone,
    TokensProduced,
)


class Timeline:
    """Observer that prints. Timers at which nothing is decided are left out."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def struck(self, at: float, what: str) -> None:
        """Print a fault."""
        self._write(f"{at:9.3f} s  ** {what}")

    def on_event(self, event: Event) -> None:
        """Print an event."""
        shown = show_event(event)
        if shown:
            self._write(f"{event.at:9.3f} s  {shown}")

    def on_command(self, at: float, command: Command) -> None:
        """Print a command."""
        if not isinstance(command, SetTimer):
            self._write(f"{at:9.3f} s      -> {show_command(command)}")


def show_event(event: Event) -> str:
    """Return an event in words; "" for a timer."""
    match event:
        case RequestArrived(request=r):
            return f"request {r.request_id} of {r.model} arrives: {r.prompt_tokens} tokens, at most {r.max_tokens} more"
        case BlockArrived():
            return f"block {event.block} of {event.model} is on node {event.node} (transfer {event.transfer_id})"
        case SetUpDone():
            return f"transfer {event.transfer_id} is set up on node {event.node}"
        case TokensProduced():
            return f"request {event.request_id} has its first token from instance {event.instance}, {event.mode}"
        case RequestFinished():
            return f"request {event.request_id} ends with {event.tokens} tokens at instance {event.instance}"
        case NodeJoined():
            return f"node {event.node} joins"
        case NodeLost():
            return f"node {event.node} is lost{', and is to return' if event.returns else ''}"
        case ConnectionLost():
            return f"nodes {event.node} and {event.peer} have lost their connection, and have a new one"
        case NodeGivenUp():
            return f"node {event.node} is given up"
        case CommandFailed():
            what = f"transfer {event.transfer_id}" if event.transfer_id >= 0 else f"instance {event.instance}"
            return f"{what} fails: {event.reason}"
    return ""


def show_command(command: Command) -> str:
    """Return a command in words."""
    match command:
        case AllocateNode():
            return f"allocate {command.gpus} GPUs of node {command.node} to {command.model}"
        case ReleaseNode():
            return f"release node {command.node} of {command.model}{', a copy stays' if command.keep_host else ''}"
        case PlaceCopy():
            return f"a copy of {command.model} on node {command.node}"
        case EvictBlocks():
            return f"evict {command.model} from node {command.node} ({command.tier})"
        case StartMulticast():
            tiers = zip(command.plan.sources, command.source_tiers, strict=True)
            sources = ", ".join(f"{node} ({tier})" for node, tier in tiers)
            return (
                f"transfer {command.transfer_id}: multicast {command.model} from {sources} to {_list(command.plan.destinations)}"
            )
        case LoadBlocks():
            blocks = _list(command.blocks)
            return (
                f"transfer {command.transfer_id}: node {command.node} loads blocks {blocks} of {command.model} ({command.tier})"
            )
        case CancelTransfer():
            return f"cancel transfer {command.transfer_id}"
        case FailRequest():
            return f"fail request {command.request_id}: {command.failure.text}"
    return _show_serving(command)


def _show_serving(command: Command) -> str:
    match command:
        case Serve():
            return f"instance {command.instance}: serve {command.model} on {_stages(command.stages)}"
        case Repartition():
            return f"instance {command.instance}: serve on {_stages(command.stages)} from now on"
        case Dispatch():
            return f"requests {_list([r.request_id for r in command.requests])} to instance {command.instance}"
        case SwitchMode():
            moves = ", ".join(f"{request} to {target}" for request, target in command.moves)
            return f"dissolve instance {command.pipeline} ({command.kv}): {moves or 'no requests'}"
        case StopInstance():
            return f"stop instance {command.instance}"
    return str(command)


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _stages(stages: Sequence[Stage]) -> str:
    return ", ".join(f"node {stage.node} (blocks {stage.first_block} to {stage.last_block})" for stage in stages)
