"""The account of traffic equals what the commands have still to bring, and is empty when nothing is under way."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.core.commands import CancelTransfer, LoadBlocks, StartMulticast
from lambdascale.core.events import NodeJoined
from tests.policy.world import World

NODES, MODELS = 5, "abc"
SYSTEMS = ("lambdascale", "faasnet", "nccl_broadcast", "serverlessllm")
STEPS = st.one_of(
    st.tuples(st.just("arrive"), st.sampled_from(MODELS), st.integers(1, 5)),
    st.tuples(st.just("tick"), st.just(""), st.just(0)),
    st.tuples(st.just("deliver"), st.just(""), st.integers(1, 9)),
    st.tuples(st.just("lose"), st.just(""), st.integers(0, NODES - 1)),
    st.tuples(st.just("join"), st.just(""), st.integers(0, NODES - 1)),
    st.tuples(st.just("fail"), st.just(""), st.integers(0, 9)),
)


def owed(world: World) -> Counter[tuple[int, str]]:
    """Bytes per (node, port), from the commands: sends of transfers not called off whose receiver lacks the block."""
    cancelled = {command.transfer_id for command in world.commands if isinstance(command, CancelTransfer)}
    found: Counter[tuple[int, str]] = Counter()
    for command in world.commands:
        if isinstance(command, LoadBlocks) and command.transfer_id not in cancelled:
            ports = {"host": ("pcie",), "ssd": ("pcie", "storage")}.get(command.tier, ())
            missing = set(command.blocks) - world.held(command.node, command.model)
            found.update({(command.node, port): sum(command.block_bytes[b] for b in missing) for port in ports})
        elif isinstance(command, StartMulticast) and command.transfer_id not in cancelled:
            host = {node for node, tier in zip(command.plan.sources, command.source_tiers, strict=True) if tier == "host"}
            for send in (send for sends in command.plan.rounds for send in sends):
                if send.block not in world.held(send.dst, command.model):
                    size = command.block_bytes[send.block]
                    found[send.src, "nic_out"] += size
                    found[send.dst, "nic_in"] += size
                    found[send.src, "pcie"] += size if send.src in host else 0
    return +found


def account(world: World) -> Counter[tuple[int, str]]:
    traffic = world.plane.fleet.traffic
    ports = ("nic_out", "nic_in", "pcie", "storage")
    found = Counter({(node, port): traffic.left(node, port) for node in range(NODES) for port in ports})
    assert min(found.values()) >= 0
    return +found


def play(world: World, kind: str, model: str, number: int) -> None:
    under_way = world.open_transfers()
    if kind == "arrive":
        world.arrive(number, model)
    elif kind == "tick" and world.ticking:
        world.tick()
    elif kind == "deliver" and under_way:
        world.deliver(under_way[number % len(under_way)], number)
    elif kind == "lose":
        world.lose(number)
    elif kind == "join":
        world.play(NodeJoined(world.at, number))
    elif kind == "fail" and under_way:
        world.fail(transfer=under_way[number % len(under_way)])


@settings(max_examples=60, deadline=None)
@given(system=st.sampled_from(SYSTEMS), copies=st.integers(0, 2), steps=st.lists(STEPS, max_size=25))
def test_the_account_is_what_commands_have_still_to_bring(system: str, copies: int, steps: list[tuple[str, str, int]]) -> None:
    world = World(system, nodes=NODES, models=MODELS, copies=copies, min_replicas=0)
    for step in steps:
        play(world, *step)
        assert account(world) == owed(world), step
    while under_way := world.open_transfers():
        world.deliver(under_way[0])
    assert not account(world), "nothing is under way"
