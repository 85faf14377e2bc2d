"""Damaged files of data sets are named in one line."""

import pytest
from etils import epath

from sana_jax.data.records import NoData
from sana_jax.data.shards import check_about, damage_named
from sana_jax.runtime.errors import UserError


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 10**5])
@pytest.mark.parametrize("place", ["", "1.0.0", "config/1.0.0"])
def test_the_file_that_is_damaged_is_named_and_not_the_folder(tmp_path, content, place):
    folder = epath.Path(tmp_path / place)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match=f"^{tmp_path} is damaged .no; text.; repair it$"):
        with damage_named(epath.Path(tmp_path), "repair it"):
            raise RuntimeError("no;\ntext")
    (folder / "features.json").write_text(content)
    with pytest.raises(UserError, match=f"^{folder / 'features.json'} is damaged .it holds no"):
        check_about(epath.Path(tmp_path), "repair it")


def test_a_file_that_is_gone_may_come_back_and_a_disk_that_fails_is_no_damage(tmp_path):
    for error, kind in (FileNotFoundError(2, "No such file"), NoData), (OSError(5, "bad"), OSError):
        with pytest.raises(kind), damage_named(epath.Path(tmp_path), "repair it"):
            raise error
