"""Jobs of sweeps and studies: a run each, whose failure is an outcome, so that the others continue."""

from __future__ import annotations

import os

from omegaconf import DictConfig

from lambdascale.experiments.mistakes import internal_error, user_message
from lambdascale.experiments.outcomes import Outcome
from lambdascale.experiments.runner import run
from lambdascale.experiments.search import objective_value


def attempt(config: DictConfig, outcome: Outcome, group: str) -> Outcome:
    """Run ``config`` as part of the sweep ``group``, and complete ``outcome`` with its folder or its error."""
    try:
        result = run(config, group=group)
        outcome.folder, outcome.reused = str(result.folder), result.reused
        if config.objective is not None:
            outcome.objective, outcome.value = config.objective, objective_value(config.objective, result.summary)
    except Exception as error:
        failed(outcome, error)
    return outcome


def failed(outcome: Outcome, error: Exception) -> None:
    """Write an error into ``outcome``: status 2 for a user's mistake, else 1; with LAMBDASCALE_DEBUG, ours is raised."""
    message = user_message(error)
    if message is None and os.environ.get("LAMBDASCALE_DEBUG"):
        raise error
    outcome.error = message or internal_error(error)
    outcome.status = 2 if message else 1
