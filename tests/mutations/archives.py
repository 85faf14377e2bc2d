"""Examples of archives and of what stands beside them, and their readers."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image


def reader(spec: str) -> Callable[[Path], None]:
    """Returns what reads all records of a source; `spec` has {folder} for the example's."""

    def read(folder: Path) -> None:
        from sana_jax.data.images import BadImage
        from sana_jax.data.sources import open_source

        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        source = open_source(spec.format(folder=folder))
        for i in range(min(len(source), 5)):
            try:
                source[i]
            except BadImage as error:
                assert error.key, "a record without a key"

    return read


def read_index(folder: Path) -> None:
    """Reads an index of a tar that is kept in the cache."""
    from sana_jax.data.tar_index import _load

    (key,) = (each["key"] for each in [np.load(folder / "index.example.npz")])
    _load(folder / "index.npz", str(key))


def write(folder: Path) -> None:
    """Writes an example of each."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from etils import epath

    from sana_jax.data.tar_index import _save
    from sana_jax.data.tar_index import read_index as index_of

    content, latents, features = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 9), "teal").save(content, "PNG")
    np.save(latents, np.ones((4, 2, 2), np.float32))
    np.savez(features, caption_feature=np.ones((1, 3, 4), np.float32), attention_mask=[1, 1, 0])
    png, beside = content.getvalue(), b'{"prompt": "a cat", "width": 8}'
    for name, members in {
        "tars/0.tar": {"a.b.png": png, "a.b.json": beside, "c.png": png, "c.txt": b"a\nb"},
        "latents/0.tar": {
            "a.npy": latents.getvalue(), "a.npz": features.getvalue(), "a.json": beside
        },
    }.items():  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True)
        with tarfile.open(path, "w") as tar:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    shard = {"url": "0.tar", "nsamples": 2, "filesize": (folder / "tars/0.tar").stat().st_size}
    wids = {"wids_version": 1, "name": "x", "shardlist": [shard]}
    (folder / "tars/wids-meta.json").write_text(json.dumps(wids))
    (folder / "tars/0_A.json").write_text(json.dumps({"a.b": {"A": "a cät"}, "c": {"A": "b"}}))
    (folder / "tars/0_A_score.json").write_text(json.dumps({"a.b": {"A": "27.1", "prompt": 3}}))
    columns = {"image": [{"bytes": png, "path": "a.png"}] * 3, "captions": [["a", "b"]] * 3}
    (folder / "parquet").mkdir()
    pq.write_table(pa.table(columns), folder / "parquet/x.parquet", row_group_size=2)
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")):
        index = index_of(epath.Path(folder / "tars/0.tar"))
    for name in "index.npz", "index.example.npz":
        _save(epath.Path(folder / name), "key", index)
