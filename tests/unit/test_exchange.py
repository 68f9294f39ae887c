"""Exchange with other harnesses: what a run becomes in their formats, what comes back, and files that they wrote themselves.

``tests/data/aiperf_*.jsonl`` were written by AIPerf 0.13.0 against ``lambdascale serve``: eight streams of SmolLM2, and four of
the tiny model, two of which were longer than its context. The summary beside the first is AIPerf's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lambdascale.cli.main import main
from lambdascale.core import UserError
from lambdascale.exchange import FORMATS, Results, read_results
from lambdascale.exchange.results import results_of
from lambdascale.exchange.vllm_bench import document

DATA = Path(__file__).resolve().parents[1] / "data"
ENDINGS = {"vllm-bench": ".json", "aiperf": ".jsonl", "csv": ".csv"}


def row(number: int, arrival: float, first: float, gaps: list[float] | None, tokens: int | None = None) -> dict[str, Any]:
    count = len(gaps) + 1 if gaps is not None else tokens or 1
    end = arrival + first + (sum(gaps) if gaps is not None else 0.5)
    return {
        "request_id": number,
        "model": "m",
        "arrival_s": arrival,
        "prompt_tokens": 10 + number,
        "output_tokens": count,
        "ttft_s": first,
        "tpot_s": (end - arrival - first) / (count - 1) if count > 1 else None,
        "e2e_s": end - arrival,
        "itl_s": gaps,
        "status": "ok",
        "failure": None,
    }


def failed(number: int, arrival: float, reason: str = "no node") -> dict[str, Any]:
    return {"request_id": number, "model": "m", "arrival_s": arrival, "prompt_tokens": 7, "status": "failed", "failure": reason}


def results(*rows: dict[str, Any], **summary: Any) -> Results:
    return results_of(pd.DataFrame(list(rows)), {"backend": "sim", "system": "s", **summary})


MIXED = (row(0, 0.0, 0.25, [0.125, 0.25]), row(1, 0.5, 1.0, []), failed(2, 0.75), row(3, 2.0, 0.5, [0.5, 0.5, 1.0]))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gaps", [True, False], ids=["gaps", "no gaps"])
def test_what_was_written_comes_back(name: str, gaps: bool, tmp_path: Path) -> None:
    """Everything that all formats carry, to a nanosecond; without token times, TPOT and latency come back all the same."""
    given = results(*(each if gaps else {**each, "itl_s": None} for each in MIXED))
    file = tmp_path / f"file{ENDINGS[name]}"
    file.write_text(FORMATS[name].text(given))
    back = read_results(file).requests
    known = ["request_id", "arrival_s", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s", "e2e_s", "status", "failure"]
    known = [column for column in known if name != "aiperf" or column != "prompt_tokens"]  # AIPerf has no tokens of failed ones
    pd.testing.assert_frame_equal(back[known], given.requests[known], check_dtype=False, atol=1e-9, rtol=0)
    for before, after in zip(given.requests.itl_s, back.itl_s, strict=True):
        assert (after or []) == pytest.approx(before or [])


def test_vllm_keys_and_definitions() -> None:
    found = document(results(*MIXED, slo={"goodput_requests_per_s": 0.4}))
    assert (found["completed"], found["failed"], found["num_prompts"]) == (3, 1, 4)
    assert found["duration"] == 4.5
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (10 + 11 + 13, 8)
    assert found["request_throughput"] == pytest.approx(3 / 4.5)
    assert found["total_token_throughput"] == pytest.approx(42 / 4.5)
    assert found["request_goodput"] == 0.4
    assert found["output_lens"] == [3, 1, 0, 4]
    assert found["ttfts"] == [0.25, 1.0, 0.0, 0.5]
    assert found["itls"] == [[0.125, 0.25], [], [], [0.5, 0.5, 1.0]]
    assert found["errors"] == ["", "", "no node", ""]
    assert found["median_ttft_ms"] == 500
    assert found["mean_tpot_ms"] == pytest.approx(1000 * (0.1875 + 2 / 3) / 2)  # answers of one token have none
    assert found["p50_itl_ms"] == 500
    assert found["std_ttft_ms"] == pytest.approx(np.std([250, 1000, 500]))
    assert found["p99_e2el_ms"] == pytest.approx(np.percentile([625, 1000, 2500], 99))
    assert found["request_rate"] == 2.0
    assert (found["max_concurrent_requests"], found["max_output_tokens_per_s"]) == (2, 3)


def test_unknown_token_times_are_left_out() -> None:
    found = document(results({**MIXED[0], "itl_s": None}))
    assert not [key for key in found if "itl" in key or key == "max_output_tokens_per_s"]


def test_a_run_without_answers() -> None:
    found = document(results(failed(0, 0.0)))
    assert (found["completed"], found["request_throughput"], found["mean_ttft_ms"]) == (0, 0, 0)
    assert found["request_rate"] == "inf"


def test_files_of_aiperf_are_read_as_aiperf_reads_them() -> None:
    """Percentiles of what is read are those that AIPerf printed."""
    found = read_results(DATA / "aiperf_smollm2.jsonl").completed
    ours = {"time_to_first_token": found.ttft_s, "inter_token_latency": found.tpot_s, "request_latency": found.e2e_s}
    ours["inter_chunk_latency"] = pd.Series([gap for gaps in found.itl_s for gap in gaps])
    theirs = json.loads((DATA / "aiperf_smollm2.summary.json").read_text())
    for name, values in ours.items():
        assert theirs[name]["unit"] == "ms"
        assert 1000 * values.mean() == pytest.approx(theirs[name]["avg"], rel=1e-6)
        for level in (50, 90, 95, 99):
            assert 1000 * np.percentile(values, level) == pytest.approx(theirs[name][f"p{level}"], rel=1e-6)


def test_failed_requests_of_aiperf_and_chunks_of_several_tokens() -> None:
    found = read_results(DATA / "aiperf_tiny.jsonl").requests
    assert found.status.tolist() == ["ok", "ok", "failed", "failed"]
    assert "maximum context length" in found.failure.iloc[-1]
    assert found.output_tokens.iloc[0] == 12
    assert found.itl_s.iloc[0] is None  # its chunks had several tokens


def test_our_records_have_the_structure_of_aiperfs() -> None:
    """Every key of ours is one of AIPerf's, with its unit; no key that AIPerf requires of a record is missing."""
    theirs = [json.loads(line) for file in sorted(DATA.glob("aiperf_*.jsonl")) for line in file.read_text().splitlines()]
    units = {name: metric["unit"] for record in theirs for name, metric in record["metrics"].items()}
    metadata = {key for record in theirs for key in record["metadata"]}
    required = {"session_num", "request_start_ns", "request_end_ns", "worker_id", "record_processor_id", "benchmark_phase"}
    errors = [record["error"] for record in theirs if "error" in record]
    for line in FORMATS["aiperf"].text(results(*MIXED)).splitlines():
        record = json.loads(line)
        assert required <= set(record["metadata"]) <= metadata
        assert {name: metric["unit"] for name, metric in record["metrics"].items()}.items() <= units.items()
        assert set(record.get("error", {})) <= set(errors[0])


