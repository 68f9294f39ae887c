"""A node process: agent, block mover, compute thread, stage runners and collectives."""
