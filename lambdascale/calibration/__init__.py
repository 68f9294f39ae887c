"""Measurement of a node (memory, links, loads, prefill, decode), written as a configuration that the simulator reads as it is."""
