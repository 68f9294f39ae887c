"""Constants of verbs, from the module that older pyverbs or newer pyverbs (such as PyPI's) keep them in."""

from __future__ import annotations

try:
    from pyverbs import enums
except ImportError:
    from pyverbs import libibverbs_enums as enums

__all__ = ["enums"]
