"""Batched generation of an engine, in a process of its own: python batched_run.py MODEL_DIRECTORY prints each request's tokens.

Requests come at different times, greedy and sampled, longer and shorter than an iteration's token budget. Two of them move to
another engine with other stages, one with its KV and one without.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from lambdascale.checkpoints import HfCheckpoint
from lambdascale.control import BatchLimits
from lambdascale.inference import Engine, Sampling, Ticket, TransformerStage, load_blocks

SLOT_TOKENS = 128
REQUESTS = 9
MOVED = {2: True, 3: False}  # with its KV or without


def generate(directory: Path) -> dict[int, list[int]]:
    """Output tokens of each request."""
    torch.set_num_threads(1)
    source = HfCheckpoint(directory)
    one, other = (engine(source, split) for split in ((1, 2, 1), (4,)))
    tickets = {number: ticket(number) for number in range(REQUESTS)}
    for number in range(REQUESTS):
        one.add(tickets[number])
        one.step()
        one.step()
    for number, with_kv in MOVED.items():
        moved, kv = one.take(number, with_kv=with_kv)
        parts = None if kv is None else [torch.cat(kv, dim=1)]
        other.add(moved, parts)
    while len(one) or len(other):
        one.step()
        other.step()
    return {number: ticket.output for number, ticket in tickets.items()}


def engine(source: HfCheckpoint, split: tuple[int, ...]) -> Engine:
    """An engine over the model's four blocks, cut into stages."""
    blocks, stages = load_blocks(source, sum(split)), []
    for count in split:
        stages.append(TransformerStage(source.architecture, blocks[:count], 4, SLOT_TOKENS))
        blocks = blocks[count:]
    return Engine(stages, BatchLimits(max_batch=4, max_tokens=16))


def ticket(number: int) -> Ticket:
    """Every third request is sampled."""
    prompt = torch.randint(0, 256, (3 + 7 * number,), generator=torch.Generator().manual_seed(number)).tolist()
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=number) if number % 3 == 0 else Sampling(temperature=0.0)
    return Ticket(number, prompt, len(prompt), 20 + number, sampling)


if __name__ == "__main__":
    print(json.dumps({"assertions": __debug__, "tokens": generate(Path(sys.argv[1]))}))
