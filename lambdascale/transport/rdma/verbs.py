"""The verbs' numbers: newer pyverbs, PyPI's among them, have another name for the module that they are in."""

from __future__ import annotations

try:
    from pyverbs import enums
except ImportError:
    from pyverbs import libibverbs_enums as enums

__all__ = ["enums"]
