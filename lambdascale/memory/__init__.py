"""Who holds what in host memory: pure bookkeeping that the control plane asks. It moves no bytes."""

from lambdascale.memory.base import HostMemory, HostMemoryConfig
from lambdascale.memory.host_cache import HostCacheConfig, HostCaches

__all__ = ["HostCacheConfig", "HostCaches", "HostMemory", "HostMemoryConfig"]
