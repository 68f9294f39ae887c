"""Exploration: the unchanged control plane in simulation under faults drawn from a seed, with invariants after every event."""
