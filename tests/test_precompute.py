"""Precomputing: stored latents and embeddings are those of online encoding; restarts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from sana_jax import SanaPipeline
from sana_jax.data.captions import CaptionChoice
from sana_jax.data.encode import Encoder, WithTokens, precompute
from sana_jax.data.images import BadImage
from sana_jax.data.loader import TrainingLoader
from sana_jax.data.orders import bucket_order
from sana_jax.data.precomputed import INDEX, Precomputed, weights_sha256
from sana_jax.data.sources import open_source
from sana_jax.data.text_image import CaptionEmbeddings, CaptionTokens, TextImageTransform
from sana_jax.data.transforms import BucketTransform, ImageTransform, StoredLatents
from sana_jax.pictures import to_float
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.sharding import make_mesh
from tests import commands, mini, toy
from tests.data import bad_files
from tests.data.bad_files import encode, picture
from tests.data.test_folder import make

ROOT = Path(__file__).parents[1]
GOOD, SIDE, INSTRUCTION = 11, 32, "Draw what is asked for: "


def run(*flags, devices=8):
    command = [sys.executable, "-m", "sana_jax.precompute", *flags]
    count = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | count)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "mini"
    mini.save(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint, tmp_path_factory):
    told = tmp_path_factory.mktemp("told") / "instruction.txt"
    told.write_text(INSTRUCTION)
    return SanaPipeline.from_pretrained(
        str(checkpoint), "float32", make_mesh(devices=toy.devices(1)), instruction_file=str(told)
    )


@pytest.fixture(scope="module")
def good():
    files = {}
    for i in range(GOOD):
        image = picture(i)
        files[f"{i:02}.png"] = encode(np.rot90(image) if i % 3 == 0 else image, "PNG")
        captions = [f"A red circle and {i} cats", "a cat" if i % 2 else "zebra \ud800"]
        files[f"{i:02}.json"] = {"captions": captions, "scores": [30.0, 20.0 + i]}
    return files


@pytest.fixture(scope="module")
def photos(good, tmp_path_factory):
    return open_source(str(make(tmp_path_factory.mktemp("photos"), good)))


@pytest.fixture(scope="module")
def encoder(pipe):
    return Encoder(pipe.checkpoint, pipe.mesh, "float32", 4)


def settings(**changes):
    fixed = {"format": 1, "split": "train", "scaling_factor": 1.0, "text": None, "seed": 5}
    return fixed | {"store": "float32", "batch": 4, "shard": 4} | changes


IMAGE = ImageTransform(SIDE, SIDE, crop="random")


def work(source, encoder, folder, image=IMAGE, /, **changes):
    folder.mkdir(exist_ok=True)
    given = settings(**{"records": len(source)} | changes)
    return precompute(source, WithTokens(image), encoder, folder, given)


def online(pipe, source, index, seed=5):
    """Latents of one record as a training on pixels has them, with the crop that was drawn."""
    image = ImageTransform(SIDE, SIDE, crop="random")
    pixels = image(source[index], np.random.default_rng((seed, index)))["image"]
    return np.asarray(pipe.encode(to_float(pixels[None])))[0]


def test_item_28_the_command_on_a_folder_of_all_kinds_of_files(pipe, checkpoint, good, tmp_path):
    """Counts add up; latents and embeddings are those of the pipeline.

    A second run, on another number of devices, has no work.
    """
    bad = {name: data for name, (data, _) in bad_files.unusable().items()}
    uncaptioned = {"no_caption.png": good["01.png"], "bad.png": good["01.png"], "bad.json": "{"}
    data = make(tmp_path / "data", good | bad | uncaptioned)
    (tmp_path / "told.txt").write_text(INSTRUCTION)
    flags = [f"--checkpoint={checkpoint}", f"--data={data}", f"--out={tmp_path / 'out'}", "--text"]
    flags += [f"--size={SIDE}", "--crop=random", "--seed=5", "--batch_size=4", "--shard=8"]
    flags += ["--store=float32", f"--instruction_file={tmp_path / 'told.txt'}"]
    result = run(*flags)
    assert result.returncode == 0, result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    source = open_source(str(data))
    expected = {}
    for reason in [reason for _, reason in bad_files.unusable().values()] + ["bad_caption"] * 2:
        expected[reason] = expected.get(reason, 0) + 1
    assert last == {"read": len(source), "used": GOOD, "rejected": expected}
    assert last["read"] == last["used"] + sum(expected.values())

    stored = open_source(f"precomputed:{tmp_path / 'out'}")
    named = [key for shard in stored.index["shards"] for key in shard["bad"]]
    assert len(named) == len(source) - GOOD and set(bad) <= set(named)
    by_key = {}
    for i in range(len(source)):
        try:
            by_key[source[i]["key"]] = i
        except BadImage:
            pass
    assert len(stored) == GOOD and stored.rows == pipe.checkpoint.text_rows
    for i in range(GOOD):
        record = stored[i]
        index = by_key[record["key"]]
        ours = online(pipe, source, index)
        assert toy.relative_error(record["latents"], ours) < 1e-6
        rows, mask = map(np.asarray, pipe.encode_prompt(source[index]["captions"]))
        for caption in range(2):
            row = CaptionEmbeddings(stored.rows)(record, caption)
            np.testing.assert_array_equal(row["mask"], mask[caption])
            assert row["embeddings"].dtype == ml_dtypes.bfloat16
            assert toy.relative_error(row["embeddings"], rows[caption]) < 4e-3  # 8 bits
    assert stored.index["text"]["instruction"] and stored.index["seed"] == 5
    hashed = weights_sha256(pipe.checkpoint.vae, pipe.params["vae"])
    assert stored.index["autoencoder"] == hashed

    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = run(*flags, devices=2)
    assert again.returncode == 0 and json.loads(again.stdout.splitlines()[-1]) == last
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_the_whole_path_to_a_batch(pipe, photos, tmp_path):
    """Precomputed latents in a training batch are those of its images, to 1e-6; in bf16 rounded."""
    tokens = CaptionTokens(pipe.checkpoint.tokenizer, 16, INSTRUCTION)
    encoder = Encoder(pipe.checkpoint, pipe.mesh, "float32", 4)
    exact = {i: online(pipe, photos, i) for i in range(GOOD)}
    for store, bar in ("float32", 1e-6), ("bfloat16", 4e-3):
        work(photos, encoder, tmp_path / store, store=store)
        source = open_source(f"precomputed:{tmp_path / store}")
        transform = TextImageTransform(StoredLatents(), tokens, CaptionChoice("score"))
        loader = TrainingLoader(source, transform, batch_size=GOOD, seed=2)
        batch = loader.batch(0)
        assert {name: str(value.dtype) for name, value in batch.items()} == {
            "latents": "float32",
            "tokens": "int32",
            "mask": "bool",
        }
        order = [loader.order[i] for i in range(GOOD)]
        assert sorted(order) == list(range(GOOD))
        for row, index in zip(batch["latents"], order, strict=True):
            assert source[index]["key"] == photos[index]["key"]
            assert toy.relative_error(row, exact[index]) < bar
            narrow = exact[index].astype(ml_dtypes.bfloat16).astype(np.float32)
            if store == "bfloat16":  # but for ties that 1e-6 decides
                assert (row == narrow).mean() > 0.99


class Interrupted:
    """A source that fails once at a record, and says which it has read."""

    def __init__(self, source, at):
        self._source, self.at, self.read, self.fingerprint = source, at, set(), source.fingerprint

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if index == self.at:
            raise Retry("the disk is away")
        self.read.add(index)
        return self._source[index]


def test_a_run_that_was_stopped_goes_on(photos, encoder, tmp_path):
    unbroken = work(photos, encoder, tmp_path / "whole")
    source, out = Interrupted(photos, at=6), tmp_path / "out"
    with pytest.raises(Retry):
        work(source, encoder, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "settings.json", "shard-00000.array_record", "shard-00000.json"
    ]  # fmt: skip
    with pytest.raises(UserError, match="not to the end"):
        Precomputed(out)
    (out / "shard-00001.tmp").write_bytes(b"what kill -9 leaves")
    source.at, source.read = None, set()
    assert work(source, encoder, out) == unbroken
    assert source.read == set(range(4, GOOD))  # the finished shard was kept
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert whole == {path.name: path.read_bytes() for path in out.iterdir()}

    # A shard that is damaged, one without its entry, and an entry without its shard are made anew.
    data = bytearray((out / "shard-00000.array_record").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "shard-00000.array_record").write_bytes(data)
    (out / "shard-00001.json").unlink()
    (out / "shard-00002.array_record").unlink()
    work(photos, encoder, out)
    assert whole == {path.name: path.read_bytes() for path in out.iterdir()}


def test_images_are_encoded_in_tiles_as_the_pipeline_does(photos, pipe, tmp_path):
    tile = (16, 12)
    encoder = Encoder(pipe.checkpoint, pipe.mesh, "float32", 4, tile=tile)
    work(photos, encoder, tmp_path / "out", tile=list(tile))
    stored = open_source(f"precomputed:{tmp_path / 'out'}")
    image, differ = ImageTransform(SIDE, SIDE, crop="random"), []
    for i in range(GOOD):
        pixels = to_float(image(photos[i], np.random.default_rng((5, i)))["image"][None])
        tiled, whole = (np.asarray(pipe.encode(pixels, tile=t))[0] for t in (tile, None))
        assert toy.relative_error(stored[i]["latents"], tiled) < 1e-6
        differ.append(toy.relative_error(whole, tiled))
    assert min(differ) > 1e-4
    with pytest.raises(UserError, match=r"other settings \(tile\)"):
        work(photos, encoder, tmp_path / "out")


def test_data_that_moved_goes_on_and_keeps_its_index(photos, encoder, tmp_path):
    work(photos, encoder, tmp_path / "out", data="photos")
    index = (tmp_path / "out" / INDEX).read_bytes()
    work(photos, encoder, tmp_path / "out", data="moved/photos")
    assert (tmp_path / "out" / INDEX).read_bytes() == index
    with pytest.raises(UserError, match=r"other settings \(source\)"):
        work(photos, encoder, tmp_path / "out", data="photos", source="others")
    for damage in b"[" * 10**5, b"[]", b"":
        (tmp_path / "out" / "settings.json").write_bytes(damage)
        with pytest.raises(UserError, match="was begun with other settings"):
            work(photos, encoder, tmp_path / "out", data="photos")


def test_buckets(photos, encoder, pipe, tmp_path):
    """A third of the pictures is upright, and every batch has one shape."""
    table = ((32, 40), (40, 32))
    image = BucketTransform(table)
    index = work(photos, encoder, tmp_path / "out", image, shard=8)
    source = Precomputed(tmp_path / "out")
    assert index["counts"]["used"] == GOOD == len(source)
    upright = [i for i in range(GOOD) if i % 3 == 0]
    for i in range(GOOD):
        record = source[i]
        number = int(record["key"][:2])
        shape = (10, 8) if number in upright else (8, 10)
        assert record["latents"].shape[:2] == shape == tuple(source.shapes[i])
        pixels = BucketTransform(table)(photos[number], np.random.default_rng((5, number)))
        ours = np.asarray(pipe.encode(to_float(pixels["image"][None])))[0]
        assert toy.relative_error(record["latents"], ours) < 1e-6
    order = bucket_order(source, table, 3)
    loader = TrainingLoader(source, StoredLatents(), batch_size=3, order=order)
    shapes = {loader.batch(step)["latents"].shape for step in range(order.length // 3)}
    assert shapes == {(3, 10, 8, 8), (3, 8, 10, 8)}


def test_what_cannot_be_precomputed(photos, encoder, pipe, tmp_path):
    too_large = ImageTransform(64, 64)
    with pytest.raises(UserError, match=r"no image can be used: 11 read, 0 used, 11 too_small; .*"):
        work(photos, encoder, tmp_path / "small", too_large)
    assert not (tmp_path / "small" / INDEX).exists()

    params = {"vae": jax.tree.map(lambda x: x * np.nan, pipe.params["vae"])}
    broken = Encoder(
        dataclasses.replace(pipe.checkpoint, params=params), pipe.mesh, "float32", batch=4
    )
    with pytest.raises(UserError, match="NaN or infinite: the weights"):
        work(photos, broken, tmp_path / "nan")

    work(photos, encoder, tmp_path / "out", shard=20)
    with pytest.raises(UserError, match=r"other settings \(batch, shard\): batch was 4, now 2"):
        work(photos, encoder, tmp_path / "out", batch=2, shard=8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds other files"):
        work(photos, encoder, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


BAD_FLAGS = [
    ([], "mini draws 64 px, where there are no buckets"),
    (["--size=30"], "--size=30 is not a multiple of 4"),
    (["--size=32", "--data=precomputed:here"], "these are latents already"),
    (["--size=32", "--tile=large"], "--tile=large: give SIZE,STRIDE in pixels, auto or none"),
    (["--size=32", "--tile=16,30"], "--tile=16,30: stride (30, 30) must lie between"),
    (["--size=32", "--beam=a=b"], "--beam needs --runner, such as DirectRunner"),
    (["--size=32", "--max_pixels=1000000000"], "max_pixels=1000000000: give 1 to 178956970"),
]


@pytest.fixture(scope="module")
def answers(checkpoint, tmp_path_factory):
    """What the command answers to each of BAD_FLAGS; it has written nothing."""
    out = tmp_path_factory.mktemp("bad") / "out"
    given = [f"--checkpoint={checkpoint}", "--data=nowhere", f"--out={out}"]
    found = commands.answers("sana_jax.precompute", BAD_FLAGS, given, ROOT, os.environ)
    assert not out.exists()
    return found


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_flags(answers, flags, words):
    status, _, stderr = answers[tuple(flags)]
    assert status == 2 and words in stderr and len(stderr.splitlines()) == 1, stderr


def test_data_that_is_away_when_the_command_goes_on_is_worth_a_retry(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text("{}")
    given = [f"--checkpoint={checkpoint}", "--data=nowhere", f"--out={tmp_path / 'out'}"]
    result = run(*given, "--size=32", devices=1)
    assert result.returncode == 75 and "nowhere: there is no such folder" in result.stderr


def test_the_hash_of_an_autoencoder(pipe):
    config, params = pipe.checkpoint.vae, pipe.params["vae"]
    first = weights_sha256(config, params)
    assert first == weights_sha256(config, jax.tree.map(np.asarray, params))
    leaves, tree = jax.tree.flatten(params)
    changed = jax.tree.unflatten(tree, [*leaves[:-1], leaves[-1] + 1])
    assert weights_sha256(config, changed) != first
    other = dataclasses.replace(config, scaling_factor=0.3)
    assert weights_sha256(other, params) != first


FULL = """
from sana_jax import precompute
from sana_jax.data import encode
from sana_jax.runtime import cli

def full(*args):
    raise OSError(28, "No space left on device")

encode.precompute = full
cli.run(precompute.main)
"""


def test_a_full_disk_is_worth_a_retry(checkpoint, good, tmp_path):
    data = make(tmp_path / "data", {"01.png": good["01.png"]})
    flags = [f"--checkpoint={checkpoint}", f"--data={data}", f"--size={SIDE}"]
    command = [sys.executable, "-c", FULL, *flags, f"--out={tmp_path / 'out'}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 75 and "out: No space left on device" in result.stderr
