"""The runs of a study, point by point."""

from __future__ import annotations

from lambdascale.experiments.study import Study, command_lines, expand


def points(study: Study, experiment: str) -> list[list[str]]:
    """Overrides of every run of a study's grids, without the experiment."""
    return [list(run[1:]) for line in command_lines(study, [f"experiment={experiment}"]) for run in expand(line)]
