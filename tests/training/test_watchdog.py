"""A run that hangs is ended with the stacks of its threads; one that lives or ended is not."""

import re
import subprocess
import sys
import time

from sana_jax.training.watchdog import Watchdog

WATCHED = """
import time
from sana_jax.training.watchdog import Watchdog
def a_function_that_hangs():
    time.sleep(60)
with Watchdog(0.3) as dog:
    time.sleep(0.6)  # compiling
    for _ in range(5):
        dog.beat()
        time.sleep(0.15)
    a_function_that_hangs()
"""


HANGING = """
import time
from sana_jax.training import watchdog
watchdog.FIRST_SECONDS = 0.2
with watchdog.Watchdog(0.1):
    time.sleep(60)
"""


def test_watchdog():
    found = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True)
    assert found.returncode == 75
    assert re.search(r"line 5 in a_function_that_hangs", found.stderr)
    assert "error: no step for 0.3 s" in found.stderr


def test_watchdog_of_a_start_that_hangs():
    found = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True)
    assert found.returncode == 75 and "error: no step for 0.2 s" in found.stderr


def test_watchdog_of_a_run_that_ended():
    with Watchdog(0.05) as dog:
        dog.beat()
    time.sleep(0.2)
