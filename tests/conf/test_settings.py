"""Settings: what a class of the configuration can be set to stands in some file of conf/, where users look for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from lambdascale.experiments.compose import conf_dir

EXCEPTIONS = {
    # Chosen by a group of conf/, and so by a file's list of defaults.
    "lambdascale.control.SystemConfig": {"batching"},
    "lambdascale.sim.SimConfig": {"pool"},
    # Left out so that NoPipelines can take its place by the target alone, as the ablations do.
    "lambdascale.pipelines.ComplementaryPipelines": {"form", "max_stages", "switch"},
}


def configured(value: Any) -> Iterator[dict[str, Any]]:
    """Mappings with a ``_target_`` in a file, nested ones included."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from configured(part)


def settings() -> dict[str, set[str]]:
    """Keys set anywhere in conf/, by target."""
    found: dict[str, set[str]] = {}
    for path in sorted(conf_dir().rglob("*.yaml")):
        for mapping in configured(OmegaConf.to_container(OmegaConf.load(path), resolve=False)):
            if str(mapping["_target_"]).startswith(("lambdascale.", "baselines.")):
                found.setdefault(mapping["_target_"], set()).update(mapping)
    return found


@pytest.mark.parametrize(("target", "keys"), settings().items(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_setting_stands_in_a_file(target: str, keys: set[str]) -> None:
    fields = {field.name for field in dataclasses.fields(get_class(target))}
    assert fields - keys == EXCEPTIONS.get(target, set())
