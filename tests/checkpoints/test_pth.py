"""The reader of .pth files: the bits of torch.load, and nothing that a file asks for is run."""

import copyreg
import io
import os
import pickle
import random
import shutil
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from sana_jax.checkpoints import pth
from sana_jax.checkpoints.pth import PthReader
from sana_jax.runtime.errors import UserError

SPELLINGS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def state_dict() -> OrderedDict:
    """Tensors of every type and every kind of view."""
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    tensors = {str(t): (10 * torch.randn(3, 4)).to(t) for t in SPELLINGS}
    tensors |= {
        "base": base,
        "shared": base,
        "transposed": base.T,
        "permuted": torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
        "rows": base[2:5],
        "a column": base[:, 3],
        "every third": torch.arange(40, dtype=torch.int64)[4::3],
        "expanded": torch.ones(3, 1).expand(3, 5),
        "overlapping": torch.arange(10.0).as_strided((4, 3), (2, 1), 1),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "the end": torch.zeros(5)[5:],
        "parameter": torch.nn.Parameter(torch.randn(2, 2, dtype=torch.bfloat16)),
        "axis of one": base[:1],
    }
    return OrderedDict(tensors)


def assert_same(reader: PthReader, theirs: dict) -> None:
    assert set(reader) == set(theirs) and len(reader) == len(theirs)
    for name, tensor in theirs.items():
        found = reader[name]
        assert reader.dtype(name) == SPELLINGS[tensor.dtype], name
        assert found.shape == reader.shape(name) == tuple(tensor.shape), name
        assert found.flags.c_contiguous and found.flags.writeable, name
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        np.testing.assert_array_equal(found.reshape(-1).view(np.uint8), bits, err_msg=name)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_same_bits_as_torch(tmp_path, protocol, container):
    path = tmp_path / "model.pth"
    torch.save(container(state_dict()), path, pickle_protocol=protocol)
    assert_same(PthReader(path), torch.load(path, weights_only=False))


