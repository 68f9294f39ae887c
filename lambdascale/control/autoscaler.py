"""Autoscaling policies, and the default one for every system: replicas in proportion to queued and running requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lambdascale.core.checks import check_types, require


@runtime_checkable
class AutoscalingPolicy(Protocol):
    """Decides how many replicas a model is to have. Pure; asked every ``interval_s`` seconds while requests are open.

    ``min_replicas`` are in place when the run starts. Replicas that were too many for ``keep_alive_s`` seconds are drained and
    released (see ScaleIn); for that, more requests never want fewer replicas.
    """

    @property
    def interval_s(self) -> float:
        """Seconds between two evaluations."""
        ...

    @property
    def keep_alive_s(self) -> float:
        """Seconds for which a surplus replica is kept."""
        ...

    @property
    def min_replicas(self) -> int:
        """Number of replicas that are always kept."""
        ...

    @property
    def fixed(self) -> bool:
        """True if the number of replicas never changes."""
        ...

    @property
    def in_turn(self) -> bool:
        """True if a model's replicas stay as they are while one of its transfers is under way."""
        ...

    def desired(self, queued: int, running: int) -> int:
        """Return the replicas wanted for ``queued`` + ``running`` requests of one model."""
        ...


@dataclass(frozen=True, kw_only=True)
class Autoscaler:
    """Desired replicas = ceil((queued + running) / target_per_replica), within [min_replicas, max_replicas].

    Asked every ``interval_s`` while requests are open. Replicas beyond the largest number desired in the last ``keep_alive_s``
    get no new requests and are released when they are empty. ``min_replicas`` are in place when the run starts; 0 is allowed.
    ``max_replicas`` None: the cluster's size.
    """

    target_per_replica: int = 4
    interval_s: float = 0.1
    keep_alive_s: float = 1.0
    min_replicas: int = 1
    max_replicas: int | None = None

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(self.target_per_replica >= 1, f"autoscaler.target_per_replica must be at least 1, not {self.target_per_replica}")
        require(self.interval_s > 0, f"autoscaler.interval_s must be positive, not {self.interval_s}")
        require(self.keep_alive_s >= 0, f"autoscaler.keep_alive_s must not be negative, not {self.keep_alive_s}")
        require(self.min_replicas >= 0, f"autoscaler.min_replicas must not be negative, not {self.min_replicas}")
        require(
            self.max_replicas is None or self.max_replicas >= max(1, self.min_replicas),
            f"autoscaler.max_replicas ({self.max_replicas}) must be at least 1 and at least min_replicas ({self.min_replicas})",
        )

    @property
    def fixed(self) -> bool:
        """True if the number of replicas never changes."""
        return self.max_replicas == self.min_replicas

    @property
    def in_turn(self) -> bool:
        """False: scale-outs overlap."""
        return False

    def desired(self, queued: int, running: int) -> int:
        """Return the replicas wanted for ``queued`` + ``running`` requests of one model."""
        wanted, most = -(-(queued + running) // self.target_per_replica), self.max_replicas
        if wanted < self.min_replicas:
            wanted = self.min_replicas
        return wanted if most is None or wanted < most else most


@dataclass(frozen=True, kw_only=True)
class PlannedAutoscaler(Autoscaler):
    """An Autoscaler that wants at least ``burst_replicas`` replicas while requests wait, whatever their number.

    A bound of what the prototype's plans do (reference, section 4): these are for fixed rates and a run's first scale-outs.
    """

    burst_replicas: int = 12

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        require(self.burst_replicas >= 1, f"autoscaler.burst_replicas must be at least 1, not {self.burst_replicas}")

    def desired(self, queued: int, running: int) -> int:
        """See AutoscalingPolicy."""
        wanted = max(super().desired(queued, running), self.burst_replicas if queued else 0)
        return wanted if self.max_replicas is None else min(wanted, self.max_replicas)


@dataclass(frozen=True, kw_only=True)
class TurnAutoscaler(Autoscaler):
    """The rule of the prototype's controller: no scale-out begins, and nothing is released, before the last one has ended.

    It adds floor(queued / target_per_replica) replicas to those in use, where target_per_replica is the number of requests that
    a node runs at once: the authors' controller.py (github.com/lambda-scale/lambda-scale) divides the queue by a node's GPUs.
    Where nothing is in use, requests that wait get a replica however few they are: nothing else would ever serve them.
    """

    @property
    def in_turn(self) -> bool:
        """True."""
        return True

    def desired(self, queued: int, running: int) -> int:
        """See AutoscalingPolicy."""
        used = -(-running // self.target_per_replica)
        wanted = max(used + queued // self.target_per_replica, self.min_replicas, int(queued > 0))
        return wanted if self.max_replicas is None else min(wanted, self.max_replicas)
