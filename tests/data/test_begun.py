"""The settings of a folder that several runs fill."""

import pytest

from sana_jax.data.begun import SETTINGS, begun
from sana_jax.runtime.errors import UserError


def test_a_folder_is_continued_with_its_settings_alone(tmp_path):
    first = begun(tmp_path, {"data": "photos", "seed": 1})
    assert begun(tmp_path, {"data": "moved/photos", "seed": 1}) == first
    with pytest.raises(UserError, match=r"other settings \(seed\): seed was 1, now 2; name"):
        begun(tmp_path, {"data": "photos", "seed": 2})
    with pytest.raises(UserError, match=r"\(data\)"):
        begun(tmp_path, {"data": "moved", "seed": 1}, free=())
    for damage in b"[]", b"", b"[" * 10**5:
        (tmp_path / SETTINGS).write_bytes(damage)
        with pytest.raises(UserError, match="was begun with other settings"):
            begun(tmp_path, {"seed": 1})


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds other files; name a new folder"):
        begun(tmp_path, {"seed": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_of_nested_settings_the_one_that_differs_is_named(tmp_path):
    begun(tmp_path, {"ask": {"models": ["A", "B"], "side": 8}})
    with pytest.raises(UserError, match=r"\(ask\): ask.models was \['A', 'B'\], now \['A'\]; name"):
        begun(tmp_path, {"ask": {"side": 8, "models": ["A"]}})
    with pytest.raises(UserError, match=r"ask.side was 8, now None; name"):
        begun(tmp_path, {"ask": {"models": ["A", "B"]}})
