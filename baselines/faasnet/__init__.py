"""FaaSNet (Wang et al., USENIX ATC'21): provisioning over function trees."""

from baselines.faasnet.planner import BalancedTree, PrototypeTree

__all__ = ["BalancedTree", "PrototypeTree"]
