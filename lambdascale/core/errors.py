"""Errors a user can cause. They end a command with status 2 and one line; anything else is a fault of ours."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user asked for; the message names the offending value and is one line long."""


class PlanError(UserError):
    """A multicast plan that cannot be made as asked, or one that breaks the rules of a valid plan."""


class TraceError(UserError):
    """A workload file that cannot be read; the message names file and line."""


class CapacityError(UserError):
    """A model or a memory budget that does not fit the machine it is meant for."""


class IncompleteRunError(RuntimeError):
    """A run that ended with requests unaccounted for: completed + failed != submitted. Always a fault of ours."""
