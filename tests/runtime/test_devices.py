"""Where compiled programs are kept, and that a second process finds what the first one compiled."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sana_jax.runtime.devices import enable_compilation_cache
from sana_jax.runtime.errors import UserError

NAMES = "jax_compilation_cache_dir", "jax_enable_compilation_cache"


@pytest.fixture(autouse=True)
def configuration(monkeypatch, tmp_path):
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


SCRIPT = """
import sys
import jax
from sana_jax.runtime.devices import enable_compilation_cache
enable_compilation_cache(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append("cache_hits" in event))
jax.block_until_ready(jax.jit(lambda x: x @ x + float(sys.argv[2]))(jax.numpy.ones((8, 8))))
print(any(hits))
"""


def test_second_process_compiles_nothing(tmp_path):
    def run(number: str) -> tuple[str, set[str]]:
        environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "kept"), number],
            env={**os.environ, **environment},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        return done.stdout.strip(), {path.name for path in (tmp_path / "kept").glob("*-cache")}

    hit, first = run("1")
    assert hit == "False" and first
    assert run("1") == ("True", first)
    hit, other = run("2")  # another program is another entry
    assert first < other


def folder():
    return jax.config.jax_compilation_cache_dir


def test_default(tmp_path, monkeypatch):
    enable_compilation_cache()
    assert folder() == str(tmp_path / "caches" / "sana_jax")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    enable_compilation_cache()
    assert folder() == str(tmp_path / "home" / ".cache" / "sana_jax")


def test_asked_for(tmp_path):
    enable_compilation_cache(str(tmp_path / "a" / "b"))
    assert folder() == str(tmp_path / "a" / "b")
    assert [*(tmp_path / "a" / "b").iterdir()] == []


def test_users_own_setting_stays():
    jax.config.update("jax_compilation_cache_dir", "/somewhere")
    enable_compilation_cache()
    assert folder() == "/somewhere"


def test_off():
    enable_compilation_cache("")
    assert folder() is None and not jax.config.jax_enable_compilation_cache


def test_default_that_cannot_be_written(tmp_path, caplog, monkeypatch):
    (tmp_path / "caches").write_text("a file")
    enable_compilation_cache()
    assert folder() is None and "compilations are not kept" in caplog.text
    with pytest.raises(UserError, match="--compilation_cache=.*caches"):
        enable_compilation_cache(str(tmp_path / "caches" / "x"))
