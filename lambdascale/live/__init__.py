"""The live cluster: real node processes behind the control plane's Backend protocol.

The controller process runs the control plane; every node is a process of its own (an agent) that holds weights, moves blocks and
computes. Commands and events are the simulator's, as messages. Nothing here decides what a cluster should do.
"""
