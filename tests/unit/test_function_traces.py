"""Azure Functions as popularity and bursts of models, and ServeGen's clients."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lambdascale.core import TracedRequest, TraceError, UserError
from lambdascale.workload import AzureFunctions2019, AzureFunctions2021, ServeGenClients, ShapedWorkload
from tests.unit.trace_files import Write, read

MINUTES = range(1, 1441)
HEADER_2019 = ",".join(["HashOwner", "HashApp", "HashFunction", "Trigger", *map(str, MINUTES)]) + "\n"
HEADER_2021 = "app,func,end_timestamp,duration\n"


def day(*functions: dict[int, int]) -> str:
    """A day of functions f0, f1, ...: each a mapping of minute (from 1) to invocations."""
    lines = (f"o,a,f{at},http," + ",".join(str(of.get(minute, 0)) for minute in MINUTES) for at, of in enumerate(functions))
    return HEADER_2019 + "".join(line + "\n" for line in lines)


def models(requests: list[TracedRequest]) -> Counter[str]:
    return Counter(request.model for request in requests)


class Test2019:
    def test_the_busiest_functions_are_the_models(self, write: Write) -> None:
        path = write(day({1: 3, 2: 1}, {1: 9}, {3: 20}, {1: 5, 40: 99}))
        found = read(AzureFunctions2019(path=path, prompt_tokens=7), "a", "b")
        assert models(found) == {"a": 20, "b": 9}
        assert all(120 <= r.arrival_s < 180 for r in found if r.model == "a")
        assert all(0 <= r.arrival_s < 60 for r in found if r.model == "b")
        assert {r.prompt_tokens for r in found} == {7}
        assert len({r.arrival_s for r in found}) == 29, "at random within the minute"

    def test_all_functions_in_turn(self, write: Write) -> None:
        path = write(day({1: 3}, {1: 9}, {3: 20}, {1: 5}, {}))
        assert models(read(AzureFunctions2019(path=path, assign="round_robin"), "a", "b")) == {"a": 25, "b": 12}

    def test_a_sample_of_functions_by_seed(self, write: Write) -> None:
        path = write(day(*({1: 1 + at} for at in range(40)), {}))
        workload = AzureFunctions2019(path=path, assign="sample")
        drawn = [sorted(models(list(workload.requests(models=["a", "b"], seed=seed))).values()) for seed in (1, 1, 2, 3)]
        assert drawn[0] == drawn[1]
        assert len({tuple(each) for each in drawn}) > 1

    def test_evenly_within_the_minute_and_a_window(self, write: Write) -> None:
        path = write(day({1: 4, 2: 2, 3: 60}))
        found = read(AzureFunctions2019(path=path, within_minute="even", start_s=30.0, duration_s=91.0))
        assert [r.arrival_s for r in found] == [0.0, 15.0, 30.0, 60.0, 90.0]

    def test_bursts_from_a_gamma_process(self, write: Write) -> None:
        path = write(day(dict.fromkeys(range(1, 31), 60), dict.fromkeys(range(1, 31), 20)))
        found = read(AzureFunctions2019(path=path, arrivals="gamma", gap_shape=0.25), "a", "b")
        counts = models(found)
        assert 1300 < counts["a"] < 2300
        assert 350 < counts["b"] < 900
        gaps = np.diff([r.arrival_s for r in found if r.model == "a"])
        assert 1.6 < gaps.std() / gaps.mean() < 2.4

    def test_fewer_functions_than_models(self, write: Write) -> None:
        with pytest.raises(UserError, match="2 functions have an invocation in the window, fewer than the 3 models"):
            read(AzureFunctions2019(path=write(day({1: 3}, {2: 1}, {700: 9}))), "a", "b", "c")

    def test_more_invocations_than_a_run_may_have(self, write: Write) -> None:
        with pytest.raises(UserError, match="max_events"):
            AzureFunctions2019(path=write(day({1: 10**6}))).load(models=["a"], seed=0, max_requests=1000)

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("o,a,f,http,1,2", ":3: Expected 1444 columns, got 6"),
            ("o,a,f,http," + ",".join("x" if m == 2 else "0" for m in MINUTES), ":3: .*'x'"),
            ("o,a,f,http," + ",".join("-4" if m == 2 else "0" for m in MINUTES), ":3: minute 2 must be a count"),
        ],
    )
    def test_bad_rows(self, write: Write, line: str, complaint: str) -> None:
        path = write(day({1: 3}) + line + "\n")
        with pytest.raises(TraceError, match=complaint) as caught:
            read(AzureFunctions2019(path=path))
        assert "\n" not in str(caught.value)

    def test_other_files_and_windows(self, write: Write) -> None:
        with pytest.raises(TraceError, match=r"trace.csv: .*HashFunction"):
            read(AzureFunctions2019(path=write(HEADER_2021 + "a,f,1,1\n")))
        with pytest.raises(UserError, match="a file is a day"):
            AzureFunctions2019(path="x", start_s=86400.0)
        with pytest.raises(UserError, match="functions decide which model"):
            AzureFunctions2019(path="x", popularity="zipf")


class Test2021:
    ROWS = "a,f,10.5,0.5\na,g,12.0,0.25\nb,f,9.0,4.0\na,f,20.0,1.0\nb,f,31.5,0.5\na,f,40.0,2.0\n"

    def test_an_invocation_arrives_before_its_end(self, write: Write) -> None:
        found = read(AzureFunctions2021(path=write(HEADER_2021 + self.ROWS)), "x", "y", "z")
        assert [(r.arrival_s, r.model) for r in found] == [
            (0.0, "y"),
            (5.0, "x"),
            (6.75, "z"),
            (14.0, "x"),
            (26.0, "y"),
            (33.0, "x"),
        ]

    def test_window(self, write: Write) -> None:
        found = read(AzureFunctions2021(path=write(HEADER_2021 + self.ROWS), start_s=10.0, duration_s=20.0), "x", "y")
        assert [(r.arrival_s, r.model) for r in found] == [(4.0, "x"), (16.0, "y")]

    @pytest.mark.parametrize("row", ["a,f,x,1", "a,f,-1,1", "a,f,nan,1", "a,f,1", "a,f,1,inf"])
    def test_bad_rows(self, write: Write, row: str) -> None:
        with pytest.raises(TraceError, match=r"trace.csv:3: ") as caught:
            read(AzureFunctions2021(path=write(HEADER_2021 + "a,f,1,1\n" + row + "\n")))
        assert "\n" not in str(caught.value)

    def test_empty(self, write: Write) -> None:
        for content in ("", HEADER_2021):
            with pytest.raises(TraceError, match=r"trace.csv: "):
                read(AzureFunctions2021(path=write(content)))


RATES = "0,2.0,0.5,Gamma,4.0,0.1\n600,0.0,0.0,,,\n1200,1.0,2.0,Weibull,0.5,0.9\n"
LENGTHS = {
    "0": {"input_tokens": "{10: 0.5, 20: 0.5}", "output_tokens": "{0: 1.0}"},
    "600": {"input_tokens": "{}", "output_tokens": "{}"},
    "1200": {"input_tokens": "{7: 3e-1}", "output_tokens": "{9.0: 1}"},
}


def clients(folder: Path, *tables: tuple[str, Any]) -> str:
    for number, (rates, lengths) in enumerate(tables):
        (folder / f"chunk-{number}-trace.csv").write_text(rates)
        (folder / f"chunk-{number}-dataset.json").write_text(lengths if isinstance(lengths, str) else json.dumps(lengths))
    return str(folder)


class TestServeGen:
    def test_rates_burstiness_and_lengths_by_window(self, tmp_path: Path) -> None:
        found = read(ServeGenClients(path=clients(tmp_path, (RATES, LENGTHS))))
        early, late = ([r for r in found if low <= r.arrival_s < low + 600] for low in (0, 1200))
        assert len(early) + len(late) == len(found)
        assert 1100 < len(early) < 1300
        assert 400 < len(late) < 850
        assert Counter(r.prompt_tokens for r in late) == {7: len(late)}
        assert {r.output_tokens for r in early} == {1}, "a request has at least one token"
        assert 0.4 < sum(r.prompt_tokens == 10 for r in early) / len(early) < 0.6
        variation = [np.std(gaps) / np.mean(gaps) for gaps in (np.diff([r.arrival_s for r in part]) for part in (early, late))]
        assert variation == pytest.approx([0.5, 2.0], rel=0.25)

    def test_the_busiest_clients_keep_their_requests(self, tmp_path: Path) -> None:
        path = clients(tmp_path, ("0,0.1,1\n", LENGTHS), ("0,2,1\n", LENGTHS), ("0,0,1\n", LENGTHS))
        everyone = read(ServeGenClients(path=path), "a", "b", "c")
        assert {r.session for r in everyone} == {"client 0", "client 1"}
        assert len({(r.session, r.model) for r in everyone}) == 2
        busiest = read(ServeGenClients(path=path, clients=1), "a")
        assert [r.arrival_s for r in busiest] == [r.arrival_s for r in everyone if r.session == "client 1"]

    def test_window(self, tmp_path: Path) -> None:
        path = clients(tmp_path, (RATES, LENGTHS))
        found = read(ServeGenClients(path=path, start_s=1300.0, duration_s=100.0))
        assert 40 < len(found) < 220
        assert all(0 <= r.arrival_s < 100 and r.prompt_tokens == 7 for r in found)
        assert read(ServeGenClients(path=path, start_s=9999.0)) == []

    @pytest.mark.parametrize(
        ("rates", "lengths", "complaint"),
        [
            ("0,1\n", LENGTHS, r"chunk-0-trace.csv:1: 2 fields"),
            ("0,1,1\n5,x,1\n", LENGTHS, r"chunk-0-trace.csv:2: rate must be a number"),
            ("0,1,1\n", "[", r"chunk-0-dataset.json: "),
            (
                "0,1,1\n",
                {"0": {"input_tokens": "{1: 2", "output_tokens": "{1: 1}"}},
                r"dataset.json: window '0': input_tokens must",
            ),
            ("0,1,1\n", {"0": {"input_tokens": "{1: -2}", "output_tokens": "{1: 1}"}}, "input_tokens must be a dictionary"),
            ("0,1,1\n", {"0": {"input_tokens": "{}", "output_tokens": "{1: 1}"}}, "no window has input_tokens and output_tokens"),
            ("0,1,1\n", {"x": {"input_tokens": "{1: 1}", "output_tokens": "{1: 1}"}}, "the start of a window must be a number"),
            ("0,1e18,1\n", LENGTHS, "max_events"),
        ],
    )
    def test_bad_tables(self, tmp_path: Path, rates: str, lengths: Any, complaint: str) -> None:
        workload = ServeGenClients(path=clients(tmp_path, (rates, lengths)))
        with pytest.raises(UserError, match=complaint) as caught:
            workload.load(models=["m"], seed=0, max_requests=10**6)
        assert "\n" not in str(caught.value)

    def test_folders_that_hold_none(self, tmp_path: Path) -> None:
        for path, complaint in ((tmp_path, "no chunk-N-trace.csv there"), (tmp_path / "x", "must be a folder of client tables")):
            with pytest.raises(TraceError, match=complaint):
                read(ServeGenClients(path=str(path)))
        (tmp_path / "chunk-3-trace.csv").write_text("0,1,1\n")
        with pytest.raises(TraceError, match=r"chunk-3-dataset.json: no such file"):
            read(ServeGenClients(path=str(tmp_path)))


@pytest.mark.parametrize("kind", [AzureFunctions2019, AzureFunctions2021, ServeGenClients])
def test_a_path_is_needed(kind: type[ShapedWorkload]) -> None:
    with pytest.raises(UserError, match=r"set workload.path=FILE"):
        kind()
