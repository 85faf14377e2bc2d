"""The exit statuses and the one line on stderr, as a script that calls a command sees them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import PATIENCE

ROOT = Path(__file__).parents[2]

COMMAND = '''"""Draws a picture.

    python -m sana_jax.draw --prompt=TEXT
"""
from absl import flags, logging
from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

PROMPT = flags.DEFINE_string("prompt", None, "what to draw", required=True)
STEPS = flags.DEFINE_integer("num_steps", 20, "evaluations of the network", lower_bound=1)
flags.DEFINE_alias("repetitions", "num_steps")
SAMPLER = flags.DEFINE_enum("sampler", "euler", ["euler", "heun"], "the sampler")
EMA = flags.DEFINE_bool("ema", False, "the averaged weights")
FOLDER = flags.DEFINE_string("folder", "out", "where to write")
flags.DEFINE_float("shift", 1.0, "of the schedule", 0, 10)

def main(argv):
    logging.info("a note")
    if PROMPT.value == "refused":
        raise UserError("the prompt is refused;\\n  write another")
    if PROMPT.value == "retry":
        raise cli.Retry("a peer is lost; start again")
    if PROMPT.value == "stop":
        raise cli.DoNotRetry("NaN three times; the last good step is 7")
    if PROMPT.value == "stopped":
        raise cli.Stopped("stopped after step 7; saved")
    if PROMPT.value == "bug":
        raise ValueError("a bug")
    if PROMPT.value == "status":
        return 5
    print(len(argv), PROMPT.value, STEPS.value, SAMPLER.value, EMA.value, FOLDER.value)

if __name__ == "__main__":
    cli.run(main)
'''

CONFIGURED = '''"""Trains."""
from ml_collections import config_flags
from absl import flags
from sana_jax.runtime import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "the recipe")
flags.mark_flag_as_required("config")

def main(argv):
    print(CONFIG.value.num_steps, CONFIG.value.model.width, CONFIG.value.model.sides)

if __name__ == "__main__":
    cli.run(main)
'''

RECIPE = """
from ml_collections import ConfigDict

def get_config(size="small"):
    if size not in ("small", "large"):
        raise ValueError(f"size {size} is neither small nor large")
    return ConfigDict({
        "num_steps": 3, "learning_rate": 0.1, "ema": True, "betas": (0.9, 0.95),
        "model": {"width": 8 if size == "small" else 64, "sides": (1, 2)},
        "phases": {
            name: {"steps": 9, "adam": {"width": 8, "warmup_steps": 0}} for name in ("high", "low")
        },
    })
"""

WAITING = """
import signal, sys, time
from sana_jax.runtime import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a parent ignores it

def main(argv):
    try:
        print("ready", flush=True)
        time.sleep(30)
    except Exception:
        print("swallowed", flush=True)
    finally:
        print("cleaned up", flush=True)
        time.sleep(float(sys.stdin.readline()))

cli.run(main, resumes=RESUMES)
"""

ENVIRONMENT = dict(os.environ, PYTHONPATH=str(ROOT))


@pytest.fixture
def call(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)

    def run(script, *arguments):
        (tmp_path / "command.py").write_text(script)
        command = [sys.executable, "command.py", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE
        )

    return run


def assert_one_line(result, status, *parts):
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def test_done(call):
    result = call(COMMAND, "--prompt=a red circle", "--num_steps=4", "--ema")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "1 a red circle 4 euler True out\n"


def test_home_folders(call):
    """As a shell writes them out in other places than --flag=~/folder."""
    home = os.path.expanduser("~")
    assert f" {home}/x" in call(COMMAND, "--prompt=a", "--folder=~/x").stdout
    assert f" {home}/x y" in call(COMMAND, "--prompt=a", "--folder", "~/x y").stdout
    assert " ~user" in call(COMMAND, "--prompt=a", "--folder=~user").stdout
    assert " ~/x " in call(COMMAND, "--prompt=~/x").stdout
    assert " ~/x " in call(COMMAND, "--prompt", "~/x").stdout


@pytest.mark.parametrize("prompt, status", [("done", 0), ("refused", 2), ("retry", 75)])
def test_nobody_listens(tmp_path, prompt, status):
    """The status is the same; Python's own would be 120."""
    (tmp_path / "draw.py").write_text(COMMAND)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "draw.py", f"--prompt={prompt}"]
    buffered = ENVIRONMENT | {"PYTHONUNBUFFERED": ""}
    result = subprocess.run(command, cwd=tmp_path, env=buffered, stdout=writer, stderr=writer)
    os.close(writer)
    assert result.returncode == status


