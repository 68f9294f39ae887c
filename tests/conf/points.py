"""The runs of a study, point by point."""

from __future__ import annotations

from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser

from lambdascale.experiments.study import Study, command_lines


def points(study: Study, experiment: str) -> list[list[str]]:
    """Overrides of every run of a study's grids, without the experiment and the launcher."""
    own = [f"experiment={experiment}", "hydra/launcher=basic"]
    return [point for line in command_lines(study, own) for point in combinations(line[len(own) :])]


def combinations(line: list[str]) -> list[list[str]]:
    """Overrides of every run of a sweep's command line."""
    parsed = OverridesParser.create().parse_overrides(line)
    values = [list(o.sweep_string_iterator()) if o.is_sweep_override() else [o.get_value_element_as_str()] for o in parsed]
    keys = [o.input_line.partition("=")[0] for o in parsed]
    return [[f"{key}={value}" for key, value in zip(keys, chosen, strict=True)] for chosen in product(*values)]
