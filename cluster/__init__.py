"""Slipstream on Ray: configuration, placement of processes, routing, the command line."""
