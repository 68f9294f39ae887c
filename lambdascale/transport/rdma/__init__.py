"""The RDMA transport. Importing this package does not need verbs; ``load`` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lambdascale.core import UserError
from lambdascale.transport.rdma.options import RdmaOptions

if TYPE_CHECKING:
    from lambdascale.transport.rdma.endpoint import RdmaEndpoint

__all__ = ["RdmaOptions", "load"]

NO_PYVERBS = (
    "the rdma transport needs pyverbs: the distribution's python3-pyverbs where rdma-core is older than PyPI's pyverbs, "
    "else pip install 'lambdascale[rdma]' (docs/hardware.md; 'lambdascale doctor --rdma' tells what is present)"
)


def load() -> type[RdmaEndpoint]:
    """Import and return the endpoint's class; UserError if pyverbs is missing or fails to load."""
    try:
        from lambdascale.transport.rdma.endpoint import RdmaEndpoint
    except ImportError as error:
        if (error.name or "").startswith("lambdascale"):
            raise
        raise UserError(f"{NO_PYVERBS}: {error}") from error
    return RdmaEndpoint
