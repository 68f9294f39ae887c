"""Errors a user can cause, which end a command with status 2 and one line. Any other error is a fault in this package."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake; the message is one line and names the offending value."""


class PlanError(UserError):
    """A multicast plan that is impossible as requested, or that breaks the rules of a valid plan."""


class TraceError(UserError):
    """An unreadable or malformed workload file; the message names file and line."""


class CapacityError(UserError):
    """A model or a memory budget that does not fit its machine."""


class IncompleteRunError(RuntimeError):
    """A run that ended with requests unaccounted for: completed + failed != submitted. Always a fault in this package."""
