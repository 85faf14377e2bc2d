"""A command that is run several times by one process: its imports take longer than its mistakes."""

import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

from absl import flags

from sana_jax.runtime import cli
from tests import PATIENCE


def several(module: str, lines: list[list[str]], cwd: Path, environment) -> list[tuple]:
    """Runs `python -m module` with each list of arguments; returns their (status, stdout, stderr).

    From `cwd` and PYTHONPATH Python must find the package of the tests.
    """
    result = subprocess.run(
        [sys.executable, "-m", __name__, module],
        cwd=cwd,
        env=environment,
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    return [tuple(answer) for answer in json.loads(result.stdout.splitlines()[-1])]


def answers(
    module: str, mistakes: list[tuple], given: list[str], cwd: Path, environment, operand=None
) -> dict:
    """Returns what `several` says of mistakes, (arguments, words) each, by their arguments.

    `given`: arguments that stand before those of every mistake; `operand`: what stands without a
    flag, where the mistake has nothing of the kind.
    """
    lines = [[*given, *arguments] for arguments, _ in mistakes]
    if operand is not None:
        lines = [
            line if any(each[:1] != "-" for each in line) else [*line, operand] for line in lines
        ]
    found = several(module, lines, cwd, environment)
    return {tuple(each): answer for (each, _), answer in zip(mistakes, found, strict=True)}


def main(name: str) -> None:
    """Reads the lists of arguments from stdin, and prints the answers."""
    module, answers = importlib.import_module(name), []
    cli.GRACE_SECONDS = 10**6  # this process goes on after the first error
    for arguments in json.load(sys.stdin):
        sys.argv, out, err = [name, *arguments], io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.run(module.main, operands=getattr(module, "OPERANDS", ""))
            except SystemExit as end:
                answers.append([end.code, out.getvalue(), err.getvalue()])
        for flag in flags.FLAGS:
            flags.FLAGS[flag].unparse()
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
