"""Stored features: a run that was stopped ends as an unbroken one, and no picture is lost."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sana_jax.metrics import features
from sana_jax.metrics.features import Prepared
from sana_jax.metrics.pictures import open_pictures
from sana_jax.metrics.resizes import as_jpeg
from sana_jax.runtime.errors import UserError


class Killed(Exception):
    """Stands for a signal that ends the process."""


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(11):
        Image.fromarray(grey(20 * i)).save(folder / f"{i:02}.png")
    (folder / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    (folder / "10.png").write_bytes(b"")
    return open_pictures(str(folder), "data")


def prepare(pixels):
    return pixels[:2, :2].astype(np.float32)


def measured(source, folder, network, kind="first", **options):
    settings = {"weights": "w"}
    options = dict(batch_size=4) | options
    transform = Prepared(prepare, {"resize": kind})
    return features.measure(source, transform, lambda: network, folder, settings, **options)


def test_pictures_may_be_measured_as_jpeg(source, tmp_path):
    plain = Prepared(prepare, {})
    kept = [x(source[1], np.random.default_rng(0)) for x in (plain, plain._replace(jpeg=True))]
    expected = [prepare(shade) for shade in (np.full((4, 5, 3), 20), as_jpeg(grey(20)))]
    np.testing.assert_array_equal([row["image"] for row in kept], expected)


def grey(shade):
    return np.full((4, 5, 3), shade, np.uint8)


def mean(batch):
    return jnp.asarray(batch["image"]).mean(axis=(1, 2))


def rows(found):
    return np.concatenate(list(found.blocks()))


def test_every_picture_has_a_row_or_a_reason(source, tmp_path):
    found = measured(source, tmp_path, mean)
    expected = [20.0 * i for i in range(11) if i not in (3, 10)]
    np.testing.assert_array_equal(rows(found)[:, 0], expected)
    about = found.about("reference_")
    assert about["reference_count"] == len(found) == 9
    assert about["reference_rejected"] == {"truncated": 1, "empty": 1}
    assert list(about["reference_rejected_pictures"]) == ["03.png", "10.png"]
    np.testing.assert_array_equal(found.some(3)[:, 0], [0, 80, 140])


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_run_goes_on_and_ends_alike(source, tmp_path, after):
    calls = []

    def counted(batch):
        calls.append(1)
        if len(calls) > after:
            raise Killed
        return mean(batch)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(Killed):
        measured(source, tmp_path / "a", counted)
    done = len(list((tmp_path / "a").glob("*/0*.npz")))
    assert done == max(0, after - 1)  # the last batch was not waited for
    calls.clear()
    again = measured(source, tmp_path / "a", lambda batch: (calls.append(1), mean(batch))[1])
    assert len(calls) == 3 - done
    whole = measured(source, tmp_path / "b", mean)
    np.testing.assert_array_equal(rows(again), rows(whole))
    assert again.about() == whole.about()


def test_features_are_read_again_only_where_nothing_changed(source, tmp_path):
    def never(batch):
        raise Killed

    first = rows(measured(source, tmp_path, mean))
    np.testing.assert_array_equal(rows(measured(source, tmp_path, never)), first)
    for other in (dict(kind="other"), dict(batch_size=8), dict(count=5)):
        with pytest.raises(Killed):
            measured(source, tmp_path, never, **other)
    (damaged,) = tmp_path.glob("*/000001.npz")
    content = bytearray(damaged.read_bytes())
    content[90] ^= 1
    damaged.write_bytes(content)
    np.testing.assert_array_equal(rows(measured(source, tmp_path, mean)), first)


def test_what_cannot_be_measured_is_one_line(source, tmp_path):
    with pytest.raises(UserError, match="NaN or infinite features"):
        measured(source, tmp_path, lambda batch: mean(batch) * np.nan)
    texts = Prepared(prepare, {}, lambda text: np.zeros(2, np.int32))
    with pytest.raises(UserError, match="it has no prompt"):
        features.measure(source, texts, lambda: mean, tmp_path, {}, batch_size=4)
    with features.workdir(str(tmp_path / "w")), pytest.raises(UserError, match="another run"):
        with features.workdir(str(tmp_path / "w")):
            pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--workdir="):
        with features.workdir(str(tmp_path / "file")):
            pass
