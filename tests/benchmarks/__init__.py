"""Measurements beside the tests: README has their figures, pytest does not run them."""
