"""SmolLM2 during a scale-out: every answer is transformers' answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

pytestmark = [pytest.mark.live, pytest.mark.slow]

PEOPLE = (
    "a sailor",
    "a teacher",
    "my grandmother",
    "the mayor",
    "a robot",
    "two friends",
    "a student",
    "the cook",
    "a fox",
    "an astronaut",
)
TASKS = (
    "Write a short story about {}.",
    "What would {} say about the weather today?",
    "List three things that {} needs for a long journey, and say why.",
    "Explain to {} in simple words how a bicycle works.",
    "Give {} a polite answer to a rude letter.",
)
PROMPTS = tuple(task.format(who) for task in TASKS for who in PEOPLE)
TOKENS = 24


def is_greedy(model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> bool:
    """Whether ``generate`` without sampling would answer so: each token is the most likely one after all before it."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.inference_mode():
        logits = model(ids).logits[0]
    return bool((logits[len(prompt) - 1 : -1].argmax(-1) == ids[0, len(prompt) :]).all())
