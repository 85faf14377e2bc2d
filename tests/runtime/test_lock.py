"""The lock keeps other runs out, and harms no file that is not its own."""

import os
import subprocess
import sys

import pytest
from etils import epath

from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.lock import NAME, locked


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def test_is_there_only_while_it_is_held(folder):
    with locked(folder):
        assert (folder / NAME).read_text().startswith(f"sana_jax: pid {os.getpid()}, ")
        with pytest.raises(UserError, match=f"another run .pid {os.getpid()}, .*--out={folder}"):
            with locked(folder):
                pass
        assert (folder / NAME).exists()
    assert [*folder.iterdir()] == []


def test_killed_run_leaves_it_to_the_next(folder):
    script = f"""
import os
from etils import epath
from sana_jax.runtime.lock import locked
lock = locked(epath.Path({str(folder)!r}))
lock.__enter__()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert [path.name for path in folder.iterdir()] == [NAME]
    (folder / NAME).write_text("sana_jax: pid 1, elsewhere, and longer than what comes now " * 2)
    with locked(folder):
        assert "elsewhere" not in (folder / NAME).read_text()
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize("content", ["", "sana_jax: pid 7, host"])
def test_link_is_refused_whatever_it_leads_to(folder, content):
    (folder / "victim").write_text(content)
    os.symlink(folder / "victim", folder / NAME)
    with pytest.raises(UserError, match=f"{NAME} is not of this program"):
        with locked(folder):
            pass
    assert (folder / "victim").read_text() == content
    assert os.path.islink(folder / NAME)


def test_dangling_link_makes_no_file(folder):
    os.symlink(folder / "absent", folder / NAME)
    with pytest.raises(UserError, match="move it away"):
        with locked(folder):
            pass
    assert not (folder / "absent").exists()


def test_file_of_another_program_stays(folder):
    for content in "pid 7, host", "x" * 5000:
        (folder / NAME).write_text(content)
        with pytest.raises(UserError, match="move it away"):
            with locked(folder):
                pass
        assert (folder / NAME).read_text() == content
    (folder / NAME).unlink()
    os.mkfifo(folder / NAME)
    with pytest.raises(UserError, match="move it away"):
        with locked(folder):
            pass
    assert (folder / NAME).exists()


def test_file_that_took_its_place_stays(folder):
    with locked(folder):
        (folder / NAME).unlink()
        (folder / NAME).write_text("another's")
    assert (folder / NAME).read_text() == "another's"


def test_older_name_is_left_alone(folder):
    (folder / ".lock").write_text("another's")
    with locked(folder):
        pass
    assert (folder / ".lock").read_text() == "another's"


def test_a_mount_that_goes_away_hides_no_error(folder, monkeypatch):
    def away(*args, **options):
        raise OSError(116, "Stale file handle")

    with pytest.raises(Retry), locked(folder):
        monkeypatch.setattr(os, "lstat", away)
        raise Retry("the disk is full")


def test_a_full_disk_is_locked_too(folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with locked(folder):
        with pytest.raises(UserError, match="another run .just started"), locked(folder):
            pass
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize(
    "left", [b"", b"\0" * 40, b"sana", b"sana_jax: pid 12", b"sana_jax: pid 1, h\0\0"]
)
def test_a_lock_that_a_power_cut_left_half_written_is_stale(folder, left):
    (folder / NAME).write_bytes(left)
    with locked(folder):
        assert f"pid {os.getpid()}," in (folder / NAME).read_text()
    assert [*folder.iterdir()] == []


def test_it_tells_whether_its_folder_is_still_there(folder):
    folder = folder / "run"
    folder.mkdir()
    with locked(folder) as check:
        check()
        elsewhere = folder.rename(folder.with_name("elsewhere"))
        with pytest.raises(UserError, match=f"--out={folder} was renamed to {elsewhere} while"):
            check()
        folder.mkdir()
        with locked(folder) as check_other:
            check_other()
            with pytest.raises(UserError, match="was renamed"):
                check()
        (elsewhere / NAME).unlink()
        with pytest.raises(Retry, match=f"--out={folder} is gone, or another folder"):
            check()
