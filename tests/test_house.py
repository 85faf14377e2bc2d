"""The promises of the folder itself: requirements, scripts, imports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = "configs", "findings", "launch", "sana_jax", "tests"
READMES = [ROOT / "README.md", *sorted(x for f in FOLDERS for x in (ROOT / f).rglob("README.md"))]
SCRIPTS = [
    ROOT / ".ci/run",
    *sorted(path for path in (ROOT / "launch").iterdir() if path.suffix != ".md"),
]


@pytest.mark.parametrize(
    "name", ["requirements.txt", "tests/requirements.txt", "tests/references.txt"]
)
def test_every_requirement_has_an_upper_bound(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    requirements = [line for line in lines if line and not line.startswith("-r")]
    assert requirements
    assert [line for line in requirements if not re.search(r"<|==", line)] == []


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_readme_has_no_placeholder_and_no_section_twice(readme):
    text = re.sub(r"^```.*?^```", "", readme.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^[A-Z]+$", text, re.MULTILINE) == []
    headings = re.findall(r"^#+ .*$", text, re.MULTILINE)
    assert len(set(headings)) == len(headings)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script):
    shebang = script.read_text().partition("\n")[0]
    if shebang.startswith("#!") and "bash" not in shebang:
        pytest.skip("no shell script")
    subprocess.run(["bash", "-n", script], check=True)


def test_ci_runs_the_tests_of_launch():
    assert "bash launch/test\n" in (ROOT / ".ci/run").read_text()


def test_old_python_is_refused_in_one_line(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.1\nexit 1\n')
    old.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(old), "VENV": str(tmp_path / "venv")}
    result = subprocess.run(
        ["bash", ROOT / "launch/test"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "Python 3.10.1 is too old: 3.11" in result.stderr


@pytest.mark.parametrize("failing", ["ruff check", "ruff format", "mypy", "pytest"])
def test_every_check_runs_and_one_that_fails_decides(tmp_path, failing):
    python = tmp_path / "bin/python"  # of a virtual environment where everything is installed
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$@"\ncase "$*" in "-m {failing}"*) exit 3; esac\n')
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path)}
    result = subprocess.run(
        ["bash", ROOT / "launch/test", "-x"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 3, result.stderr
    ran = [line for line in result.stdout.splitlines() if not line.startswith("-m pip")]
    assert ran[:3] == ["-m ruff check", "-m ruff format --check", "-m mypy"]
    assert ran[3].startswith("-m pytest ") and ran[3].endswith(" -x") and len(ran) == 4


def test_library_imports_no_torch():
    """Every module, an entry point or not, imports without torch and diffusers."""
    script = """
import importlib, pkgutil, sys
from absl import flags
import sana_jax

def forget_flags():  # two commands may have a flag of the same name
    for module, group in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("sana_jax."):
            for flag in list(group):
                delattr(flags.FLAGS, flag.name)

for module in pkgutil.walk_packages(sana_jax.__path__, "sana_jax."):
    importlib.import_module(module.name)
    forget_flags()
print(sorted({"torch", "diffusers"} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


def test_library_imports_no_torch_later():
    """Nor inside a function, but for the file that measures them, in a process of its own."""
    pattern = re.compile(r"^\s*(import|from) (torch|diffusers)\b", re.M)
    sources = set((ROOT / "sana_jax").rglob("*.py")) - {ROOT / "sana_jax/measure/theirs.py"}
    assert sources
    assert [str(path) for path in sources if pattern.search(path.read_text())] == []
