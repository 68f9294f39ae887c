"""Tables and summary of a hand-written run."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

import pytest
from rich.console import Console

from lambdascale.core import Failure, IncompleteRunError, MulticastPlan, Request
from lambdascale.core.commands import AllocateNode, Command, Dispatch, FailRequest, LoadBlocks, ReleaseNode, StartMulticast
from lambdascale.core.events import Event, NodeJoined, NodeLost, RequestArrived, RequestFinished, TimerFired, TokensProduced
from lambdascale.metrics import Recorder, comparison, events_table, gpu_usage, print_comparison, requests_table, summarise
from lambdascale.metrics.starts import node_starts
from lambdascale.metrics.tables import gpu_seconds


def request(request_id: int, at: float = 0.0, model: str = "m") -> Request:
    return Request(request_id, at, model, 10, 5)


TOO_LARGE = Failure("too_large", "needs up to 7 tokens")


def recorded(*entries: Event | tuple[float, Command]) -> Recorder:
    recorder = Recorder()
    for entry in entries:
        if isinstance(entry, Event):
            recorder.on_event(entry)
        else:
            recorder.on_command(*entry)
    return recorder


def answered(request_id: int, arrival: float, first: float, end: float, tokens: int = 5, model: str = "m") -> list[object]:
    asked = request(request_id, arrival, model)
    return [
        RequestArrived(arrival, asked),
        (arrival, Dispatch(1, (asked,))),
        TokensProduced(first, 1, request_id, 1, "pipeline"),
        RequestFinished(end, 1, request_id, tokens),
    ]


def test_a_recorder_can_be_read_while_the_run_goes_on() -> None:
    joined, allocate, lost = NodeJoined(0.0, 1), AllocateNode(1, "m", 1), NodeLost(2.0, 1)
    recorder = recorded(joined, (0.5, allocate))
    assert (recorder.entries, recorder.end_s) == ([(0.0, joined), (0.5, allocate)], 0.5)
    recorder.on_event(lost)
    assert recorder.entries == [*recorder] == [(0.0, joined), (0.5, allocate), (2.0, lost)]
    assert recorder.end_s == 2.0


NO_STARTS = {"own_load": 0, "unicast": 0, "multicast": 0}


def allocated(*nodes: int) -> list[tuple[float, Command]]:
    return [(0.0, AllocateNode(node, "m", 1)) for node in nodes]


def load(node: int) -> LoadBlocks:
    return LoadBlocks(1, "m", node, (0,), (1,), "host", "pipelined")


def multicast(
    sources: tuple[int, ...], destinations: tuple[int, ...], groups: tuple[tuple[int, ...], ...] = ()
) -> StartMulticast:
    plan = MulticastPlan((*sources, *destinations), sources, 1, (), groups)
    return StartMulticast(1, "m", plan, (1,), ("gpu",) * len(sources), "one_sided")


def summary_of(recorder: Recorder) -> dict[str, object]:
    return summarise(recorder, requests_table(recorder, "s"), system="s", backend="sim", usd_per_gpu_hour=3.6, wall_s=1.0)


def rows(recorder: Recorder) -> Sequence[dict[str, object]]:
    return requests_table(recorder, "s").to_pylist()


class TestRequests:
    def test_times_of_an_answer(self) -> None:
        (row,) = rows(recorded(*answered(3, 1.0, 1.5, 2.5)))
        assert row["ttft_s"] == 0.5
        assert row["tpot_s"] == 0.25, "four gaps between five tokens"
        assert (row["status"], row["first_token_mode"], row["restarts"]) == ("ok", "pipeline", 0)

    def test_one_token_has_no_tpot(self) -> None:
        (row,) = rows(recorded(*answered(0, 0.0, 0.5, 0.5, tokens=1)))
        assert row["tpot_s"] is None
        assert row["output_tokens"] == 1

    def test_an_answer_that_was_not_given_has_no_length(self) -> None:
        (row,) = rows(recorded(RequestArrived(1.0, request(7, 1.0)), (1.0, FailRequest(7, TOO_LARGE))))
        assert (row["prompt_tokens"], row["output_tokens"], row["status"]) == (10, None, "failed")
        assert (row["failure_reason"], row["failure"]) == ("too_large", "needs up to 7 tokens")

    def test_a_restart_keeps_the_first_first_token(self) -> None:
        begin, end = answered(0, 0.0, 0.5, 3.0)[:3], RequestFinished(3.0, 2, 0, 5)
        again = [NodeLost(1.0, 4), (1.0, Dispatch(2, (request(0),))), TokensProduced(1.5, 2, 0, 1, "local")]
        (row,) = rows(recorded(*begin, *again, end))
        assert (row["ttft_s"], row["first_token_mode"], row["restarts"]) == (0.5, "pipeline", 1)

    def test_no_requests(self) -> None:
        table = requests_table(Recorder(), "s")
        assert table.num_rows == 0
        assert summary_of(Recorder())["ttft_s"] == dict.fromkeys(("mean", "p50", "p90", "p95", "p99", "p999"))


class TestSummary:
    def test_a_lost_request_is_an_error(self) -> None:
        with pytest.raises(IncompleteRunError, match=r"1 of 2 .*\[7\]"):
            summary_of(recorded(*answered(0, 0.0, 0.5, 1.0), RequestArrived(1.0, request(7, 1.0))))

    def test_an_answer_without_first_token_is_an_error(self) -> None:
        with pytest.raises(IncompleteRunError, match="without a first token"):
            summary_of(recorded(RequestArrived(0.0, request(0)), RequestFinished(1.0, 1, 0, 5)))

    def test_failed_requests_count_but_have_no_ttft(self) -> None:
        failed = [RequestArrived(1.0, request(1, 1.0)), (1.0, FailRequest(1, TOO_LARGE))]
        summary = summary_of(recorded(*answered(0, 0.0, 0.5, 1.0), *failed))
        assert summary["requests"] == {"submitted": 2, "completed": 1, "failed": 1}
        assert summary["ttft_s"]["p99"] == 0.5

    def test_failures_by_reason(self) -> None:
        """Failures are counted by reason, not by their words, in which numbers differ."""
        failures = (TOO_LARGE, Failure("no_node", "no node is left"), Failure("too_large", "needs up to 8 tokens"))
        failed = [
            entry
            for number, failure in enumerate(failures)
            for entry in (RequestArrived(1.0, request(number, 1.0)), (1.0, FailRequest(number, failure)))
        ]
        assert summary_of(recorded(*failed))["failures"] == {"no_node": 1, "too_large": 2}

    def test_times_of_whole_answers(self) -> None:
        """An answer of 5 tokens, dispatched at once, and one that waited a second: from arrival to end 1.5 and 4 s."""
        late = request(1, 1.0)
        waited = [
            RequestArrived(1.25, late),
            (2.0, Dispatch(1, (late,))),
            TokensProduced(3.0, 1, 1, 1, "local"),
            RequestFinished(5.0, 1, 1, 5),
        ]
        summary = summary_of(recorded(*answered(0, 0.0, 0.5, 1.5), *waited))
        assert summary["e2e_s"]["p50"] == 2.75
        assert summary["ntpot_s"]["mean"] == pytest.approx((0.3 + 0.8) / 2)
        assert summary["queue_s"]["mean"] == 0.5
        assert summary["rates"] == {"requested_per_s": 2.0, "achieved_per_s": 2 / 5, "drift_s": 0.25}

    def test_a_run_without_answers_has_no_rates(self) -> None:
        assert summary_of(Recorder())["rates"] == {"requested_per_s": None, "achieved_per_s": None, "drift_s": None}
        failed = recorded(RequestArrived(0.0, request(0)), (0.0, FailRequest(0, TOO_LARGE)))
        assert summary_of(failed)["rates"] == {"requested_per_s": None, "achieved_per_s": None, "drift_s": 0.0}

    def test_cost_is_gpu_time_times_price(self) -> None:
        held = [(0.0, AllocateNode(0, "m", 2)), TimerFired(10.0, 0), (10.0, ReleaseNode(0, "m", 2))]
        summary = summary_of(recorded(*held))
        assert summary["gpu_seconds"] == 20.0
        assert summary["cost_usd"] == pytest.approx(0.02)

    def test_scale_outs_are_those_after_the_first_request(self) -> None:
        before, after = (0.0, AllocateNode(0, "m", 1)), (2.0, AllocateNode(1, "m", 1))
        assert summary_of(recorded(before, *answered(0, 1.0, 1.5, 2.0), after))["scale_outs"] == 1

    def test_starts_by_the_way_the_weights_came(self) -> None:
        """A load, a unicast, and a multicast whose sources have one and two destinations; what follows on a start is no start."""
        assert node_starts(recorded(*allocated(0), (0.0, load(0)))) == (NO_STARTS, {}), "what a run starts with"
        begin = RequestArrived(0.0, request(0))
        assert node_starts(recorded(begin, *allocated(1, 2), (0.0, load(1)), (0.0, multicast((0,), (2,))))) == (
            {"own_load": 1, "unicast": 1, "multicast": 0},
            {},
        )
        two = (0.0, multicast((0, 1), (2, 3, 4), groups=((0, 2, 3), (1, 4))))
        found = recorded(begin, *allocated(2, 3, 4), two, (0.0, load(2)), (0.0, multicast((0,), (3, 4))))
        assert node_starts(found) == ({"own_load": 0, "unicast": 1, "multicast": 2}, {"2": 2})
        assert summary_of(recorded(*answered(0, 0.0, 1.0, 2.0), *allocated(1, 2, 3), (2.0, multicast((0,), (1, 2, 3)))))[
            "multicast_starts"
        ] == {"3": 3}

    def test_models_apart(self) -> None:
        both = recorded(*answered(0, 0.0, 1.0, 2.0, model="a"), *answered(1, 2.0, 5.0, 6.0, model="b"))
        per_model = summary_of(both)["per_model"]
        assert {name: numbers["ttft_s"]["p50"] for name, numbers in per_model.items()} == {"a": 1.0, "b": 3.0}


class TestGpus:
    def test_what_is_held_at_the_end_counts_until_the_end(self) -> None:
        recorder = recorded((1.0, AllocateNode(0, "m", 4)), TimerFired(6.0, 0))
        assert gpu_seconds(gpu_usage(recorder), recorder.end_s) == 20.0

    def test_a_lost_node_costs_nothing_more(self) -> None:
        recorder = recorded((0.0, AllocateNode(0, "m", 1)), (0.0, AllocateNode(1, "m", 1)), NodeLost(3.0, 1), TimerFired(10.0, 0))
        assert gpu_seconds(gpu_usage(recorder), recorder.end_s) == 13.0
        assert gpu_usage(recorder)["gpus"].to_pylist() == [1, 2, 1]

    def test_a_node_that_joins_anew_holds_nothing_whether_or_not_its_loss_was_told(self) -> None:
        recorder = recorded(
            (0.0, AllocateNode(1, "m", 1)), NodeJoined(3.0, 1), (4.0, AllocateNode(1, "m", 1)), TimerFired(10.0, 0)
        )
        assert gpu_seconds(gpu_usage(recorder), recorder.end_s) == 9.0

    def test_a_release_of_what_is_not_held_is_a_fault(self) -> None:
        with pytest.raises(AssertionError, match="releases GPUs"):
            gpu_usage(recorded((0.0, ReleaseNode(0, "m", 1))))


def test_events_are_numbered_in_order() -> None:
    table = events_table(recorded(*answered(0, 0.0, 0.5, 1.0)))
    assert table["seq"].to_pylist() == [0, 1, 2, 3]
    assert table["kind"].to_pylist() == ["RequestArrived", "Dispatch", "TokensProduced", "RequestFinished"]


class TestComparison:
    @staticmethod
    def run_of(system: str, p90: float, label: str = "") -> dict[str, object]:
        recorder = recorded((0.0, AllocateNode(0, "m", 1)), *answered(0, 0.0, p90, p90))
        return summary_of(recorder) | {"system": system, "label": label}

    def test_a_set_up_that_was_not_measured_is_marked(self) -> None:
        setups = [None, {"ranks": 8, "basis": "measured"}, {"ranks": 12, "basis": "one sample"}]
        runs = [self.run_of(name, 1.0) | {"communicator_setup": found} for name, found in zip("abc", setups, strict=True)]
        console = Console(width=140, file=StringIO(), record=True)
        print_comparison(console, comparison(runs), "runs")
        shown = console.export_text()
        assert ("a†" in shown, "b†" in shown, "c†" in shown) == (False, False, True)
        assert "12 ranks: one sample" in shown

    def test_ratios_are_to_lambdascale_of_the_same_label(self) -> None:
        runs = [self.run_of(s, p90, label) for s, p90, label in [("lambdascale", 2, "x"), ("a", 3, "x"), ("a", 5, "y")]]
        frame = comparison(runs)
        assert frame.p90_ratio.tolist()[:2] == [1.0, 1.5]
        assert frame.p90_ratio.isna().tolist() == [False, False, True], "y has no λScale: no ratio is made up"
