"""A data set encoded by a Beam pipeline: the bytes of the one-machine command, whatever happens."""

import dataclasses
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sana_jax.data import beam
from sana_jax.data.encode import precompute
from sana_jax.data.encoding import Encoding
from sana_jax.data.precomputed import Precomputed
from sana_jax.runtime.errors import UserError
from tests import PATIENCE, mini
from tests.data.bad_files import encode, picture
from tests.data.test_folder import make

ROOT = Path(__file__).parents[2]
GOOD, SHARDS = 7, 4


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    """Seven pictures and one that is none, two a shard."""
    path = tmp_path_factory.mktemp("beam")
    mini.save(path / "mini")
    files = {f"{i}.png": encode(picture(i), "PNG") for i in range(GOOD)}
    make(path / "photos", files | {"3b.png": b"no picture"})
    return Encoding(str(path / "mini"), str(path / "photos"), size=32, batch=2, shard=2)


@pytest.fixture(scope="module")
def whole(encoding, tmp_path_factory):
    """The folder that one machine writes."""
    pytest.importorskip("apache_beam")
    folder = tmp_path_factory.mktemp("whole")
    by_one_machine(encoding, folder)
    return folder


def by_one_machine(encoding, folder):
    opened = encoding.open()
    with opened.computing():
        given = opened.source, opened.transform, opened.encoder
        precompute(*given, folder, opened.settings())


def run(encoding, folder):
    folder.mkdir(exist_ok=True)
    pipeline = beam.open_pipeline("DirectRunner", [])
    return beam.precompute_by_beam(encoding, folder, encoding.open().settings(), pipeline)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pipeline_writes_the_bytes_of_one_machine(encoding, whole, tmp_path):
    index = run(encoding, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(whole)
    assert len(index["shards"]) == SHARDS and len(Precomputed(tmp_path / "out")) == GOOD
    counts = index["counts"]
    assert (counts["read"], counts["used"]) == (GOOD + 1, GOOD)
    assert counts["rejected"]["not_an_image"] == 1


def test_an_item_that_is_given_out_again_is_not_encoded_again(encoding, whole, tmp_path):
    run(encoding, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    damaged = tmp_path / "out" / "shard-00001.array_record"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "out" / "shard-00002.json").unlink()
    run(encoding, tmp_path / "out")
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    pairs = {f"shard-0000{i}.{end}" for i in (1, 2) for end in ("json", "array_record")}
    assert changed == pairs and files_of(tmp_path / "out") == files_of(whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from sana_jax.data import precomputed
from sana_jax.data.encoding import Encoding
from tests.data import test_beam

left, write = int(sys.argv[2]), precomputed.write_json

def write_json(path, *rest):
    global left
    left -= 1
    if left < 0:  # its records are in their place, and the marker is not
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *rest)

precomputed.write_json = write_json
test_beam.run(eval(sys.argv[1]), Path(sys.argv[3]))
"""


def run_and_kill(encoding, folder, shards):
    """Runs a pipeline in another process, which kills itself after so many shards."""
    command = [sys.executable, "-c", KILLED, repr(encoding), str(shards), str(folder)]
    result = subprocess.run(command, cwd=ROOT, timeout=PATIENCE, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr


def test_a_killed_pipeline_goes_on(encoding, whole, tmp_path):
    out = tmp_path / "out"
    run_and_kill(encoding, out, 2)
    assert len(list(out.glob("shard-*.json"))) == 2
    assert len(list(out.glob("shard-*.array_record"))) == 3 and not (out / "index.json").exists()
    (out / f"shard-00003.0a1b{beam.PART}").write_bytes(b"what a worker left")
    run(encoding, out)
    assert files_of(out) == files_of(whole)


@pytest.mark.slow
def test_a_pipeline_that_is_killed_ten_times_goes_on(encoding, whole, tmp_path):
    encoding = dataclasses.replace(encoding, shard=1, batch=1)
    (tmp_path / "whole").mkdir()
    by_one_machine(encoding, tmp_path / "whole")
    for shards in random.Random(0).sample([0, 1] * 5, 10):
        run_and_kill(encoding, tmp_path / "out", shards)
    run(encoding, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_what_is_wrong_on_a_worker_is_one_line(encoding, whole, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("some latents are NaN")

    monkeypatch.setattr(beam, "encode_shard", fail)
    with pytest.raises(UserError, match=r"^some latents are NaN$"):
        run(encoding, tmp_path / "out")
    text = "Traceback ...\nsana_jax.runtime.errors.Retry: the disk is away [while running 'Encode']"
    assert beam.ERROR.search(f".RuntimeError: {text}").groups() == ("Retry", "the disk is away")
    with pytest.raises(UserError, match="--runner=NoRunner --beam=a=b: "):
        beam.open_pipeline("NoRunner", ["a=b"])


def test_without_beam_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"--runner=X needs .*pip install 'sana_jax\[beam\]'"):
        beam.open_pipeline("X", [])
