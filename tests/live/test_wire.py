"""The control channel: who gets in, and what happens to garbage."""

from __future__ import annotations

from contextlib import suppress

import zmq

from lambdascale.live import wire
from lambdascale.live.controller.hub import Hub


def dealer(
    context: zmq.Context[zmq.Socket[bytes]], hub: Hub, *, known: bool = True, curve: bool = True, generation: int = 0
) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.identity = b"3.%d" % generation
    socket.linger = 0
    if curve:
        access = hub.access
        socket.curve_serverkey = access.server_public
        keys = (access.client_public, access.client_secret) if known else zmq.curve_keypair()
        socket.curve_publickey, socket.curve_secretkey = keys
    socket.connect(hub.access.controller)
    return socket


def test_an_agent_is_heard_and_answered() -> None:
    hub, context = Hub("127.0.0.1"), zmq.Context[zmq.Socket[bytes]]()
    agent = dealer(context, hub)
    agent.send(b"garbage")
    agent.send(wire.encode(wire.Beat()))
    messages = []
    while not messages:
        messages, _ = hub.poll(5)
    assert messages == [(3, wire.Beat())]
    hub.send(3, wire.Abort(0))
    assert wire.to_agent(agent.recv()) == wire.Abort(0)
    hub.send(7, wire.Abort(0))  # nobody there
    agent.close()
    hub.close()
    context.term()


def test_a_replaced_process_is_neither_heard_nor_answered() -> None:
    hub, context = Hub("127.0.0.1"), zmq.Context[zmq.Socket[bytes]]()
    old, new = dealer(context, hub), dealer(context, hub, generation=1)
    hub.expect(3, 1)
    for agent, said in ((old, wire.Resumed(1, {})), (new, wire.Beat())):
        agent.send(wire.encode(said))
    heard = []
    while (3, wire.Beat()) not in heard:
        heard += hub.poll(5)[0]
    assert hub.poll(0.3) == ([], set())
    assert heard == [(3, wire.Beat())]
    hub.send(3, wire.Abort(0))
    assert wire.to_agent(new.recv()) == wire.Abort(0)
    assert not old.poll(100)
    for agent in (old, new):
        agent.close()
    hub.close()
    context.term()


def test_strangers_are_not_heard() -> None:
    hub, context = Hub("127.0.0.1"), zmq.Context[zmq.Socket[bytes]]()
    for stranger in (dealer(context, hub, known=False), dealer(context, hub, curve=False)):
        with suppress(zmq.Again):  # refused already
            stranger.send(wire.encode(wire.Beat()), zmq.DONTWAIT)
        assert hub.poll(0.5) == ([], set())
        stranger.close()
    hub.close()
    context.term()