def test_status_of_main_is_the_status(call):
    assert call(COMMAND, "--prompt=status").returncode == 5


def test_bug_shows_its_traceback(call):
    result = call(COMMAND, "--prompt=bug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "ValueError: a bug" in result.stderr


def test_notes_of_libraries_show_on_request(call):
    assert "a note" in call(COMMAND, "--prompt=x", "--verbosity=0").stderr


@pytest.mark.parametrize(
    ("prompt", "status", "line"),
    [
        ("refused", 2, "error: the prompt is refused; write another\n"),
        ("retry", 75, "error: a peer is lost; start again\n"),
        ("stopped", 75, "stopped after step 7; saved\n"),
        ("stop", 76, "error: NaN three times; the last good step is 7\n"),
    ],
)
def test_stop_is_its_status_and_one_line(call, prompt, status, line):
    result = call(COMMAND, f"--prompt={prompt}")
    assert (result.returncode, result.stdout, result.stderr) == (status, "", line)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--num_step=4", ["unknown flag --num_step;", "did you mean --num_steps?"]),
        ("--repetition=4", ["unknown flag --repetition;", "did you mean --num_steps?"]),
        ("--repetitions=0", ["--num_steps=0", "positive"]),
        ("--noemma", ["did you mean --ema?"]),
        ("--zzzzzzzz", ["unknown flag --zzzzzzzz;", "--help"]),
        ("--num_steps=four", ["--num_steps=four", "it takes int"]),
        ("--num_steps=0", ["--num_steps=0", "positive"]),
        ("--num_steps", ["--num_steps has no value", "--num_steps=VALUE"]),
        ("--sampler=ddim", ["--sampler=ddim", "euler|heun"]),
        ("--ema=5", ["--ema=5", "true or false"]),
        ("circle", ["'circle'", "quote"]),
        ("--num_steps=-1", ["--num_steps=-1", "positive"]),
        ("--num_steps=", ["--num_steps=", "it takes int"]),
        ("--num_steps=1e3", ["--num_steps=1e3", "it takes int"]),
        ("--folder=", ["--folder= is empty"]),
        ("--shift=nan", ["--shift=nan", "give a number"]),
    ],
)
def test_wrong_flag(call, argument, parts):
    assert_one_line(call(COMMAND, "--prompt=a red", argument), 2, *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--num_steps", "-1"], ["--num_steps=-1", "positive"]),
        (["--num_steps", "four"], ["--num_steps=four", "it takes int"]),
        (["--folder", "--ema"], ["--folder has no value", "--folder=VALUE"]),
        (["--folder", "--num_steps=3"], ["--folder has no value", "--folder=VALUE"]),
        (["--folder", ""], ["--folder= is empty"]),
        (["--ema", "true"], ["'true'", "--flag=VALUE"]),
    ],
)
def test_wrong_flag_in_two_words(call, arguments, parts):
    assert_one_line(call(COMMAND, "--prompt=a red", *arguments), 2, *parts)


def test_flags_in_two_words_and_twice(call):
    """The last one counts, so that a script can be overridden; a prompt may be empty."""
    result = call(COMMAND, "--prompt", "a", "--num_steps", "4", "--prompt=", "--ema")
    assert result.stdout == "1  4 euler True out\n"


def test_an_old_name_sets_the_flag(call):
    result = call(COMMAND, "--prompt=x", "--repetitions=4")
    assert result.stdout == call(COMMAND, "--prompt=x", "--num_steps=4").stdout


def test_missing_flag(call):
    assert_one_line(call(COMMAND), 2, "--prompt is missing", "--help")


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort", "--helpfull"])
def test_help_is_the_docstring_and_own_flags(call, flag):
    result = call(COMMAND, "--num_step=4", flag)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Draws a picture.\n\n    python -m sana_jax.draw")
    listed = [line.split(":")[0] for line in result.stdout.splitlines() if line.startswith("  --")]
    names = ("prompt", "num_steps", "repetitions", "sampler", "ema", "folder", "shift")
    assert listed == [f"  --{name}" for name in names]
    assert "  --repetitions: old name of --num_steps\n" in result.stdout
    assert "what to draw (required)" in result.stdout
    assert "evaluations of the network (default '20')" in result.stdout


