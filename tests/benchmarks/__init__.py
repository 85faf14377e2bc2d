"""Measurements beside the tests: the folders' README files have their figures, pytest does not run them."""
