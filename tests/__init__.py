"""The tests, in the tree of what they test."""

PATIENCE = 300  # seconds to wait for what takes a few: a busy machine is slow, a hang is longer
