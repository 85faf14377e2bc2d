"""A file that cannot be written leaves the one that was there."""

import pytest
from etils import epath

from sana_jax.files import write_whole


def test_write_whole_leaves_no_part(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "a")
    write_whole(path, b"old")
    monkeypatch.setattr(type(path), "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        write_whole(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"old"
