"""What saving says where it fails."""

import logging
import sys

import pytest
from absl import logging as absl_logging

import sana_jax.training.checkpoints.manager  # noqa: F401


@pytest.mark.parametrize("path, kept", [("/x/orbax/future.py", False), ("/x/y.py", True)])
def test_threads_of_orbax_say_what_failed_without_tracebacks(path, kept):
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        found = logging.LogRecord("absl", logging.ERROR, path, 1, "failed", (), sys.exc_info())
    assert absl_logging.get_absl_logger().filter(found)
    assert bool(found.exc_info) is kept
