"""The way of a request's KV to another node."""

from __future__ import annotations

from typing import Literal

# Through the "network" and nothing else, as it is simulated; to "places" in memory that the receiver grants between two
# iterations, as it is live; in "messages", whose rate nothing says, where nodes have no such memory.
KvPath = Literal["network", "places", "messages"]

# Copies of the KV that its nodes make on the way by places, each a read and a write of all its bytes: the sender takes it out of
# the memory that it computes with; the receiver takes it out of the place, which others need, and puts it where it computes when
# all of a request's has come.
SENDERS_COPIES, RECEIVERS_COPIES = 1, 2


def layers_of_part(place_bytes: int, layer_bytes: int) -> int:
    """Return how many layers of a request's KV, ``layer_bytes`` each, go to a place at a time; 0 if not even one has room."""
    return place_bytes // layer_bytes