def test_state_dict_of_a_module(tmp_path):
    """Whose OrderedDict carries attributes."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).half()
    torch.save(module.state_dict(), tmp_path / "model.pth")
    assert_same(PthReader(tmp_path / "model.pth"), module.state_dict())


def test_training_checkpoint(tmp_path):
    """Optimizer, scheduler and generators stand beside the weights, and do not hinder."""
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    average = {name: 0.9 * tensor for name, tensor in module.state_dict().items()}
    contents = {
        "state_dict": module.state_dict(),
        "state_dict_ema": average,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 3,
        "loss": np.float32(0.25),
        "tensor": torch.arange(3),
        "kind": (torch.bfloat16, torch.device("cpu"), torch.Size((2, 3))),
        "rng_state": {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
        },
        7: torch.zeros(1),
    }
    path = tmp_path / "epoch_3_step_100.pth"
    torch.save(contents, path)
    reader = PthReader(path)
    assert list(reader.sections) == [n for n, v in contents.items() if isinstance(v, dict)]
    assert_same(reader, {"tensor": contents["tensor"]})
    for name in ("state_dict", "state_dict_ema"):
        assert_same(PthReader(path, reader.sections[name]), contents[name])
    # NumPy 1 writes another name of the same function.
    data = member(path, "data.pkl").replace(b"numpy._core", b"numpy.core")
    rewrite(path, {"data.pkl": data})
    assert list(PthReader(path)) == ["tensor"]


def member(path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith(f"/{name}")))


def rewrite(path, changes: dict[str, bytes | None], compression=zipfile.ZIP_STORED) -> None:
    """Writes the zip again, with members replaced, or left out where the new value is None."""
    with zipfile.ZipFile(path) as archive:
        members = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {**members, **changes}.items():
            if data is not None:
                archive.writestr(f"archive/{name}", data)


def refused(path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        reader = PthReader(path)
        for name in reader:
            reader[name]
    for word in (*words, str(path)):
        assert word in str(error.value), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


# Files that ask for something


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):
        """Only so that pickle takes what comes out of a call for a function."""


class State:
    """Pickles as an object that takes a state after it is made."""

    def __init__(self, function, args, state):
        self.parts = function, args, state

    def __reduce__(self):
        return self.parts


@pytest.fixture
def sentinel(tmp_path):
    """A file that no reading may make."""
    path = tmp_path / "sentinel"
    yield path
    assert not path.exists()


def attacks(sentinel) -> dict:
    """The name to refuse -> an object that asks for it."""
    touch, code = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w')"
    return {
        "os.system": Call(os.system, touch),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "builtins.getattr": Call(Call(getattr, Call(__import__, "os"), "system"), touch),
        "shutil.copy": Call(shutil.copy, __file__, str(sentinel)),
        "torch.serialization.load": Call(torch.load, str(sentinel)),
        "argparse.Namespace": Namespace(a=1),
        "numpy.load": Call(np.load, str(sentinel)),
        "collections.defaultdict": defaultdict(list),
    }


@pytest.mark.parametrize("name", attacks(""))
@pytest.mark.parametrize("place", ["top", "value", "nested", "state", "in a tensor"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_unsafe_objects_are_refused_by_name(tmp_path, sentinel, name, place, protocol):
    evil = attacks(sentinel)[name]
    contents = {
        "top": evil,
        "value": {"weight": torch.ones(2), "x": evil},
        "nested": {"state_dict": {}, "optimizer": {"state": {0: [(evil,)]}}},
        "state": State(OrderedDict, (), {"x": evil}),
        "in a tensor": Call(torch._utils._rebuild_parameter, evil, True, OrderedDict()),
    }[place]
    path = tmp_path / "model.pth"
    torch.save(contents, path, pickle_protocol=protocol)
    refused(path, f"refused: unsafe object {name} in")


def test_the_attacks_are_live(tmp_path):
    """Or their refusal would prove nothing."""
    for name in ("os.system", "builtins.eval", "builtins.exec", "builtins.getattr", "shutil.copy"):
        path = tmp_path / name
        pickle.loads(pickle.dumps(attacks(path)[name]))
        assert path.exists(), name


def pickled(path, data: bytes) -> None:
    """A .pth file whose data.pkl is `data`; data/0 holds four floats."""
    torch.save({"x": torch.arange(4.0)}, path)
    rewrite(path, {"data.pkl": data})


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "data, words",
    [
        (b"(S'touch {}'\nios\nsystem\n.", "unsafe object os.system"),
        (b"(cos\nsystem\nS'touch {}'\no.", "unsafe object os.system"),
        (b"\x80\x02cos\nsystem\n(S'touch {}'\ntR.", "unsafe object os.system"),
        (b"\x80\x02cos\nsystem\n)\x81.", "unsafe object os.system"),
        (
            b"\x80\x04\x8c\x08builtins\x8c\x0cgetattr.eval\x93.",
            "unsafe object builtins.getattr.eval",
        ),
        (b"\x80\x02ccollections\nOrderedDict.fromkeys\n.", "OrderedDict.fromkeys"),
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
            "_rebuild_tensor_v2.__globals__",
        ),
        (b"\x80\x04\x8c\x01a\x8c\x03b\nc\x93.", "unsafe object a.b\\nc"),
        (b"\x80\x05\x96\x03\0\0\0\0\0\0\0abc.", "damaged"),  # a buffer, made before it is read
        (b"\x80\x02ctorch\nSize\nX\x03\0\0\0abc\x85R.", "damaged"),
        (b"\x80\x02\x82\xf0.", "damaged"),  # a registered extension, past find_class
        (b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R.", "damaged"),
        (b"\x80\x02" + TENSOR + b")R.", "damaged"),
        (b"\x80\x02" + TENSOR + b"(K\x01K\x02K\x03K\x04tR.", "damaged"),
        (b"\x80\x02" + TENSOR + b"(ctorch\nFloatStorage\nK\x00K\x01K\x01tR.", "damaged"),
        (b"\x80\x02ctorch\nFloatStorage\n(tR.", "damaged"),
        (b"\x80\x02ctorch\nSize\nK\x05\x85R.", "damaged"),
        (b"\x80\x02U\x07storageQ.", "damaged"),
        (b"P0\n.", "damaged"),
        (b"\x80\x02]K\x01.", "holds no state dict"),
        (b"\x80\x02K\x01.", "holds no state dict"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x63.", "damaged"),
        # Keys that take 2^40 steps to hash: a tuple of the same tuple twice, forty deep.
        (b"\x80\x02})" + b"2\x86" * 40 + b"Ns.", "damaged"),
        (b"\x80\x02}()" + b"2\x86" * 40 + b"Nu.", "damaged"),
        (b"\x80\x04\x8f()" + b"2\x86" * 40 + b"\x90.", "damaged"),
        (b"\x80\x02()" + b"2\x86" * 40 + b"Nd.", "damaged"),
        (b"\x80\x02ccollections\nOrderedDict\n])" + b"2\x86" * 40 + b"N\x86a\x85R.", "damaged"),
    ],
)
def test_hand_made_pickles(tmp_path, sentinel, data, words):
    copyreg.add_extension("os", "system", 240)
    copyreg._extension_cache[240] = os.system
    try:
        pickled(tmp_path / "model.pth", data.replace(b"{}", str(sentinel).encode()))
        refused(tmp_path / "model.pth", words)
    finally:
        copyreg.remove_extension("os", "system", 240)


def test_no_state_is_taken(tmp_path):
    """A pickle cannot change the functions that it may name, for itself or for later files."""
    names = (b"collections\nOrderedDict", b"numpy\nndarray", b"torch._utils\n_rebuild_parameter")
    for name in names:
        state = b"}U\x0c__setstate__c" + name + b"\ns"
        data = b"\x80\x02}U\x01xc" + name + b"\n" + state + state + b"\x86bs."
        pickled(tmp_path / "model.pth", data)
        assert not PthReader(tmp_path / "model.pth")
    torch.save(state_dict(), tmp_path / "next.pth")
    assert_same(PthReader(tmp_path / "next.pth"), state_dict())
    assert not hasattr(pth._inert, "__setstate__")


# Tensors that are not what they say


class Storage:
    def __init__(self, dtype=torch.FloatStorage, key="0", numel=4):
        self.pid = "storage", dtype, key, "cpu", numel


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return getattr(value, "pid", None) if isinstance(value, Storage) else None


def view(storage, offset=0, size=(4,), strides=(1,)) -> bytes:
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, strides, False, None)
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"x": tensor})
    return buffer.getvalue()


OUTSIDE = "lies outside its storage"


@pytest.mark.parametrize(
    "crafted, words",
    [
        (dict(offset=1), OUTSIDE),
        (dict(size=(5,)), OUTSIDE),
        (dict(size=(3,), strides=(2,)), OUTSIDE),
        (dict(size=(2, 2), strides=(2, 2)), OUTSIDE),
        (dict(offset=2**64), OUTSIDE),
        (dict(size=(2,), strides=(2**64,)), OUTSIDE),
        (dict(offset=5, size=(0,)), OUTSIDE),
        (dict(offset=-1), "damaged"),
        (dict(size=(-4,)), "damaged"),
        (dict(offset=3, strides=(-1,)), "damaged"),
        (dict(size=(2, 2)), "damaged"),
        (dict(offset=0.0), "damaged"),
        (dict(offset="0"), "damaged"),
        (dict(size=4), "damaged"),
        (dict(size=("4",)), "damaged"),
        (dict(size=(1,) * 65, strides=(1,) * 65), "damaged"),
        (dict(size=(2**40,), strides=(0,)), "larger than the whole file"),
        (dict(size=(2**20, 2**20), strides=(0, 0)), "larger than the whole file"),
        (dict(size=(0, 2**70), strides=(1, 1)), "larger than the whole file"),
        (dict(storage=Storage(numel=5)), "not the size"),
        (dict(storage=Storage(numel=3), size=(1,)), "not the size"),
        (dict(storage=Storage(numel=-4), size=(1,)), "not the size"),
        (dict(storage=Storage(numel=2**62), size=(1,)), "not the size"),
        (dict(storage=Storage(torch.DoubleStorage), size=(1,)), "not the size"),
        (dict(storage=Storage(numel="4")), "damaged"),
        (dict(storage=Storage(key="1")), "'data/1' is missing"),
        (dict(storage=Storage(key="../data.pkl")), "is missing"),
        (dict(storage=Storage(key="/etc/passwd")), "is missing"),
        (dict(storage=Storage(key="a\nb" * 1000)), "is missing"),
        (dict(storage=Storage(key=0)), "damaged"),
        (dict(storage=Storage(dtype=OrderedDict)), "damaged"),
        (dict(storage=Storage(dtype=torch.ComplexFloatStorage)), "torch.ComplexFloatStorage"),
        (dict(storage=()), "damaged"),
        (dict(storage=(1, 2)), "damaged"),
    ],
)
def test_impossible_views_are_refused(tmp_path, crafted, words):
    pickled(tmp_path / "model.pth", view(**{"storage": Storage(), **crafted}))
    refused(tmp_path / "model.pth", words)


@pytest.mark.parametrize(
    "crafted, expected",
    [
        (dict(), [0, 1, 2, 3]),
        (dict(offset=1, size=(2,), strides=(2,)), [1, 3]),
        (dict(size=(2, 1), strides=(1, 2**80)), [[0], [1]]),
        (dict(offset=4, size=(0,)), []),
        (dict(size=(2, 0), strides=(2**80, 1)), [[], []]),
    ],
)
def test_possible_views_are_read(tmp_path, crafted, expected):
    pickled(tmp_path / "model.pth", view(Storage(), **crafted))
    np.testing.assert_array_equal(PthReader(tmp_path / "model.pth")["x"], expected)


# Files that are damaged, or something else


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"a": torch.arange(100.0), "b": torch.arange(100.0, 300.0)[:50]}, path)
    return path


def flip(path, data: bytes) -> None:
    """Changes the last byte of the one place where the file has `data`."""
    contents = path.read_bytes()
    assert contents.count(data) == 1
    path.write_bytes(contents.replace(data, data[:-1] + bytes([data[-1] ^ 1])))


def test_bytes_are_read_when_asked_for(saved):
    """A tensor that nobody asks for may be damaged, and what a view leaves out of its storage."""
    flip(saved, np.arange(100, dtype=np.float32).tobytes())
    flip(saved, np.arange(200, 300, dtype=np.float32).tobytes())
    reader = PthReader(saved)
    np.testing.assert_array_equal(reader["b"], np.arange(100, 150))
    with pytest.raises(UserError, match="damaged: a checksum does not fit"):
        reader["a"]


def test_checksums_may_be_turned_off(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state_dict(), tmp_path / "model.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(PthReader(tmp_path / "model.pth"), state_dict())


@pytest.mark.parametrize("kept", [4, 30, 100, 1000, -500, -22, -1])
def test_truncated(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    refused(saved, "truncated")


def test_directory_that_leads_astray(saved):
    with zipfile.ZipFile(saved) as archive:
        offset = archive.getinfo("model/data/0").header_offset
    contents = bytearray(saved.read_bytes())
    contents[offset : offset + 4] = b"none"
    saved.write_bytes(contents)
    refused(saved, "'data/0' is not where it should be")


@pytest.mark.parametrize(
    "contents, words",
    [
        (b"", "not a PyTorch file"),
        (b"random bytes", "not a PyTorch file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n  <html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS pointer"),
        (pickle.dumps({"a": 1}), "not a PyTorch file"),
        (b"././@PaxHeader", "not a PyTorch file"),  # the oldest, a tar
    ],
)
def test_other_files_are_named(tmp_path, contents, words):
    path = tmp_path / "model.pth"
    path.write_bytes(contents)
    refused(path, words)


@pytest.mark.parametrize("protocol", [2, 4])
def test_old_format(tmp_path, protocol):
    """That of before 1.6, in which Inception's weights are published."""
    path = tmp_path / "model.pth"
    options = dict(_use_new_zipfile_serialization=False, pickle_protocol=protocol)
    torch.save(state_dict(), path, **options)
    if protocol == 2:
        assert_same(PthReader(path), torch.load(path, weights_only=False))
    else:
        refused(path, "not a PyTorch file")  # nobody wrote it with another protocol


