"""The controller process: the live backend, the channel to the agents, membership, and launchers of node processes."""
