"""Reads PyTorch's .pth files without PyTorch, and without running any code that they name.

Such a file is a zip: NAME/data.pkl pickles nested containers, NAME/data/KEY holds the bytes of a
storage, and a pickled tensor is a view (offset, shape, strides) of a storage. A file of before
PyTorch 1.6 is a row of pickles, the fourth of which are the containers, and then the storages, each
after its length. A pickle may name any function for its reader to call: our reader knows a few
names, which only note what a tensor is. Bytes are read when a tensor is asked for.
"""

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from sana_jax.checkpoints.tensors import numpy_dtype
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import check_itself

TORCH = "Double  Float   Half    BFloat16 Long  Int   Short Char Byte  Bool".split()
NUMPY = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
NAMES = "F64     F32     F16     BF16     I64   I32   I16   I8   U8    BOOL".split()
DTYPES = [numpy_dtype(name) for name in NUMPY]
# Names in the states of random generators and optimizers, which we do not need.
INERT = (
    *("_codecs.encode", "numpy.dtype", "numpy.ndarray", "torch.device"),
    *(f"numpy.{c}.multiarray.{n}" for c in ("core", "_core") for n in ("_reconstruct", "scalar")),
    *(f"torch.{name}" for name in NUMPY),
)
SETS = pickle.EMPTY_SET + pickle.ADDITEMS + pickle.FROZENSET
BUFFERS = pickle.BYTEARRAY8 + pickle.NEXT_BUFFER + pickle.READONLY_BUFFER
HEADER = b"PK\x03\x04"  # of a zip, and of each of its members
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # with which a file of before 1.6 begins
MOST_PICKLED = 2**26  # bytes of a legacy file's pickles, of which the largest known has 100 kB


class _Member(NamedTuple):
    start: int  # in the file, in bytes
    size: int
    crc: int


class _Tensor(NamedTuple):
    member: _Member
    dtype: np.dtype
    offset: int  # in elements, like strides and extent
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    extent: int  # length of the part of the storage that the tensor spans