def test_config_overrides(call):
    overrides = "--config.num_steps=5", "--config.model.sides=3,4"
    result = call(CONFIGURED, "--config=recipe.py:large", *overrides)
    assert (result.returncode, result.stdout, result.stderr) == (0, "5 64 (3, 4)\n", "")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("num_step=5", ["--config.num_step;", "did you mean --config.num_steps?"]),
        ("model.widht=5", ["--config.model.widht;", "did you mean --config.model.width?"]),
        ("modle.width=5", ["--config.modle.width;", "did you mean --config.model.width?"]),
        ("num_steps.more=5", ["--config.num_steps.more;", "did you mean --config.num_steps?"]),
        ("width=5", ["--config.width;", "did you mean --config.model.width?"]),
        ("phases.high.width=5", ["did you mean --config.phases.high.adam.width?"]),
        ("phases.high.adam.warmup=5", ["did you mean --config.phases.high.adam.warmup_steps?"]),
        ("phases.high.adma.warmup_stps=5", ["mean --config.phases.high.adam.warmup_steps?"]),
        (
            "zzzzzz=5",
            [
                "--config.zzzzzz;",
                "--config has betas, ema, learning_rate, model, num_steps, phases",
            ],
        ),
        ("model.zzzzzz=5", ["--config.model.zzzzzz;", "--config.model has "]),
        ("num_steps=five", ["--config.num_steps=five", "it takes int"]),
        ("num_steps=2.5", ["--config.num_steps=2.5", "it takes int"]),
        ("learning_rate=fast", ["--config.learning_rate=fast", "it takes float"]),
        ("ema=maybe", ["--config.ema=maybe", "true or false"]),
        ("model=5", ["--config.model=5"]),
        ("model.sides=a,b", ["--config.model.sides", "[1, 2]"]),
        ("model.sides=1.5,2", ["--config.model.sides", "[1, 2]"]),
        ("num_steps", ["--config.num_steps=VALUE"]),
    ],
)
def test_wrong_override(call, override, parts):
    for config in ["--config=recipe.py"], ["--config", "recipe.py"]:
        assert_one_line(call(CONFIGURED, *config, f"--config.{override}"), 2, *parts)


def test_integers_stand_for_floats_in_a_tuple(call):
    assert call(CONFIGURED, "--config=recipe.py", "--config.betas=0,0.5").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--config is missing"]),
        (["--config=absent.py"], ["absent.py", "configs/"]),
        (["--config=absent.py", "--config.num_steps=5"], ["absent.py", "configs/"]),
        (["--config=recipe.py:huge"], ["--config: size huge is neither small nor large; correct"]),
        (["--config.num_steps=5"], ["--config.num_steps", "--config=FILE"]),
        (["--config.num_steps=5", "--config=recipe.py"], ["--config.num_steps", "--config=FILE"]),
    ],
)
def test_wrong_config(call, arguments, parts):
    assert_one_line(call(CONFIGURED, *arguments), 2, *parts)


@pytest.mark.parametrize("override", [[], ["--config.num_steps=5"]])
def test_config_that_is_not_python(call, tmp_path, override):
    (tmp_path / "notes.py").write_text("# a recipe\n\ndef get_config(:\n    return 1\n")
    result = call(CONFIGURED, "--config=notes.py", *override)
    assert_one_line(result, 2, "--config", "notes.py line 3", "invalid syntax")


@pytest.mark.parametrize("override", [[], ["--config.num_steps=5"]])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "def get_config():\n    return {}.missing\n",
            ["AttributeError: ", "no attribute 'missing'; correct notes.py line 2"],
        ),
        ("def get_config():\n    return 1 / 0\n", ["ZeroDivisionError", "notes.py line 2"]),
        ("import absent_module\n", ["No module named 'absent_module'", "notes.py line 1"]),
        ("import sys\nsys.exit('stop')\n", ["--config: stop; correct notes.py line 2"]),
        ("x = 1\n", ["notes.py has no get_config()", "configs/"]),
        ("def get_config():\n    return {'num_steps': 5}\n", ["returns a dict"]),
        ("def get_config(size):\n    return size\n", ["'size'", "after its colon"]),
        ("def get_config():\n    raise ValueError\n", ["ValueError; correct notes.py line 2"]),
        ("\0", ["notes.py is not Python"]),
    ],
)
def test_a_config_that_makes_no_config(call, tmp_path, text, parts, override):
    (tmp_path / "notes.py").write_text(text)
    result = call(CONFIGURED, "--config=notes.py", *override)
    assert_one_line(result, 2, "--config: ", *parts)


