"""Measuring a node: memory, links, loads, prefill and decode, written as a cluster configuration the simulator takes as it is."""
