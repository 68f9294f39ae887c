"""Bookkeeping of the model copies in host memory, for the control plane. It moves no bytes."""

from lambdascale.memory.base import HostMemory, HostMemoryConfig
from lambdascale.memory.host_cache import HostCacheConfig, HostCaches

__all__ = ["HostCacheConfig", "HostCaches", "HostMemory", "HostMemoryConfig"]
