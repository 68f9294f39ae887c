"""Sampling: the distribution it claims, and the same draw wherever it is made."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lambdascale.checkpoints import HfCheckpoint
from lambdascale.control import BatchLimits
from lambdascale.core import CapacityError, UserError
from lambdascale.inference import Engine, Sampling, Ticket, TransformerStage, load_blocks
from lambdascale.inference.sampling import choose, usable_temperature

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def shares(rule: Callable[[int], Sampling], draws: int = 4000) -> list[float]:
    tokens = choose(LOGITS.expand(draws, 4), [rule(seed) for seed in range(draws)], [0] * draws)
    return [tokens.count(token) / draws for token in range(4)]


def test_temperature_one_draws_the_model_s_distribution() -> None:
    assert shares(lambda seed: Sampling(temperature=1.0, seed=seed)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_low_temperature_sharpens() -> None:
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    wanted = (squares / squares.sum()).tolist()
    assert shares(lambda seed: Sampling(temperature=0.5, seed=seed)) == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.0001, 1), (1.0, 4)])
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p: float, kept: int) -> None:
    found = shares(lambda seed: Sampling(temperature=1.0, top_p=top_p, seed=seed), 1500)
    assert [share > 0 for share in found] == [token < kept for token in range(4)]


def test_positions_of_one_answer_draw_independently() -> None:
    tokens = choose(LOGITS.expand(2000, 4), [Sampling(temperature=1.0, seed=3)] * 2000, range(2000))
    assert tokens.count(0) / 2000 == pytest.approx(0.5, abs=0.05)
    pairs = sum(a == b == 0 for a, b in pairwise(tokens)) / 1999
    assert pairs == pytest.approx(0.25, abs=0.05)


class TestInTheEngine:
    @pytest.fixture
    def make(self, models: Callable[[str], Path]) -> Callable[..., Engine]:
        source = HfCheckpoint(models("llama"))
        blocks = load_blocks(source, 2)

        def build(max_batch: int = 4, slot_tokens: int = 128) -> Engine:
            return Engine(
                [TransformerStage(source.architecture, blocks, max_batch, slot_tokens)], BatchLimits(max_batch=max_batch)
            )

        return build

    @staticmethod
    def answer(engine: Engine, ticket: Ticket) -> list[int]:
        engine.add(ticket)
        while ticket.request_id in engine.batch:
            engine.step()
        return ticket.output

    def test_the_same_alone_in_a_batch_and_after_a_move(self, make: Callable[..., Engine]) -> None:
        def ticket(request_id: int = 0) -> Ticket:
            return Ticket(request_id, [5, 6, 7], 3, 40, Sampling(temperature=0.8, top_p=0.9, seed=42))

        alone = self.answer(make(), ticket())
        busy = make()
        for other in range(1, 4):
            busy.add(Ticket(other, [other] * (3 * other), 3 * other, 60))
        assert self.answer(busy, ticket()) == alone
        moved, one = ticket(), make()
        one.add(moved)
        for _ in range(10):
            one.step()
        assert self.answer(make(), one.take(0)[0]) == alone
        assert self.answer(make(), Ticket(0, [5, 6, 7], 3, 40, Sampling(temperature=0.8, top_p=0.9, seed=43))) != alone

    def test_stop_tokens_end_an_answer(self, make: Callable[..., Engine]) -> None:
        whole = self.answer(make(), Ticket(0, [1, 2, 3], 3, 30))
        stop = whole[7]
        short = self.answer(make(), Ticket(0, [1, 2, 3], 3, 30, stop_tokens=frozenset([stop])))
        assert short == whole[: whole.index(stop) + 1]
        first = self.answer(make(), Ticket(0, [1, 2, 3], 3, 30, stop_tokens=frozenset([whole[0]])))
        assert first == whole[:1]

    def test_one_token(self, make: Callable[..., Engine]) -> None:
        engine = make()
        engine.add(Ticket(0, [1, 2, 3], 3, 1))
        (produced,) = engine.step()
        assert produced.finished
        assert len(engine) == 0
        assert engine.step() == []

    def test_what_does_not_fit_is_refused(self, make: Callable[..., Engine]) -> None:
        engine = make(slot_tokens=16)
        with pytest.raises(CapacityError, match="needs 17 tokens of KV memory, a slot has 16"):
            engine.add(Ticket(0, [1] * 10, 10, 7))
        for wrong, reason in [
            (Ticket(0, [], 0, 5), "empty prompt"),
            (Ticket(0, [1], 1, 0), "already has 0 of its 0 tokens"),
            (Ticket(0, [257], 1, 2), "outside 0 to 256"),
            (Ticket(0, [-1], 1, 2), "outside 0 to 256"),
        ]:
            with pytest.raises(UserError, match=reason):
                engine.add(wrong)
        assert len(engine) == 0

    @pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": 1.5}])
    def test_rules_that_make_no_sense(self, wrong: dict[str, float]) -> None:
        with pytest.raises(UserError):
            Sampling(**wrong)


@pytest.mark.parametrize("temperature", [1e-300, 0.0099, -0.5, float("inf"), float("nan")])
def test_temperatures_that_cannot_be_divided_by(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=temperature)


@pytest.mark.parametrize(("asked", "used"), [(0.0, 0.0), (1e-300, 0.01), (0.01, 0.01), (1.0, 1.0)])
def test_usable_temperatures(asked: float, used: float) -> None:
    """A temperature that is too small is raised, as vLLM does; 0 stays greedy."""
    assert usable_temperature(asked) == used


def test_the_lowest_temperature_draws_from_extreme_logits() -> None:
    logits = torch.tensor([[-3e4, 3e4, 2.9e4], [0.0, 0.0, 0.0]])
    assert choose(logits, [Sampling(temperature=0.01)] * 2, [0, 0])[0] == 1


@pytest.mark.parametrize("seed", [1 << 63, -(1 << 63) - 1])
def test_seeds_outside_64_bits(seed: int) -> None:
    with pytest.raises(ValueError, match="seed must be between -9223372036854775808 and 9223372036854775807"):
        Sampling(seed=seed)