def test_flags_of_jax_are_taken(call):
    script = """
import sys, types
from absl import flags
from sana_jax.runtime import cli

jax = types.SimpleNamespace()  # stands in for jax, whose import takes seconds
jax.config = types.SimpleNamespace()
jax.config.config_with_absl = lambda: flags.DEFINE_bool("jax_debug_nans", False, "")
sys.modules["jax"] = jax
cli.run(lambda argv: print(flags.FLAGS.jax_debug_nans))
"""
    assert call(script, "--jax_debug_nans").stdout == "True\n"


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["a", "b c"], 0, "['a', 'b c']"),
        (["a", "--flush", "--", "--b"], 0, "['a', '--b']"),
        ([], 2, "error: RUN is missing; --help shows how to give it"),
        (["a", ""], 2, "error: RUN is missing"),
        (["a", "--fluhs"], 2, "did you mean --flush?"),
    ],
    ids=str,
)
def test_operands_stand_without_a_flag_where_a_command_takes_them(call, arguments, status, words):
    script = """
from absl import flags
from sana_jax.runtime import cli

flags.DEFINE_bool("flush", False, "")
cli.run(lambda argv: print(argv[1:]), operands="RUN ...")
"""
    result = call(script, *arguments)
    assert result.returncode == status and words in result.stdout + result.stderr
    if len(arguments) == 2 and not status:
        script = script.replace("RUN ...", "RUN")
        assert call(script, "--flush", "a b").stdout == "['a b']\n"
        assert_one_line(call(script, *arguments), 2, "unexpected 'b c'; write --flag=VALUE")


RESUMES = "; the same command goes on from what is saved\n"


@pytest.mark.parametrize(
    ("resumes", "number", "status", "line"),
    [
        (False, signal.SIGTERM, 143, "terminated\n"),
        (False, signal.SIGINT, 130, "interrupted\n"),
        (True, signal.SIGTERM, 75, f"terminated{RESUMES}"),
        (True, signal.SIGINT, 75, f"interrupted{RESUMES}"),
    ],
)
def test_signal_cleans_up(tmp_path, resumes, number, status, line):
    process = start_waiting(tmp_path, resumes)
    process.send_signal(number)
    stdout, stderr = process.communicate("0\n", timeout=PATIENCE)
    assert (process.returncode, stdout, stderr) == (status, "cleaned up\n", line)


def test_second_sigterm_kills_at_once(tmp_path):
    process = start_waiting(tmp_path)
    process.terminate()
    assert process.stdout.readline() == "cleaned up\n"
    start = time.monotonic()
    process.terminate()
    assert process.wait(timeout=PATIENCE) == -signal.SIGTERM
    assert time.monotonic() - start < 10
    process.communicate()


def test_a_thread_that_hangs_does_not_keep_the_status_back(call):
    """As one that reads data does, where the disk never answers."""
    script = """
import concurrent.futures, time
from sana_jax.runtime import cli

cli.GRACE_SECONDS = 0.5

def main(argv):
    concurrent.futures.ThreadPoolExecutor(1).submit(time.sleep, 600)
    print("written")
    raise cli.Stopped("stopped after step 7; saved")

cli.run(main)
"""
    began = time.monotonic()
    result = call(script)
    assert time.monotonic() - began < 30
    assert (result.returncode, result.stdout) == (75, "written\n")
    assert result.stderr == "stopped after step 7; saved\n"


def start_waiting(folder, resumes=False):
    (folder / "waiting.py").write_text(WAITING.replace("RESUMES", str(resumes)))
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    command = [sys.executable, "waiting.py"]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_inside_a_callback_of_the_garbage_collector_is_heard(tmp_path, name, status):
    """Python prints and drops what is raised there; jax has such a callback."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import gc, os, signal, time
from sana_jax.runtime import cli

def callback(phase, info):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.1)

def main(argv):
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(30)

cli.run(main)
"""
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE)
    assert result.returncode == status and len(result.stderr.splitlines()) == 1, result.stderr
