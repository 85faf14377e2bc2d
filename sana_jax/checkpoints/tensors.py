"""Named tensors in safetensors files: one file, or shards under an index as on Hugging Face."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import check_itself, named_file, read_json, reason_of

# safetensors' spelling of the dtypes of weights, and of the counters among them
FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": ml_dtypes.bfloat16}
INT8 = {"I8": "int8"}  # of quantised weights
_NAMES = {np.dtype(dtype): name for name, dtype in (FLOAT_DTYPES | INT8).items()} | {
    np.dtype("int64"): "I64"
}


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is read or made whenever np.asarray is called on it, and is not kept."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[np.dtype], np.ndarray]  # called with the wanted dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.load(np.dtype(dtype or self.dtype))


class TensorReader(Mapping):
    """Maps names to numpy arrays, read when asked for; bfloat16 comes as ml_dtypes.bfloat16.

    `path` is a .safetensors file or the .json index of several. `prefix` is dropped from the names
    that begin with it. Raises UserError if a file is missing, damaged, or outside the index's
    folder.

    Attributes:
      metadata: the texts in the files' headers.
    """

    def __init__(self, path: Path, prefix: str = ""):
        path = Path(path)
        if path.suffix == ".json":
            files = read_index(path)
        else:
            files = dict.fromkeys(_open(path).keys(), path)
        handles = {file: _open(file) for file in sorted(set(files.values()))}
        held = {file: set(handle.keys()) for file, handle in handles.items()}
        for name, file in files.items():
            if name not in held[file]:
                raise UserError(f"{file} lacks {name}, which {path.name} says it holds")
        self.metadata = {k: x for h in handles.values() for k, x in (h.metadata() or {}).items()}
        self._where = {n.removeprefix(prefix): (handles[f], n) for n, f in files.items()}
        if len(self._where) < len(files):
            twice = next(n for n in files if prefix + n in files)
            raise UserError(f"{path} holds {twice} twice: as {prefix}{twice} too")

    def _slice(self, name: str):
        handle, name = self._where[name]
        return handle.get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor in safetensors' spelling: F32, BF16, I64, ..."""
        return self._slice(name).get_dtype()

    def __getitem__(self, name: str) -> np.ndarray:
        handle, name = self._where[name]
        return handle.get_tensor(name)

    def __contains__(self, name) -> bool:  # Mapping's own would read the tensor
        return name in self._where

    def __iter__(self):
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class Tensors(Protocol):
    """What the readers of all formats do: names to arrays, and their shapes without reading."""

    def __getitem__(self, name: str, /) -> np.ndarray: ...
    def __contains__(self, name, /) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...


class Unprefixed(Mapping):
    """The tensors of another reader, without the prefixes that all their names share."""

    PREFIXES = "model.", "diffusion_model.", "transformer.", "module.", "_orig_mod."

    def __init__(self, reader: Tensors):
        self._reader, self._prefix, names = reader, "", list(reader)

        def longer() -> list[str]:
            tried = [self._prefix + part for part in self.PREFIXES]
            return [prefix for prefix in tried if all(n.startswith(prefix) for n in names)]

        while names and (shared := longer()):
            self._prefix = shared[0]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._prefix + name)

    def dtype(self, name: str) -> str:
        return self._reader.dtype(self._prefix + name)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._reader[self._prefix + name]

    def __contains__(self, name) -> bool:  # Mapping's own would read the tensor
        return self._prefix + name in self._reader

    def __iter__(self):
        return (name.removeprefix(self._prefix) for name in self._reader)

    def __len__(self) -> int:
        return len(self._reader)


def _open(path: Path):
    try:
        if not path.is_file():
            raise UserError(f"{path} is missing")
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be read: {reason_of(error)}") from None
        check_itself(path)
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): download it again"
        ) from None


def read_index(path: Path) -> dict[str, Path]:
    """Returns the file of each tensor, by name, from an index's .json file. Raises UserError."""
    try:
        weight_map = read_json(path).get("weight_map")
    except UserError as error:
        raise UserError(f"{path} is not an index of safetensors files: {error}") from None
    if not isinstance(weight_map, dict):
        raise UserError(f"{path} is not an index of safetensors files: it has no weight_map")
    files: dict[str, Path] = {}
    for name in weight_map.values():
        if not isinstance(name, str) or name not in files:
            files[name] = named_file(path, name)
    return {tensor: files[name] for tensor, name in weight_map.items()}


def write_tensors(
    tensors: Iterable[tuple[str, "LazyArray | np.ndarray"]],
    folder: Path,
    stem: str,
    max_shard_bytes: int = 5 * 10**9,
) -> list[Path]:
    """Writes named arrays one after the other: of lazy arrays, one at a time is in memory.

    A single shard is STEM.safetensors; more are STEM-00001-of-0000N.safetensors with an index.
    Returns the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, size, total = [[]], 0, 0
    for name, tensor in tensors:
        nbytes = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor, nbytes))
        size, total = size + nbytes, total + nbytes
    if len(shards) == 1:
        return [_write_file(folder / f"{stem}.safetensors", shards[0])]
    files, weight_map = [], {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        files.append(_write_file(folder / name, shard))
        weight_map.update({tensor: name for tensor, *_ in shard})
    index = folder / f"{stem}.safetensors.index.json"
    metadata = {"metadata": {"total_size": total}, "weight_map": weight_map}
    index.write_text(json.dumps(metadata, indent=2) + "\n")
    return [*files, index]


def _write_file(path: Path, tensors: list[tuple[str, "LazyArray | np.ndarray", int]]) -> Path:
    """Writes the safetensors format: length of the header, header, the bytes of every array."""
    # Wide types first, as the format's own writer does, so that all arrays are aligned.
    tensors = sorted(tensors, key=lambda item: -np.dtype(item[1].dtype).itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor, nbytes in tensors:
        dtype = _NAMES[np.dtype(tensor.dtype)]
        offsets = [end, end := end + nbytes]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor, nbytes in tensors:
            array = np.ascontiguousarray(on_host(tensor))
            assert array.nbytes == nbytes, name
            file.write(array.reshape(-1).view(np.uint8))
            del array  # before the next one is read
    return path


def on_host(array) -> np.ndarray:
    """Returns `array` as numpy. np.asarray would leave a copy with a jax array for its lifetime."""
    return np.asarray(jnp.copy(array) if isinstance(array, jax.Array) else array)


def numpy_dtype(name) -> np.dtype:
    """Returns the numpy dtype of a type or of its name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
