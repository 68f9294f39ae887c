"""The start of a serving process on a node, before weights can come: its constants, whose sources stand in conf/cluster."""

from __future__ import annotations

from dataclasses import dataclass

from lambdascale.core.checks import check_types, require
from lambdascale.core.units import parse_rate


@dataclass(frozen=True, kw_only=True)
class ProcessStart:
    """Seconds of the parts of a process's start, in their order (as a live node starts, lambdascale/live/node/agent.py).

    ``process_s``: a new process, its interpreter and libraries. ``context_s``: the context of its GPU. Two parts follow beside
    each other. ``kernels_s``: kernels are loaded and buffers made. ``registration_bytes_per_s``: the weights' memory is
    populated and registered, at this rate; None: weights need no memory of their own on the host. Weights come only then.
    ``first_iteration_s``: the time by which the first iteration of the process is longer than later ones.
    """

    process_s: float
    context_s: float
    kernels_s: float
    registration_bytes_per_s: float | str | None
    first_iteration_s: float

    def __post_init__(self) -> None:
        """Normalise the rate and validate."""
        check_types(self)
        for name in ("process_s", "context_s", "kernels_s", "first_iteration_s"):
            value = getattr(self, name)
            require(value >= 0, f"cluster.start.{name} must not be negative, not {value!r}")
        if self.registration_bytes_per_s is not None:
            rate = parse_rate(self.registration_bytes_per_s)
            require(rate > 0, f"cluster.start.registration_bytes_per_s must be positive, not {rate!r}")
            object.__setattr__(self, "registration_bytes_per_s", rate)

    def ready_s(self, weight_bytes: int) -> float:
        """Return the seconds until a process for a model of so many bytes can take its weights."""
        rate = self.registration_bytes_per_s
        registration_s = 0.0 if rate is None else weight_bytes / float(rate)
        return self.process_s + self.context_s + max(self.kernels_s, registration_s)
