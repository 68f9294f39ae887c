"""The control channel: who gets in, and what happens to garbage."""

from __future__ import annotations

from contextlib import suppress

import zmq

from lambdascale.live import wire
from lambdascale.live.controller.hub import Hub


def dealer(context: zmq.Context[zmq.Socket[bytes]], hub: Hub, *, known: bool = True, curve: bool = True) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.identity = b"3.0"
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
    hub.send(3, wire.Ping())
    assert wire.to_agent(agent.recv()) == wire.Ping()
    hub.send(7, wire.Ping())  # nobody there
    agent.close()
    hub.close()
    context.term()


def test_strangers_are_not_heard() -> None:
    hub, context = Hub("127.0.0.1"), zmq.Context[zmq.Socket[bytes]]()
    for stranger in (dealer(context, hub, known=False), dealer(context, hub, curve=False)):
        with suppress(zmq.Again):  # refused already: there is nobody to send to
            stranger.send(wire.encode(wire.Beat()), zmq.DONTWAIT)
        assert hub.poll(0.5) == ([], set())
        stranger.close()
    hub.close()
    context.term()
