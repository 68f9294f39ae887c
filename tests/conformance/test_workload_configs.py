"""Every conf/workload/*.yaml spells out the defaults of its class and yields requests by the contract."""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra.utils
import pandas as pd
import pytest
from omegaconf import OmegaConf

from lambdascale import workload as package
from lambdascale.core import TracedRequest, UserError
from lambdascale.workload import ShapedWorkload

CONF = Path(__file__).resolve().parents[2] / "conf" / "workload"
# Those with defaults only name a trace for another one; tests/conf runs them.
NAMES = sorted(path.stem for path in CONF.glob("*.yaml") if "defaults" not in OmegaConf.load(path))
SAMPLES = {
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
    "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n",
    "mooncake": '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46]}\n',
    "timed_trace": '{"timestamp": 0.5, "input_length": 6955, "output_length": 52}\n',
    "arrivals": "0.0\n0.36\n",
    "functions_2019": ",".join(["HashOwner", "HashApp", "HashFunction", "Trigger", *map(str, range(1, 1441))])
    + "".join(f"\no,a,f{at},http" + ",1" * 1440 for at in (1, 2)),
    "functions_2021": "app,func,end_timestamp,duration\na,f,10.5,0.5\na,g,12.0,0.25\n",
    "rate_series": "5\n0\n",
}
RECORDED = {"arrival_s": [1.0], "model": ["a"], "prompt_tokens": [5], "output_tokens": [7], "status": ["ok"], "max_tokens": [9]}


def config(name: str, tmp_path: Path) -> dict[str, Any]:
    loaded = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(loaded, dict)
    if name == "run":
        pd.DataFrame(RECORDED).to_parquet(tmp_path / "requests.parquet")
        loaded["path"] = str(tmp_path)
    if name == "servegen":
        (tmp_path / "chunk-1-trace.csv").write_text("0,1.0,1.0,Gamma,1.0,1.0\n")
        (tmp_path / "chunk-1-dataset.json").write_text('{"0": {"input_tokens": "{9: 1.0}", "output_tokens": "{5: 1.0}"}}')
        loaded["path"] = str(tmp_path)
    if name in SAMPLES:
        (tmp_path / "sample").write_text(SAMPLES[name])
        loaded["path"] = str(tmp_path / "sample")
    return {str(key): value for key, value in loaded.items()}


def test_the_names_that_scripts_rely_on_are_there() -> None:
    assert {"bursty", "azure", "burstgpt", "arrivals", "mooncake", "rate_series", "burst", "constant"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_spells_out_every_field_with_its_default(name: str, tmp_path: Path) -> None:
    loaded = config(name, tmp_path)
    cls = getattr(package, loaded.pop("_target_").rsplit(".", 1)[-1])
    loaded.pop("path", None)
    assert loaded == {field.name: field.default for field in fields(cls) if field.name != "path"}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_yields_requests(name: str, tmp_path: Path) -> None:
    workload = hydra.utils.instantiate(config(name, tmp_path))
    assert isinstance(workload, ShapedWorkload)
    requests = workload.requests(models=["a", "b"], seed=7)
    assert len(requests) > 0
    assert all(isinstance(r, TracedRequest) for r in requests)
    assert [r.request_id for r in requests] == list(range(len(requests)))
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(requests))
    assert requests == workload.requests(models=["a", "b"], seed=7)


@pytest.mark.parametrize("name", [*sorted(SAMPLES), "run", "servegen"])
def test_a_reader_without_a_file_says_what_to_set(name: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"workload\.path=FILE") as caught:
        hydra.utils.instantiate({**config(name, tmp_path), "path": None})
    assert isinstance(caught.value.__cause__, UserError)


@pytest.mark.parametrize("name", ["bursty", "constant", "burst", "rate_series"])
def test_a_generator_has_other_arrivals_for_another_seed(name: str, tmp_path: Path) -> None:
    workload = hydra.utils.instantiate({**config(name, tmp_path), **({"spread_s": 1.0} if name == "burst" else {})})
    first, second = ([r.arrival_s for r in workload.requests(models=["a"], seed=seed)] for seed in (1, 2))
    assert first != second
