"""Ctrl-C and SIGTERM at any moment: one line, the right status, and what must be undone is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import PATIENCE

ROOT = Path(__file__).parents[2]
COMMANDS = [path for path in (ROOT / "sana_jax").glob("*.py") if "cli.run(" in path.read_text()]
NUMBERS = signal.SIGINT, signal.SIGTERM
LINES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

# Python imports it before anything else: the process gets a signal where it begins to import AT.
HOOK = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a parent ignores it

class Finder:
    def find_spec(name, path, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), int(os.environ["NUMBER"]))

sys.meta_path.insert(0, Finder)
"""
SCRIPT = """
import os, signal, sys, threading, time
from sana_jax.runtime import cli, signals

if sys.argv[1:] != ["ignored"]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a parent ignores it
del sys.argv[1:]
NUMBER = {number}

def hit():
    os.kill(os.getpid(), NUMBER)

def main(argv):
{body}

cli.run(main)
"""


def call(tmp_path, *command, **environment):
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", **environment}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


def run(tmp_path, body, number, *arguments):
    """Runs a command with this body of `main`."""
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    (tmp_path / "script.py").write_text(SCRIPT.format(number=int(number), body=indented))
    return call(tmp_path, sys.executable, "script.py", *arguments)


def assert_ended(result, number, stdout=""):
    assert result.returncode == 128 + number, result.stderr
    assert (result.stdout, result.stderr) == (stdout, f"{LINES[number]}\n")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_signal_while_a_command_is_imported_ends_it(tmp_path, path, number):
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    command = sys.executable, "-m", f"sana_jax.{path.stem}", "--unknown"
    result = call(tmp_path, *command, AT="absl", NUMBER=str(int(number)))
    if "resumes=True" in path.read_text():
        line = f"{LINES[number]}; the same command goes on from what is saved\n"
        assert (result.returncode, result.stderr) == (75, line)
    else:
        assert_ended(result, number)


@pytest.mark.parametrize("module", ["sana_jax.batch.draw", "jax", "transformers"])
def test_a_signal_while_main_imports_what_it_needs_ends_it(tmp_path, module):
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    flags = "--checkpoint=shapes", "--prompt=a", f"--out={tmp_path / 'out'}"
    command = sys.executable, "-m", "sana_jax.sample", *flags
    result = call(tmp_path, *command, AT=module, NUMBER="2", JAX_PLATFORMS="cpu")
    assert_ended(result, signal.SIGINT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_module_is_imported_whole_before_main_unwinds(tmp_path, number):
    """Modules in C turn what is raised in them into errors of their own."""
    (tmp_path / "slow.py").write_text("import __main__\n__main__.hit()\nprint('imported')\n")
    body = """
try:
    import slow
    time.sleep(600)
finally:
    print("cleaned up")
"""
    assert_ended(run(tmp_path, body, number), number, "imported\ncleaned up\n")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_that_someone_swallows_is_raised_again(tmp_path, number):
    body = """
try:
    hit()
    time.sleep(600)
except BaseException:
    print("swallowed")
time.sleep(600)
"""
    assert_ended(run(tmp_path, body, number), number, "swallowed\n")


@pytest.mark.parametrize("number", NUMBERS)
def test_cleaning_up_is_not_interrupted_and_what_it_raises_is_not_shown(tmp_path, number):
    body = """
try:
    hit()
    time.sleep(600)
finally:
    try:
        raise OSError
    except OSError:
        time.sleep(3 * signals.AGAIN_SECONDS)
    print("cleaned up")
    raise ValueError
"""
    assert_ended(run(tmp_path, body, number), number, "cleaned up\n")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_in_a_long_call_into_c_ends_the_process(tmp_path, number):
    """As a compiler is, which hears no signal for minutes."""
    body = """
import hashlib

signals.GRACE_SECONDS = 0.1
threading.Timer(0.1, hit).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    assert_ended(run(tmp_path, body, number), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_after_main_hurries_the_end(tmp_path, number):
    body = """
def wait():
    threading.main_thread().join()
    hit()
    time.sleep(600)

threading.Thread(target=wait).start()
print("done")
"""
    result = run(tmp_path, body, number)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_ctrl_c_that_a_parent_lets_ignore_stays_ignored(tmp_path):
    """As a shell does for a command in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = run(tmp_path, "hit()\nprint('done')", signal.SIGINT, "ignored")
        ended = run(tmp_path, "hit()\ntime.sleep(600)", signal.SIGTERM, "ignored")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.returncode, result.stdout) == (0, "done\n")
    assert_ended(ended, signal.SIGTERM)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_left_for_the_end_is_done_after_a_signal_too(tmp_path, number):
    body = "signals.at_end(lambda: os.rmdir('made'))\nos.mkdir('made')\nhit()\ntime.sleep(99)"
    done = run(tmp_path, body, number)
    assert done.returncode == 128 + number and not (tmp_path / "made").exists()


def test_another_program_that_imports_the_library_keeps_its_own_signals(tmp_path):
    """Its package may import it while Python still looks for the module of `python -m`."""
    (tmp_path / "server").mkdir()
    (tmp_path / "server/__init__.py").write_text("import sana_jax\n")
    body = "import signal; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    (tmp_path / "server/__main__.py").write_text(body)
    (tmp_path / "server/other.py").write_text(body)
    for module in "server", "server.other":
        assert call(tmp_path, sys.executable, "-m", module).stdout == "True\n"
