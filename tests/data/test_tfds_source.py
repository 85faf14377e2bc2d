"""TFDS data sets as records: a small one is prepared here, without TensorFlow."""

import io
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sana_jax.data.images import BadImage, decode
from sana_jax.data.sources import check_apart, open_source
from sana_jax.runtime.errors import Retry, UserError
from tests.data.bad_files import encode, picture

COUNT = 5
LABELS = ["cat", "dog"]
CAPTIONED = (
    *("text", "texts", "nested", "label", "none"),
    *("unlabelled", "labels", "scalar", "strings", "number", "gaps"),
)


class SanaToy(tfds.core.GeneratorBasedBuilder):
    """Images under an unusual name, and captions in every form that is understood."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in CAPTIONED]
    captions = {
        "text": {"caption": tfds.features.Text()},
        "texts": {
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "scores": tfds.features.Sequence(np.float32),
            "truth": tfds.features.Text(),
        },
        "nested": {"captions": tfds.features.Sequence({"text": tfds.features.Text()})},
        "label": {"label": tfds.features.ClassLabel(names=["cat", "dog"])},
        "none": {},
        "unlabelled": {"label": tfds.features.ClassLabel(names=LABELS)},
        "labels": {"label": tfds.features.Sequence(tfds.features.ClassLabel(names=LABELS))},
        "scalar": {"caption": tfds.features.Scalar(np.str_), "scores": np.float32},
        "strings": {"caption": tfds.features.Tensor(shape=(None,), dtype=np.str_)},
        "number": {"text": np.int64, "label": tfds.features.ClassLabel(names=LABELS)},
        "gaps": {
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "scores": tfds.features.Sequence(np.float32),
            "truth": tfds.features.Text(),
        },
    }
    values = {
        "text": {"caption": "a cat"},
        "texts": {"captions": ["a cat", "ein Kätzchen"], "scores": [0.5, 0.25], "truth": "{}"},
        "nested": {"captions": [{"text": "a cat"}, {"text": " "}]},
        "label": {"label": "dog"},
        "none": {},
        "unlabelled": {"label": -1},
        "labels": {"label": [1, -1, 0]},
        "scalar": {"caption": "a cat", "scores": 0.5},
        "strings": {"caption": ["a cat", "a dog"]},
        "number": {"text": 3, "label": "cat"},
        "gaps": {
            "captions": ["a cat", " ", "a dog"],
            "scores": [0.5, 0.25, 0.125],
            "truth": '{"captions": [{"style": "s"}, {"style": "t"}, {"style": "u"}]}',
        },
    }

    def _info(self):
        features = {"photo": tfds.features.Image(), "id": tfds.features.Text()}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features | self.captions[self.builder_config.name])
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(COUNT), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            image = io.BytesIO(encode(picture(i), "PNG"))
            yield i, {"photo": image, "id": f"n{i}", **self.values[self.builder_config.name]}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    for config in SanaToy.BUILDER_CONFIGS:
        builder = tfds.builder(f"sana_toy/{config.name}", data_dir=folder)
        builder.download_and_prepare(file_format="array_record")
    assert "tensorflow" not in sys.modules
    return folder


@pytest.mark.parametrize(
    "config, captions, scores, truth",
    [
        ("text", ["a cat"], [], ""),
        ("texts", ["a cat", "ein Kätzchen"], [0.5, 0.25], "{}"),
        ("nested", ["a cat"], [], ""),
        ("label", ["dog"], [], ""),
        ("none", [], [], ""),
        ("unlabelled", [], [], ""),
        ("labels", ["dog", "cat"], [], ""),
        ("scalar", ["a cat"], [0.5], ""),
        ("strings", ["a cat", "a dog"], [], ""),
        ("number", ["cat"], [], ""),
        (
            *("gaps", ["a cat", "a dog"], [0.5, 0.125]),
            '{"captions": [{"style": "s"}, {"style": "u"}]}',
        ),
    ],
)
def test_records(data_dir, config, captions, scores, truth):
    source = open_source(f"tfds:sana_toy/{config}", "train", data_dir)
    assert len(source) == COUNT
    records = sorted((source[i] for i in range(COUNT)), key=lambda record: record["key"])
    for i, record in enumerate(records):
        image = record.pop("image")
        assert isinstance(image, bytes) and (decode(image) == picture(i)).all()
        rest = {"key": f"n{i}", "captions": captions, "scores": scores, "truth": truth}
        assert record == rest


def test_splits_and_fingerprints(data_dir):
    specs = [("text", "train"), ("text", "test"), ("label", "train"), ("text", "train[:3]")]
    sources = [open_source(f"tfds:sana_toy/{name}", split, data_dir) for name, split in specs]
    assert [len(source) for source in sources] == [COUNT, 2, COUNT, 3]
    again = open_source("tfds:sana_toy/text", "train", data_dir)
    assert again.fingerprint == sources[0].fingerprint
    assert len({source.fingerprint for source in sources}) == len(specs)


@pytest.mark.parametrize(
    "train, test, common",
    [
        ("train", "test", 0),
        ("train[:3]", "train[3:]", 0),
        ("train[:95%]", "train[-5%:]", COUNT),  # of five records both are all
        ("train[1:4]", "train[3:]", 1),
        ("train", "train", COUNT),
    ],
)
def test_splits_that_share_records_are_refused(data_dir, train, test, common):
    sources = [open_source("tfds:sana_toy/text", split, data_dir) for split in (train, test)]
    if not common:
        check_apart(*sources, train, test)
        return
    with pytest.raises(UserError, match=f"have {common} records in common: percentages") as caught:
        check_apart(*sources, train, test)
    assert f"config.data.train_split={train} and config.data.test_split={test}" in str(caught.value)


@pytest.mark.parametrize(
    "spec, split, message",
    [
        ("sana_toi", "train", "TFDS has no data set 'sana_toi'; did you mean sana_toy"),
        ("sana_toy/txt", "train", "txt"),
        ("sana_toy/text:9.9.9", "train", "9.9.9"),
        (
            "sana_toy/text",
            "validation",
            "no split 'validation'; there are (train, test|test, train)",
        ),
        ("", "train", "tfds:"),
    ],
)
def test_what_is_not_there(data_dir, spec, split, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(f"tfds:{spec}", split, data_dir)
    assert "\n" not in str(caught.value)


def test_a_data_set_that_is_not_prepared(tmp_path):
    with pytest.raises(UserError, match="is not prepared in .*download_and_prepare"):
        open_source("tfds:sana_toy/text", "train", str(tmp_path))


def test_a_damaged_record_has_a_reason_and_its_neighbours_are_read(tmp_path):
    builder = tfds.builder("sana_toy/text", data_dir=str(tmp_path))
    builder.download_and_prepare(file_format="array_record")
    (file,) = tmp_path.rglob("*train*.array_record*")
    data = bytearray(file.read_bytes())
    place = data.index(b"\x89PNG", data.index(b"\x89PNG") + 1)  # in the second record
    data[place + 60] ^= 1
    file.write_bytes(data)
    source = open_source("tfds:sana_toy/text", "train", str(tmp_path))
    good = 0
    for i in range(COUNT):
        try:
            decode(source[i]["image"])
            good += 1
        except BadImage as error:
            assert error.reason == "unreadable"
            assert error.key == f"{file.name} record {i}"
    assert good == COUNT - 1
    (file.parent / "dataset_info.json").unlink()  # as of a mount that went away
    with pytest.raises(Retry, match="dataset_info.json cannot be read: No such file"):
        for i in range(COUNT):
            decode(source[i]["image"])


HARMS = {
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "empty": lambda data: b"",
    "list": lambda data: b"[]",
    "deep": lambda data: b"[" * 10**5,
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "*-train.array_record*"])
def test_a_damaged_file_is_named(data_dir, tmp_path, monkeypatch, name, harm):
    """Also the features, which are read where the code of the data set is not here."""
    shutil.copytree(f"{data_dir}/sana_toy/text", tmp_path / "sana_toy/text")
    (path,) = tmp_path.rglob(name)
    path.write_bytes(HARMS[harm](path.read_bytes()))
    if name == "features.json":
        known = tfds.core.registered._DATASET_REGISTRY
        monkeypatch.delitem(known, "sana_toy")
    with pytest.raises(UserError, match=f"^{path} is damaged .*prepare it anew$"):
        open_source("tfds:sana_toy/text:1.0.0", "train", str(tmp_path))


def test_a_shard_that_is_gone_is_away_or_named(data_dir, tmp_path):
    shutil.copytree(f"{data_dir}/sana_toy/text", tmp_path / "sana_toy/text")
    (path,) = tmp_path.rglob("*-train.array_record*")
    path.unlink()
    for resumes, kind in (False, UserError), (True, Retry):
        with pytest.raises(kind, match=f"^{path} is damaged .No such file or directory."):
            open_source("tfds:sana_toy/text", "train", str(tmp_path), resumes=resumes)


def test_a_shard_with_fewer_records_than_promised_is_named(data_dir, tmp_path):
    shutil.copytree(f"{data_dir}/sana_toy/text", tmp_path / "sana_toy/text")
    (train,), (test,) = (tmp_path.rglob(f"*-{name}.array_record*") for name in ("train", "test"))
    shutil.copyfile(test, train)
    with pytest.raises(UserError, match=f"^{train} is damaged .it has 2 records of {COUNT}"):
        open_source("tfds:sana_toy/text", "train", str(tmp_path))
