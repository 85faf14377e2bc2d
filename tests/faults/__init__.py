"""Injects random faults into short trainings and batch runs: `python -m tests.faults --help`."""