def test_old_format_runs_nothing(tmp_path, sentinel):
    path = tmp_path / "model.pth"
    for contents in {"x": Call(os.system, f"touch {sentinel}")}, [torch.ones(2)]:
        torch.save(contents, path, _use_new_zipfile_serialization=False)
        refused(path, "unsafe object os.system" if isinstance(contents, dict) else "no state dict")


def test_damage_of_the_old_format_is_named_or_harmless(tmp_path):
    path = tmp_path / "model.pth"
    tensors = {"a": torch.arange(100.0), "b": torch.arange(100.0, 300.0)[:50]}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    contents, rng = path.read_bytes(), np.random.default_rng(0)
    for kept in (19, 30, 200, len(contents) - 500, len(contents) - 1):
        path.write_bytes(contents[:kept])
        refused(path, "damaged")
    refusals = 0
    for _ in range(200):
        damaged = bytearray(contents)
        for place in rng.integers(0, len(contents), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            dict(PthReader(path))
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert 50 < refusals


def test_no_file(tmp_path):
    refused(tmp_path, "is a directory")
    refused(tmp_path / "none.pth", "is missing")


def test_other_zips(saved):
    contents = saved.read_bytes()
    for changes, words in (
        ({"data.pkl": None}, "no data.pkl"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data/0": None}, "'data/0' is missing"),
        ({"data/0": bytes(404)}, "not the size"),
    ):
        rewrite(saved, changes)
        refused(saved, words)
        saved.write_bytes(contents)
    rewrite(saved, {"byteorder": None})  # as before PyTorch 2.0
    assert PthReader(saved)["a"][99] == 99
    rewrite(saved, {}, zipfile.ZIP_DEFLATED)
    refused(saved, "compressed")


def test_damage_anywhere_is_named_or_harmless(saved):
    """Bytes changed at random: a UserError or some arrays, never another exception."""
    contents, rng = saved.read_bytes(), np.random.default_rng(0)
    refusals = 0
    for _ in range(400):
        damaged = bytearray(contents)
        for place in rng.integers(0, len(contents), 3):
            damaged[place] = rng.integers(256)
        saved.write_bytes(damaged)
        try:
            dict(PthReader(saved))
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert 100 < refusals
