"""Transfers in the simulated data plane after nodes, connections and whole transfers were lost."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from lambdascale.core import MulticastPlan, Send
from tests.unit.transfers_rig import CHAIN, Rig, multicast


@pytest.mark.parametrize("meanwhile", ["nothing", "released", "lost"])
def test_a_source_does_not_wait_for_a_block_that_comes_once_more(meanwhile: str) -> None:
    """A repeated transfer brings node 1 block 0, which it holds, and is cancelled: what node 1 sends must not wait for that.

    Unless the node has been emptied in between: then it has nothing to send. A block takes 1 s a hop.
    """
    rig = Rig()
    once = MulticastPlan(members=(0, 1), sources=(0,), blocks=1, rounds=((Send(0, 1, 0),),))
    on = MulticastPlan(members=(1, 2), sources=(1,), blocks=1, rounds=((Send(1, 2, 0),),))
    rig.engine.multicast(multicast(once))
    rig.run()
    if meanwhile == "released":
        rig.engine.released(1, "m")
    elif meanwhile == "lost":
        rig.engine.lost(1)
        rig.engine.restored(1)
    rig.engine.multicast(multicast(once, 2))
    rig.engine.multicast(multicast(on, 3))
    rig.engine.cancel(2)
    assert rig.run() == [(1.0, 1, 1, 0), *([(2.0, 3, 2, 0)] if meanwhile == "nothing" else [])]


def test_two_nodes_that_lose_their_connection_move_nothing_to_each_other_until_they_have_a_new_one() -> None:
    """Each goes on with others. What was under way between them stays lost. A block takes 1 s a hop."""
    rig = Rig()

    def send(number: int, src: int, dst: int) -> None:
        plan = MulticastPlan(members=(src, dst), sources=(src,), blocks=1, rounds=((Send(src, dst, 0),),))
        rig.engine.multicast(multicast(plan, number))

    send(1, 0, 1)
    rig.kernel.at(0.5, lambda _: rig.engine.lost(0, 1), None)
    rig.kernel.at(1.0, lambda _: [send(2, 0, 1), send(3, 0, 2), send(4, 3, 1)], None)
    rig.kernel.at(3.0, lambda _: [rig.engine.restored(0, 1), send(5, 0, 1)], None)
    assert rig.run() == [(2.0, 3, 2, 0), (2.0, 4, 1, 0), (4.0, 5, 1, 0)]
    assert rig.engine.active == (1, 2), "they wait to be cancelled"


@pytest.mark.parametrize("streaming", [True, False])
def test_a_collective_does_not_begin_with_a_node_that_died_during_its_set_up_and_came_back(streaming: bool) -> None:
    """The new process is no member of the communicator that is being made."""
    rig = Rig()
    rig.engine.multicast(multicast(replace(CHAIN, streaming=streaming), multicast="collective"))
    rig.engine.lost(1)
    rig.engine.restored(1)
    assert rig.run() == rig.occupied == []


@pytest.mark.parametrize(("pair", "breaks"), [((0, 2), True), ((0, 3), False)])
def test_a_collective_breaks_with_a_connection_of_two_of_its_members(pair: tuple[int, int], breaks: bool) -> None:
    rig = Rig(chunk_bytes=10, communicator_setup=False)
    rig.engine.multicast(multicast(CHAIN, multicast="collective"))
    rig.kernel.at(0.5, lambda _: rig.engine.lost(*pair), None)
    assert bool(rig.run()) is not breaks
    assert [busy for *_, busy in rig.occupied] == [True, False]
    assert rig.occupied[1][0] == (0.5 if breaks else rig.arrived[-1][0])
