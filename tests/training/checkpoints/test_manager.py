"""Only whole checkpoints of the same run are resumed."""

import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import sharding
from sana_jax.runtime.errors import DoNotRetry, Retry, UserError
from sana_jax.training.checkpoints import arrays, manager
from sana_jax.training.checkpoints.manager import Checkpoints
from tests.training.checkpoints.toy import CONFIG, DATA, Position, abstract, make, restore, same


def test_new_folder_has_nothing(tmp_path):
    found, position, _ = restore(tmp_path / "new" / "run")
    assert found is None and position is None


def test_newest_is_restored(folder):
    found, position, checkpoints = restore(folder)
    assert same(found, make(3)) and position == {"row": 3}
    assert checkpoints.steps() == [1, 2, 3] and checkpoints.last_good == 3


@pytest.mark.parametrize("name", ["run", "./run/", ".", "linked/../run", "link"])
def test_a_folder_may_be_named_as_users_do(tmp_path, monkeypatch, name):
    """Orbax wants absolute paths: a relative --workdir saved nothing."""
    (tmp_path / "linked").mkdir()
    (tmp_path / "link").symlink_to("linked")
    monkeypatch.chdir(tmp_path)
    with Checkpoints(name, CONFIG, DATA) as checkpoints:
        checkpoints.save(3, make(3), {"row": 3})
        checkpoints.wait()
        assert checkpoints.last_good == 3
    found, position, _ = restore(name)
    assert same(found, make(3)) and position == {"row": 3}
    document, _ = manager.read_newest(name, "params")
    assert document["step"] == 3


@pytest.mark.parametrize("name", ["exp [v2]", "a\\b"])
def test_a_folder_that_could_not_be_read_back_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="could not be read back; rename it"):
        Checkpoints(tmp_path / name / "run", CONFIG, DATA)
    assert not (tmp_path / name).exists()


