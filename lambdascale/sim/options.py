"""Behaviour of the simulated data plane: its switches and their costs, with sources."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lambdascale.core.checks import check_types, require
from lambdascale.core.units import parse_rate
from lambdascale.sim.communicator import draw_setup_s


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """Behaviour of the simulated data plane.

    ``barrier``: rounds wait for each other, with ``barrier_s`` between them, as under the prototype's controller (about
    6 ms a round, reference section 4); otherwise every edge goes ahead as soon as it can. ``communicator_setup``: a
    collective first builds its communicator; ``communicator_outlier_probability`` of these take 18 to 120 s (off by default: the
    reference saw them but gives no frequency). ``chunk_bytes``: the pieces a streaming broadcast forwards.

    ``packed``: a block is one buffer and one transfer; otherwise each of its tensors (``tensors_per_layer``) is one, and costs
    ``tensor_overhead_s`` besides its bytes. ``preallocated``: buffers are allocated and registered ahead; otherwise a receiver
    makes each block's when its turn comes: ``allocation_s``, and registering at ``registration_bytes_per_s``. Both concern
    multicasts over RDMA only.

    ``host_source_bytes_per_s``: rate at which a NIC reads host memory, of a source that sends from there, by a way that the
    node's own loads do not use; None: by the PCIe of the GPU, which they share.

    ``one_sided_slowdown``: factor by which iterations take longer on a node while it has a part in a one-sided multicast with its
    GPU's memory, which NICs read and write meanwhile (sources in host memory have none). ``collective_slowdown``: the same for
    the sources of a collective, whose kernels hold some of the GPU's multiprocessors; None: they compute nothing meanwhile, as
    in the prototype.

    ``broadcast_s``: seconds that a collective takes from start to end with 2, 3, ... ranks (more ranks take as long as the last),
    without set-up, traffic or occupied GPUs: the sleeps of the prototype's script; empty: it is transferred.
    """

    barrier: bool = False
    barrier_s: float = 0.006
    communicator_setup: bool = True
    communicator_outlier_probability: float = 0.0
    chunk_bytes: int = 4 << 20
    packed: bool = True
    tensors_per_layer: int = 9
    tensor_overhead_s: float = 100e-6
    preallocated: bool = True
    allocation_s: float = 0.3e-3
    registration_bytes_per_s: float = 30e9
    host_source_bytes_per_s: float | str | None = None
    one_sided_slowdown: float = 1.0
    collective_slowdown: float | None = None
    broadcast_s: tuple[float, ...] = ()
    record_grants: bool = False

    def __post_init__(self) -> None:
        """Validate; a rate may be written with its unit."""
        check_types(self)
        if self.host_source_bytes_per_s is not None:
            object.__setattr__(self, "host_source_bytes_per_s", parse_rate(self.host_source_bytes_per_s))
            require(
                float(self.host_source_bytes_per_s) > 0,
                f"transfers.host_source_bytes_per_s must be positive, not {self.host_source_bytes_per_s}",
            )
        for name in ("barrier_s", "tensor_overhead_s", "allocation_s"):
            value = getattr(self, name)
            require(value >= 0, f"transfers.{name} must not be negative, not {value}")
        for name in ("chunk_bytes", "tensors_per_layer", "registration_bytes_per_s"):
            value = getattr(self, name)
            require(value > 0, f"transfers.{name} must be positive, not {value}")
        require(
            all(seconds > 0 for seconds in self.broadcast_s),
            f"transfers.broadcast_s takes positive seconds, not {list(self.broadcast_s)}",
        )
        for name in ("one_sided_slowdown", "collective_slowdown"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"transfers.{name} must be at least 1, not {value}")
        probability = self.communicator_outlier_probability
        require(0 <= probability <= 1, f"transfers.communicator_outlier_probability must be in [0, 1], not {probability}")

    @property
    def slows(self) -> bool:
        """True if iterations may take longer because of a multicast."""
        return self.one_sided_slowdown > 1 or self.collective_slowdown is not None

    @property
    def draws_setups(self) -> bool:
        """True if a collective takes a drawn time to build its communicator."""
        return self.communicator_setup and not self.broadcast_s

    def draw_setup_s(self, ranks: int, rng: np.random.Generator) -> float:
        """Draw the seconds that it takes to build a communicator of so many ranks; 0 without set-ups."""
        return draw_setup_s(ranks, rng, self.communicator_outlier_probability) if self.communicator_setup else 0.0

    def slept_s(self, ranks: int) -> float | None:
        """Seconds that a collective of so many ranks takes as a sleep; None if it is a transfer."""
        return self.broadcast_s[min(ranks - 2, len(self.broadcast_s) - 1)] if self.broadcast_s else None

    def block_overhead_s(self, size_bytes: float, layers: float) -> float:
        """Seconds that a block of so many bytes and layers costs beyond one packed transfer into a registered buffer."""
        tensors = 0.0 if self.packed else self.tensors_per_layer * layers * self.tensor_overhead_s
        buffers = 0.0 if self.preallocated else self.allocation_s + size_bytes / self.registration_bytes_per_s
        return tensors + buffers
