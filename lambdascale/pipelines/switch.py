"""Mode switch: new instances for the requests of a dissolved pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heapreplace


def spread_requests(
    request_ids: Sequence[int], instances: Sequence[int], loads: Mapping[int, int]
) -> tuple[tuple[int, int], ...]:
    """Return (request, instance) for each request: the instance with the least load so far, the first of them in a tie.

    ``loads``: requests each instance has already.
    """
    assert instances, "requests need somewhere to go"
    heap = [(loads.get(instance, 0), position, instance) for position, instance in enumerate(instances)]
    heapify(heap)
    moves = []
    for request_id in request_ids:
        load, position, instance = heap[0]
        moves.append((request_id, instance))
        heapreplace(heap, (load + 1, position, instance))
    return tuple(moves)
