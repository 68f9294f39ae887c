"""SmolLM2 during a scale-out: every answer is transformers' answer."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate

from lambdascale.checkpoints import PackedModel
from lambdascale.checkpoints.builtin import builtin_model
from lambdascale.checkpoints.synthetic import smollm2_file
from lambdascale.control import build_system, drive
from lambdascale.core import UserError, traced
from lambdascale.core.commands import StartMulticast
from lambdascale.experiments.compose import compose
from lambdascale.inference import Ticket
from lambdascale.live.config import LiveConfig
from lambdascale.live.serving.text import Text
from lambdascale.metrics import Recorder, requests_table
from lambdascale.testing.invariants import InvariantChecker
from tests.inference.greedy import is_greedy

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


@pytest.fixture(scope="module")
def packed() -> PackedModel:
    try:
        smollm2_file()
    except UserError as error:
        pytest.skip(str(error))
    return builtin_model("smollm2", 16, "fp32")


def test_fifty_greedy_requests_during_a_scale_out(packed: PackedModel) -> None:
    """One node grows to four over a slow link; every answer is transformers', whichever way it came about."""
    from transformers import AutoModelForCausalLM

    text = Text(packed.directory)
    requests, tickets = [], {}
    for number, prompt in enumerate(PROMPTS):
        ids = text.encode(text.chat([{"role": "user", "content": prompt}]), special=False)
        requests.append(traced(number, 0.1, packed.name, len(ids), TOKENS))
        tickets[number] = Ticket(number, list(ids), len(ids), TOKENS, stop_tokens=text.stop_tokens)
    # Links at which 0.65 GB take a quarter of a minute, and iterations that keep one node busy twice as long.
    pace = ["cluster.nic_bytes_per_s=0.05GB/s", "cluster.compute.iteration_overhead_s=0.25"]
    # Host copies are sources first. If pipelines serve depends on the machine; tests/live/test_cluster.py makes sure of it.
    always = "+system.start.pipelines.form=always"
    overrides = [
        "cluster=desk",
        "system=lambdascale_tuned",
        *pace,
        "system.memory.initial_copies=2",
        "system.start.sources=2",
        always,
    ]
    config = compose(overrides)
    cluster, system = (instantiate(config[group], _convert_="all") for group in ("cluster", "system"))
    recorder, checker = Recorder(), InvariantChecker(cluster, system.blocks)
    plane = build_system(system, cluster=cluster, models=[packed.spec])
    backend = LiveConfig(checkpoint="smollm2", dtype="fp32", executor="paced", slot_tokens=160).start(
        cluster=cluster,
        models=[(packed.name, packed)],
        system=system,
        trace=requests,
        ticket_of=lambda request: tickets[request.request_id],
    )
    try:
        drive(plane, backend, [recorder, checker])
    finally:
        backend.close()
    rows = requests_table(recorder, "lambdascale").to_pandas()
    assert (rows.status == "ok").all()
    plan = next(e.plan for _, e in recorder.entries if isinstance(e, StartMulticast))
    assert len(plan.sources) == 2, "a replica and a host copy"
    reference = AutoModelForCausalLM.from_pretrained(packed.directory, dtype=torch.float32).eval()
    for number, ticket in tickets.items():
        assert is_greedy(reference, ticket.tokens[: ticket.prompt_tokens], ticket.output), PROMPTS[number]
    assert any(ticket.output for ticket in tickets.values())