def flip_bit(step):
    largest = max((step / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


def truncate(step):
    largest = max((step / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def change_document(step):
    path = step / "run" / "metadata"
    path.write_text(path.read_text().replace("0.5", "0.6"))


def cut_document(step):
    path = step / "run" / "metadata"
    path.write_text(path.read_text()[:-20])


def lose_manifest(step):
    for path in step.rglob("manifest.ocdbt"):
        path.unlink()


DAMAGES = [flip_bit, truncate, empty, change_document, cut_document, lose_manifest]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_newest_is_set_aside(folder, damage, capsys):
    damage(folder / "checkpoints" / "3")
    found, position, checkpoints = restore(folder)
    assert same(found, make(2)) and position == {"row": 2}
    line = capsys.readouterr().err
    assert line.startswith("checkpoint 3 is damaged (its ") and "back to step 2" in line
    assert checkpoints.steps() == [1, 2] and (folder / "checkpoints" / "3.bad").is_dir()
    with Checkpoints(folder, CONFIG, DATA) as checkpoints:
        checkpoints.restore(abstract(make()))
        checkpoints.save(3, make(3), {"row": 3})
    assert same(restore(folder)[0], make(3))


def test_none_whole_is_no_new_start(folder):
    for step in (folder / "checkpoints").iterdir():
        flip_bit(step)
    with pytest.raises(DoNotRetry, match="none of the checkpoints .* 3 .its .* 1 .its .* anew"):
        restore(folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1", "2", "3"]


def test_another_number_of_hosts(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, Checkpoints(tmp_path, CONFIG, DATA) as checkpoints:
        patch.setattr(manager, "gather_values", lambda state: [state, state])  # of two hosts
        checkpoints.save(1, make(1), {"row": 1})
    with pytest.raises(UserError, match="1 was saved by 2 hosts, whose data does not split over 1"):
        restore(tmp_path)

    class Shared(Position):
        def share(self, states):
            return {"rows": [state["row"] for state in states]}

    with Checkpoints(tmp_path, CONFIG, DATA) as checkpoints:
        checkpoints.restore(abstract(make()), position := Shared())
    assert position.value == {"rows": [1, 1]}


def test_hosts_that_differ_do_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(manager, "gather_values", lambda found: [found, found, "another"])
    with pytest.raises(UserError, match="hosts 2 have another config, or other data, than host 0"):
        with Checkpoints(tmp_path, CONFIG, DATA):
            pass
    assert not (tmp_path / "checkpoints").exists()


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("sana_jax.runtime.lock._open", fail)
    with pytest.raises(UserError, match="--workdir=.*: Read-only file system"):
        with Checkpoints(tmp_path, CONFIG, DATA):
            pass


def test_other_config_is_refused_with_the_difference(folder):
    config = CONFIG | {"model": {"width": 65}, "rate": 0.25, "new": [1], "steps": 20}
    message = "config.model.width: 64 -> 65, config.rate: 0.5 -> 0.25, config.new: absent -> "
    with pytest.raises(UserError) as error:
        restore(folder, config | {"log_every": 7})
    assert message in str(error.value) and "steps," in str(error.value)
    assert "log_every:" not in str(error.value) and "config.steps" not in str(error.value)
    with pytest.raises(UserError, match="data.seed: 3 -> 4"):
        restore(folder, data=DATA | {"seed": 4})
    assert restore(folder, CONFIG | {"steps": 20, "log_every": 7})[0] is not None


def test_a_key_that_a_run_did_not_have_had_its_default(folder):
    def restore_with(**changes):
        defaults = CONFIG | {"model": {"width": 32, "bias": True}, "prior": {"images": 100}}
        model = CONFIG["model"] | {"bias": changes.get("bias", True)}
        new = CONFIG | {"model": model, "prior": {"images": changes.get("images", 100)}}
        with Checkpoints(folder, new, DATA, defaults=defaults) as checkpoints:
            return checkpoints.restore(abstract(make()))

    assert restore_with() is not None
    with pytest.raises(UserError, match="config.prior.images: 100 -> 50"):
        restore_with(images=50)
    with pytest.raises(UserError, match="config.model.bias: true -> false"):
        restore_with(bias=False)


def test_other_shapes_are_refused(folder):
    other = make().replace(params={"net": {"w": jnp.ones((64, 64)), "c": jnp.ones(1)}})
    with pytest.raises(UserError) as error:
        restore(folder, like=other)
    for text in (
        "params/net/w: float32[64, 128] -> float32[64, 64]",
        "params/net/b: bfloat16[128] -> absent",
        "params/net/c: absent -> float32[1]",
    ):
        assert text in str(error.value)


def test_other_meshes(tmp_path):
    """8 -> 4 -> 1 devices, with another sharding each time."""
    devices, want = jax.devices(), make()
    meshes = [
        sharding.make_mesh(fsdp=4, tensor=2, devices=devices),
        sharding.make_mesh(replica=2, fsdp=2, devices=devices[4:]),
        sharding.make_mesh(devices=devices[:1]),
    ]
    with Checkpoints(tmp_path, CONFIG, DATA) as checkpoints:
        checkpoints.save(1, make(mesh=meshes[0]))
        for step, mesh in enumerate(meshes, 1):
            checkpoints.wait()
            like = make(mesh=mesh)
            found = checkpoints.restore(abstract(like))
            assert same(found, want)
            assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
                lambda x: x.sharding, like
            )
            checkpoints.save(step + 1, found)


def test_latest_stay_and_multiples(tmp_path):
    with Checkpoints(tmp_path, CONFIG, DATA, keep=2, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, make(), b"bytes", good=step < 7)
        checkpoints.save(7, make())  # does nothing
        checkpoints.wait()
        assert checkpoints.steps() == [4, 6, 7] and checkpoints.last_good == 6
    _, position, checkpoints = restore(tmp_path)
    assert position == b"bytes" and checkpoints.last_good == 6


def test_what_a_killed_run_left_is_removed(folder):
    left = folder / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(folder / "checkpoints" / "3", left)
    _, _, checkpoints = restore(folder)
    assert not left.exists() and checkpoints.steps() == [1, 2, 3]


def test_an_object_store_has_no_renaming(folder):
    """On an object store Orbax writes into the step's own folder, and marks it at the end."""
    (folder / "checkpoints/3/commit_success.txt").unlink()
    checkpoints = Checkpoints(folder, CONFIG, DATA)
    assert checkpoints.steps() == [1, 2, 3]
    checkpoints._remote = True
    assert checkpoints.steps() == [1, 2]
    with checkpoints:
        assert same(checkpoints.restore(abstract(make())), make(2))
    assert not (folder / "checkpoints/3").exists()


def test_saved_while_the_next_steps_run(tmp_path):
    """The arrays are donated at once; yet the checkpoint holds the values that were given."""
    advance = jax.jit(
        lambda s: s.replace(params=jax.tree.map(lambda x: x + 1, s.params)), donate_argnums=0
    )
    current = make()
    with Checkpoints(tmp_path, CONFIG, DATA, keep=9) as checkpoints:
        for step in 1, 2, 3:
            checkpoints.save(step, current)
            for _ in range(4):
                current = advance(current)
    assert restore(tmp_path)[2].steps() == [1, 2, 3] and not list(tmp_path.glob("*/*.bad"))
    found, _, _ = restore(tmp_path)
    moved = found.params["net"]["w"] - make().params["net"]["w"]
    np.testing.assert_allclose(moved, 8, rtol=1e-5)


def test_a_host_lost_in_a_save_or_a_restore_damages_nothing(folder, monkeypatch):
    def fail(*_, **__):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    with Checkpoints(folder, CONFIG, DATA) as checkpoints:
        monkeypatch.setattr(arrays, "_restore", fail)
        monkeypatch.setattr(manager.ocp.CheckpointManager, "save", fail)
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="^UNKNOWN: Gloo"):
            patch.setattr(arrays, "is_loss", lambda error: True)
            checkpoints.restore(abstract(make()))
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="^UNKNOWN: Gloo"):
            patch.setattr(manager, "is_loss", lambda error: True)
            checkpoints.save(4, make(4))
        assert checkpoints.steps() == [1, 2, 3]


def test_failing_disk_is_forgiven_twice(folder, monkeypatch):
    with Checkpoints(folder, CONFIG, DATA) as checkpoints:

        def fail(*_, **__):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(manager.ocp.CheckpointManager, "save", fail)
            checkpoints.save(4, make(4))
            checkpoints.save(5, make(5))
            with pytest.raises(Retry, match="step 6 .*No space left.*newest checkpoint is 3"):
                checkpoints.save(6, make(6))
        checkpoints.save(7, make(7))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3, 7] and checkpoints.last_good == 7


def test_a_save_that_cannot_be_read_back_is_no_save(tmp_path, monkeypatch):
    """In such a folder Orbax 0.12 says that it has saved; `check_name` refuses it otherwise."""
    monkeypatch.setattr(manager, "check_name", lambda workdir: None)
    with pytest.raises(Retry, match="step 4 could not be saved .*the newest checkpoint is none"):
        with Checkpoints(tmp_path / "exp [v2]", CONFIG, DATA) as checkpoints:
            checkpoints.save_surely(4, make(4))
    assert checkpoints.steps() == [] and checkpoints.last_good is None


def test_a_document_that_is_damaged_as_it_is_saved_is_no_save(folder, monkeypatch):
    with Checkpoints(folder, CONFIG, DATA) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(manager, "check_saved", fail_with(manager.Damaged("its document: torn")))
            checkpoints.save(4, make(4))
            checkpoints.wait()
        assert checkpoints.steps() == [2, 3] and checkpoints.last_good is None
        checkpoints.save_surely(4, make(4))
        assert checkpoints.steps() == [2, 3, 4] and checkpoints.last_good == 4


def fail_with(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "error, begun, kind",
    [
        (OSError(errno.EROFS, "Read-only file system"), True, Retry),
        (OSError(errno.EROFS, "Read-only file system"), False, UserError),
        (OSError(errno.ENOSPC, "No space left on device"), False, Retry),
        (ImportError("gcsfs is missing"), False, UserError),
    ],
)
def test_a_run_that_has_begun_may_go_on_later(folder, tmp_path, monkeypatch, error, begun, kind):
    monkeypatch.setattr(manager, "locked", fail_with(error))
    with pytest.raises(kind, match="^--workdir=.*: (Read-only|No space|gcsfs)"):
        with Checkpoints(folder if begun else tmp_path / "new", CONFIG, DATA):
            pytest.fail("too late")


def test_a_damaged_step_that_cannot_be_renamed_is_worth_a_retry(folder, monkeypatch, capsys):
    (folder / "checkpoints/3/run/metadata").write_bytes(b"")
    rename = fail_with(OSError(errno.EROFS, "Read-only file system"))
    monkeypatch.setattr(Checkpoints, "_rename", rename)
    with pytest.raises(Retry, match="checkpoints/3: Read-only file system"):
        restore(folder)
    assert "checkpoint 3 is damaged" in capsys.readouterr().err
    monkeypatch.undo()
    assert same(restore(folder)[0], make(2))


def test_a_renamed_folder_does_not_come_back(folder):
    with pytest.raises(UserError, match="run was renamed to .*elsewhere .*: give it the new name"):
        with Checkpoints(folder, CONFIG, DATA) as checkpoints:
            checkpoints.save_surely(4, make(4))
            folder.rename(folder.with_name("elsewhere"))
            checkpoints.save(5, make(5))
    assert not folder.exists()
    assert Checkpoints(folder.with_name("elsewhere"), CONFIG, DATA).steps() == [2, 3, 4]


def test_a_removed_folder_does_not_come_back(folder):
    with pytest.raises(Retry, match="run is gone, or another folder"):
        with Checkpoints(folder, CONFIG, DATA) as checkpoints:
            shutil.rmtree(folder)
            checkpoints.save_surely(5, make(5))
    assert not folder.exists()


def test_the_saves_of_a_run_in_a_folder_of_the_same_name_stay(folder, monkeypatch):
    """The first run's folder is renamed while it saves; what it sweeps must be its own."""
    with pytest.raises(UserError, match="was renamed"), Checkpoints(folder, CONFIG, DATA) as first:
        folder.rename(folder.with_name("elsewhere"))
        with Checkpoints(folder, CONFIG, DATA) as second:
            begun = second.folder / "1.orbax-checkpoint-tmp"
            begun.mkdir()
            first._saving = 5, True
            with pytest.raises(UserError, match="was renamed"):
                first._forgive(fail_with(OSError(errno.ENOSPC, "No space left on device")))
            assert begun.exists()
            first.save(5, make(5))


def test_second_run_is_refused(folder):
    with Checkpoints(folder, CONFIG, DATA):
        with pytest.raises(UserError, match=r"another run \(pid \d+, .*writes to --workdir="):
            restore(folder)
    assert restore(folder)[0] is not None


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir=.*file: Not a directory"):
        restore(tmp_path / "file")


@pytest.mark.parametrize("name", ["007", "\u0663"])
def test_folders_that_are_only_read_as_numbers_are_no_steps(folder, name):
    shutil.copytree(folder / "checkpoints/2", folder / "checkpoints" / name)
    found, _, checkpoints = restore(folder)
    assert same(found, make(3)) and checkpoints.steps() == [1, 2, 3]
    with checkpoints:
        checkpoints.save(4, make(4), {"row": 4})
    assert restore(folder)[2].steps()[-1] == 4
    assert (folder / "checkpoints" / name).is_dir()


def test_a_file_called_checkpoints_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(UserError, match="checkpoints is a file, where a folder is needed"):
        restore(tmp_path)


def test_a_name_that_is_not_utf_8_is_refused(tmp_path):
    with pytest.raises(UserError, match="not UTF-8"):
        Checkpoints(tmp_path / "caf\udce9", CONFIG, DATA)
