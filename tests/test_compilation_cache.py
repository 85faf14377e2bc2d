"""The second run finds what the first one compiled."""

import jax
import pytest

from sana_jax import compilation_cache
from sana_jax.errors import UserError

NAMES = "jax_compilation_cache_dir", "jax_enable_compilation_cache"


@pytest.fixture(autouse=True)
def configuration(monkeypatch, tmp_path):
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def folder():
    return jax.config.jax_compilation_cache_dir


def test_default(tmp_path, monkeypatch):
    compilation_cache.enable()
    assert folder() == str(tmp_path / "caches" / "sana_jax")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    compilation_cache.enable()
    assert folder() == str(tmp_path / "home" / ".cache" / "sana_jax")


def test_asked_for(tmp_path):
    compilation_cache.enable(str(tmp_path / "a" / "b"))
    assert folder() == str(tmp_path / "a" / "b")
    assert [*(tmp_path / "a" / "b").iterdir()] == []


def test_users_own_setting_stays():
    jax.config.update("jax_compilation_cache_dir", "/somewhere")
    compilation_cache.enable()
    assert folder() == "/somewhere"


def test_off():
    compilation_cache.enable("")
    assert folder() is None and not jax.config.jax_enable_compilation_cache


def test_default_that_cannot_be_written(tmp_path, caplog, monkeypatch):
    (tmp_path / "caches").write_text("a file")
    compilation_cache.enable()
    assert folder() is None and "compilations are not kept" in caplog.text
    with pytest.raises(UserError, match="--compilation_cache=.*caches"):
        compilation_cache.enable(str(tmp_path / "caches" / "x"))
