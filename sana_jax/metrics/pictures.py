"""The pictures that are measured: a folder of images, or the folder of a batch run.

A batch run's pictures and their prompts are those of its manifest.jsonl; other files there, such as
the contact sheet, are no pictures of it. In any other folder the captions of a/b.jpg stand in the
files beside it, as for a training (data/sidecars.py).
"""

from etils import epath

from sana_jax.batch.manifest import Manifest
from sana_jax.data.folder import Folder
from sana_jax.data.images import BadImage
from sana_jax.data.records import Fingerprinted, NoData, Record, Source
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import UNREACHABLE, named, reason_of


class BatchRun:
    """The records of a folder that `sample` wrote, in the order of their names."""

    def __init__(self, root: epath.Path):
        self.root = root
        lines = Manifest(root / "manifest.jsonl").lines
        if not lines:
            raise NoData(f"{root}: its manifest.jsonl names no picture")
        self._lines = [lines[name] for name in sorted(lines)]
        # A text that changes when a picture does.
        self.listing = "".join(line["file"] + line["sha256"] for line in self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        line, prompt = self._lines[index], self._lines[index].get("prompt")
        try:
            image = (self.root / line["file"]).read_bytes()
        except OSError as error:
            raise BadImage("unreadable", f"{line['file']}: {reason_of(error)}") from None
        captions = [prompt] if isinstance(prompt, str) else []
        return Record(key=line["file"], image=image, captions=captions, scores=[], truth="")

    def key_of(self, index: int) -> str:
        return self._lines[index]["file"]


def open_pictures(folder: str, flag: str) -> Source:
    """Opens a folder of pictures; `flag` names it in messages. Raises UserError."""
    root = epath.Path(named(folder))
    try:
        if not root.is_dir():
            raise UserError(f"--{flag}={folder}: there is no such folder of pictures")
        if (root / "manifest.jsonl").exists():
            run = BatchRun(root)
            return Fingerprinted(run, run.listing)
        pictures = Folder(root)
        return Fingerprinted(pictures, pictures.listing)
    except UNREACHABLE as error:
        raise UserError(f"--{flag}={folder}: {reason_of(error)}") from None