class PthReader(Mapping):
    """Maps the names of the tensors at the top of a .pth file to numpy arrays.

    bfloat16 comes as ml_dtypes.bfloat16. `sections` are the dicts that a training checkpoint holds
    besides: give one as `contents` to read its tensors. Raises UserError if the file is missing,
    damaged or of another kind, or asks for a function that tensors do not need.
    """

    def __init__(self, path: Path, contents: dict | None = None):
        self.path = Path(path)
        contents = _contents(self.path) if contents is None else contents
        named = {k: v for k, v in contents.items() if isinstance(k, str)}
        self._tensors = {k: v for k, v in named.items() if isinstance(v, _Tensor)}
        self.sections = {k: v for k, v in named.items() if isinstance(v, dict)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor in safetensors' spelling: F32, BF16, I64, ..."""
        return NAMES[DTYPES.index(self._tensors[name].dtype)]

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        width = tensor.dtype.itemsize
        # With strides of zero, a few bytes could become a tensor of any size.
        if math.prod(max(n, 1) for n in tensor.shape) * width > self.path.stat().st_size:
            raise _damaged(self.path, f"{name!r:.100} is larger than the whole file")
        data = _read(self.path, tensor.member, tensor.offset * width, tensor.extent * width)
        strides = [stride * width for stride in tensor.strides]
        view = as_strided(np.frombuffer(data, tensor.dtype), tensor.shape, strides)
        return np.asarray(view, order="C")

    def __contains__(self, name) -> bool:  # Mapping's own would read the tensor
        return name in self._tensors

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _inert(*args):  # stands for an object that is not built, and for its constructor
    return _inert


def _size(shape: tuple) -> tuple:
    if not isinstance(shape, tuple):  # of a long text it would make a tuple of any length
        raise pickle.UnpicklingError
    return shape


class _Unpickler(pickle._Unpickler):  # C's unpickler cannot be kept from setting objects' states
    """Unpickles containers and tensors; it knows the names in `known` and calls nothing else."""

    dispatch = dict(pickle._Unpickler.dispatch)
    # EXT reaches objects past find_class; DICT and the sets hash what they hold, see set_items;
    # the buffers take memory before their bytes are looked for. No tensor needs any of them.
    for code in pickle.EXT1 + pickle.EXT2 + pickle.EXT4 + pickle.DICT + SETS + BUFFERS:
        del dispatch[code]

    def __init__(self, path: Path, stream: io.BytesIO):
        super().__init__(stream, encoding="utf-8")
        self.path = path
        self.known = {
            "collections.OrderedDict": lambda: OrderedDict(),  # and then filled
            "torch.Size": _size,
            "torch._utils._rebuild_tensor_v2": self.rebuild_tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch.storage.UntypedStorage": np.dtype(np.uint8),
            **{f"torch.{t}Storage": dtype for t, dtype in zip(TORCH, DTYPES, strict=True)},
            **dict.fromkeys(INERT, _inert),
        }

    def load(self) -> Any:
        try:
            return super().load()
        except UserError:
            raise
        except Exception as error:  # on damaged bytes an unpickler may raise anything
            raise _damaged(self.path, f"{type(error).__name__} in its pickles") from None

    def locate(self, key: str, count: int, width: int) -> _Member:
        """Returns where a storage of `count` elements is, each of `width` bytes."""
        raise NotImplementedError

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in self.known:
            return self.known[f"{module}.{name}"]
        module = {"posix": "os", "nt": "os", "__builtin__": "builtins"}.get(module, module)
        what = repr(f"{module}.{name}")[1:-1]  # on one line, whatever the name holds
        raise UserError(f"refused: unsafe object {what:.100} in {self.path}")

    def load_build(self) -> None:
        self.stack.pop()  # an object's state: no object here needs one

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.set_items(items[::2], items[1::2])

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key], [value])

    dispatch[pickle.SETITEM[0]] = load_setitem

    def set_items(self, keys: list, values: list) -> None:
        # Hashing a tuple that holds one tuple twice, nested forty deep, would take for ever.
        if not all(type(key) in (str, int) for key in keys):
            raise pickle.UnpicklingError
        self.stack[-1].update(zip(keys, values, strict=True))

    def persistent_load(self, pid: Any) -> tuple[_Member, np.dtype]:
        _, dtype, key, _, count, *view = pid
        if view not in ([], [None]) or type(key) is not str or type(count) is not int:
            raise pickle.UnpicklingError
        return self.locate(key, count, dtype.itemsize), dtype

    def rebuild_tensor(self, storage, offset, shape, strides, *_) -> _Tensor:
        member, dtype = storage
        whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
        if not whole or len(shape) > 32:
            raise pickle.UnpicklingError
        steps = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
        extent = 0 if 0 in shape else 1 + sum(steps)
        if (offset + extent) * dtype.itemsize > member.size:
            raise _damaged(self.path, f"a tensor {list(shape)} lies outside its storage")
        # An axis that never steps may have any stride, even one that numpy does not take.
        strides = tuple(s if extent and n > 1 else 0 for n, s in zip(shape, strides, strict=True))
        return _Tensor(member, dtype, offset, tuple(shape), strides, extent)


