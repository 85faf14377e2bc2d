"""Named tensors in safetensors files: one, or shards under an index as Hugging Face has them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sana_jax.errors import UserError

FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}


class TensorReader(Mapping):
    """name -> numpy array, read when asked for; bfloat16 comes as ml_dtypes.bfloat16.

    `path` is a .safetensors file or the .json index of several. `prefix` is dropped from the names
    that begin with it. Raises UserError where a file is missing, damaged, or lies outside the
    index's folder.
    """

    def __init__(self, path: Path, prefix: str = ""):
        path = Path(path)
        if path.suffix == ".json":
            files = _read_index(path)
        else:
            files = dict.fromkeys(_open(path).keys(), path)
        handles = {file: _open(file) for file in sorted(set(files.values()))}
        held = {file: set(handle.keys()) for file, handle in handles.items()}
        for name, file in files.items():
            if name not in held[file]:
                raise UserError(f"{file} lacks {name}, which {path.name} says it holds")
        self._where = {n.removeprefix(prefix): (handles[f], n) for n, f in files.items()}

    def _slice(self, name: str):
        handle, name = self._where[name]
        return handle.get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """In safetensors' spelling: F32, BF16, I64, ..."""
        return self._slice(name).get_dtype()

    def __getitem__(self, name: str) -> np.ndarray:
        handle, name = self._where[name]
        return handle.get_tensor(name)

    def __iter__(self):
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _open(path: Path):
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        head = path.open("rb").read(64).lstrip()
        if head.startswith(b"version https://git-lfs"):
            reason = "a git-LFS pointer, not the weights: run `git lfs pull`"
        elif head[:1] == b"<":
            reason = "a web page, not the weights: download it again"
        else:
            reason = f"not a whole safetensors file ({error}): download it again"
        raise UserError(f"{path} is {reason}") from None


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        files = {name: path.parent / file for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index of safetensors files ({error!r})") from None
    for file in files.values():
        # A symbolic link, as in the hub's cache, is fine; a name that walks out is not.
        if file.parent != path.parent or file.name in ("", ".", ".."):
            raise UserError(f"{path} names a file outside its folder: {file}")
    return files


def write_tensors(
    tensors: Iterable[tuple[str, np.ndarray]],
    folder: Path,
    stem: str,
    max_shard_bytes: int = 5 * 2**30,
) -> list[Path]:
    """Writes `tensors` as they come; never more than one shard is in memory. Returns the files.

    One shard is STEM.safetensors; more are STEM-00001-of-0000N.safetensors with an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[tuple[Path, list[str]]] = []
    shard: dict[str, np.ndarray] = {}
    total = size = 0

    def flush():
        nonlocal shard, size
        part = folder / f"{stem}.part{len(parts)}"
        save_file(shard, part, metadata={"format": "pt"})
        parts.append((part, list(shard)))
        shard, size = {}, 0

    for name, array in tensors:
        array = np.ascontiguousarray(array)
        if shard and size + array.nbytes > max_shard_bytes:
            flush()
        shard[name] = array
        size += array.nbytes
        total += array.nbytes
    flush()
    if len(parts) == 1:
        return [parts[0][0].rename(folder / f"{stem}.safetensors")]
    weight_map, files = {}, []
    for i, (part, names) in enumerate(parts):
        file = part.rename(folder / f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors")
        weight_map.update(dict.fromkeys(names, file.name))
        files.append(file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    )
    return [*files, index]


def numpy_dtype(name: str) -> np.dtype:
    """A numpy dtype from the name of a floating type, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