BROKEN = {
    "empty.jsonl": ("", "no record"),
    "other.jsonl": ('{"a": 1}\n', "not a record of AIPerf"),
    "half.jsonl": ('{"metadata": {"session_num"', "not a record of AIPerf"),
    "whole.json": ("[]", "no JSON object"),
    "plain.json": ('{"duration": 1}', "it lacks input_lens"),
    "uneven.json": (
        json.dumps({"input_lens": [1], "output_lens": [1], "ttfts": [1], "start_times": [], "errors": [""], "itls": [[]]}),
        "start_times must have an entry",
    ),
    "words.json": (
        json.dumps({"input_lens": [1], "output_lens": [1], "ttfts": ["x"], "start_times": [0], "errors": [""], "itls": [[]]}),
        "no number",
    ),
    "columns.csv": ("a,b\n1,2\n", "lacks the columns"),
    "file.txt": ("", "neither a run's folder nor a file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_of_another_form_is_one_line(name: str, tmp_path: Path) -> None:
    text, says = BROKEN[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        read_results(tmp_path / name)


class TestCommand:
    """The command as a user runs it."""

    def test_of_a_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "bench.json"
        assert main(["export", str(DATA / "aiperf_smollm2.jsonl"), "--format", "vllm-bench", "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"wrote {out}: 8 requests (aiperf)\n"
        assert json.loads(out.read_text())["completed"] == 8

    def test_to_standard_output(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["export", str(DATA / "aiperf_tiny.jsonl"), "--format", "csv"]) == 0
        out, error = capsys.readouterr()
        assert out.startswith("request_id,model,arrival_s")
        assert error == "the gaps between tokens are left out: not all are known (runs with token_times=true keep them)\n"

    @pytest.mark.parametrize(
        ("place", "says"), [("nowhere", "does not exist"), (".", "is not the folder of a finished run")], ids=["missing", "empty"]
    )
    def test_of_no_run(
        self, place: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["export", place, "--format", "csv", "--out", "file.csv"]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
        assert not list(tmp_path.iterdir())

    def test_of_an_unknown_format(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["export", str(DATA / "aiperf_tiny.jsonl"), "--format", "xml"])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_to_a_place_that_cannot_be_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "missing" / "file.csv"
        assert main(["export", str(DATA / "aiperf_tiny.jsonl"), "--format", "csv", "--out", str(out)]) == 2
        assert "cannot write" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