class _Zip(_Unpickler):
    """Unpickles the containers of a zip."""

    def __init__(self, path: Path):
        members = _directory(path)
        tops = [n.removesuffix("data.pkl") for n in members if n.endswith("/data.pkl")]
        if len(tops) != 1:
            raise UserError(f"{path} is a zip file but not PyTorch's: it has no data.pkl")
        self.members = {n.removeprefix(tops[0]): info for n, info in members.items()}
        self.path = path
        if "byteorder" in self.members and _read(path, self.member("byteorder")) != b"little":
            raise UserError(f"{path} is big-endian: save it again on a little-endian machine")
        super().__init__(path, io.BytesIO(_read(path, self.member("data.pkl"))))

    def locate(self, key: str, count: int, width: int) -> _Member:
        member = self.member("data/" + key)
        if count * width != member.size:
            raise _damaged(self.path, f"{key!r:.100} has not the size that data.pkl says")
        return member

    def member(self, name: str) -> _Member:
        info = self.members.get(name)
        if info is None:
            raise _damaged(self.path, f"{name!r:.100} is missing")
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not stored or info.flag_bits & 1:
            raise UserError(f"{self.path}: {name!r:.100} is compressed or encrypted")
        header = _read(self.path, _Member(info.header_offset, 30, 0))
        if header[:4] != HEADER:
            raise _damaged(self.path, f"{name!r:.100} is not where it should be")
        names = sum(struct.unpack("<HH", header[26:]))
        return _Member(info.header_offset + 30 + names, info.file_size, info.CRC)


class _Legacy(_Unpickler):
    """Unpickles a part of a file of before 1.6; `members` are where its storages are, by key."""

    def __init__(self, path: Path, stream: io.BytesIO, members: Mapping[str, _Member] | None):
        super().__init__(path, stream)
        self.members = members
        self.found: dict[str, tuple[int, int]] = {}  # key -> elements, and bytes of each

    def locate(self, key: str, count: int, width: int) -> _Member:
        if self.found.setdefault(key, (count, width)) != (count, width) or count < 0:
            raise pickle.UnpicklingError
        # Where storages are stands behind the containers, which are read twice.
        return _Member(0, count * width, 0) if self.members is None else self.members[key]


def _contents(path: Path) -> dict:
    """Returns what a file pickles, with tensors that know their bytes. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is {'a directory' if path.is_dir() else 'missing'}")
    with path.open("rb") as file:
        is_legacy = file.read(len(LEGACY)) == LEGACY
    contents = _legacy_contents(path) if is_legacy else _Zip(path).load()
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds no state dict")
    return contents


def _legacy_contents(path: Path) -> Any:
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(MOST_PICKLED))

    def read(members: Mapping[str, _Member] | None = None) -> tuple[Any, dict]:
        unpickler = _Legacy(path, stream, members)
        return unpickler.load(), unpickler.found

    _, (version, _), (system, _) = read(), read(), read()
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UserError(
            f"{path} is of a PyTorch that is too old, or of a big-endian machine: load and save it"
            " once in a newer PyTorch"
        )
    start = stream.tell()
    _, storages = read()
    keys, _ = read()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise _damaged(path, "its list of storages is not theirs")
    members, place = {}, stream.tell()
    for key in keys:
        count, width = storages[key]
        if bytes(_read(path, _Member(place, 8, 0))) != count.to_bytes(8, "little"):
            raise _damaged(path, f"{key!r:.100} has not the size that its tensors say")
        members[key] = _Member(place + 8, count * width, 0)
        place += 8 + count * width
    if place > path.stat().st_size:
        raise _damaged(path, "it is truncated")
    stream.seek(start)
    return read(members)[0]


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}; download it again")


def _read(path: Path, member: _Member, start: int = 0, size: int | None = None) -> memoryview:
    """Returns bytes of a member; its checksum is compared if the whole member is read."""
    size = member.size if size is None else size
    start += member.start
    if start < 0 or start + size > path.stat().st_size:
        raise _damaged(path, "it is truncated")
    data = np.fromfile(path, np.uint8, size, offset=start).data
    # torch.save writes a checksum of zero if checksums are turned off.
    if size == member.size and member.crc and zlib.crc32(data) != member.crc:
        raise _damaged(path, "a checksum does not fit")
    return data


def _directory(path: Path) -> dict[str, zipfile.ZipInfo]:
    with path.open("rb") as file:
        if file.read(len(HEADER)) != HEADER:
            check_itself(path)
            raise UserError(f"{path} is not a PyTorch file")
        try:
            return {info.filename: info for info in zipfile.ZipFile(file).infolist()}
        except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError):
            raise _damaged(path, "it is truncated, or its end is wrong") from None
