"""Quire beside other programs for CPUs, each in an environment of its own; the command is `benchmarks/cpu_peers.py`."""
