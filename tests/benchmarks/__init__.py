"""Measurements beside the tests. pytest does not run them; README.md files have their figures."""
