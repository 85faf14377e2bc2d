"""The folder that pictures are written to: what is there, what is missing, one writer at a time.

A picture is NUMBER_SEED.png. Its header holds the prompt and all settings, and so does its line of
manifest.jsonl. Only whole files get a name; what a killed run leaves behind is mended by the next.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sana_jax.batch.manifest import Line, Manifest, is_local, key_of, write_whole
from sana_jax.errors import UserError

LEFTOVER = re.compile(r"(\d{6,}_\d+\.png|manifest\.jsonl|grid\.png|probe)\.part")
THUMBNAIL, THUMBNAILS = 256, 64  # pixels a side, and how many the contact sheet shows at most


class OutputFolder:
    """A context in which no other run writes to the folder. Raises UserError, naming the folder."""

    def __init__(self, path: str, wanted: dict[str, Line], notes: Line, overwrite: bool = False):
        """
        Args:
          path: the folder, made if missing; it may be remote.
          wanted: file -> the settings that decide its pixels.
          notes: what lines of the manifest hold besides.
          overwrite: replace pictures of other settings that have a wanted name.
        """
        self.path, self._wanted, self._notes = epath.Path(path), wanted, notes
        self._overwrite, self._stack = overwrite, contextlib.ExitStack()
        self._manifest: Manifest | None = None

    def __enter__(self) -> "OutputFolder":
        with self._errors(), contextlib.ExitStack() as stack:
            stack.enter_context(_made(self.path))
            if is_local(self.path):
                stack.enter_context(_locked(self.path))
            self._manifest = Manifest(self.path / "manifest.jsonl")
            stack.callback(self._manifest.close)
            self._survey()
            for path in self.path.iterdir():
                if LEFTOVER.fullmatch(path.name):
                    path.unlink()
            self._manifest.tidy()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        with self._errors():
            self._stack.__exit__(*error)

    @property
    def missing(self) -> set[str]:
        """The wanted files that are still to be drawn."""
        return self._wanted.keys() - self._manifest.lines.keys()

    def probe(self, size: int) -> None:
        """Writes `size` bytes and removes them: a full disk is found before any work is done."""
        part = self.path / "probe.part"
        with self._errors():
            try:
                part.write_bytes(os.urandom(size))
            finally:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)

    def save(self, file: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        """Writes a wanted picture, then its line of the manifest. Threads may call it."""
        content = _encode_png(pixels, self._wanted[file])
        with self._errors():
            write_whole(self.path / file, content)
            self._manifest.append(self._line(file, content))

    def write_grid(self) -> None:
        """grid.png: the wanted pictures, small, side by side; the first 64 of them."""
        images = []
        with self._errors():
            for file in [*self._wanted][:THUMBNAILS]:
                image = Image.open(io.BytesIO((self.path / file).read_bytes()))
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                images.append(image)
            columns = math.ceil(math.sqrt(len(images)))
            rows = math.ceil(len(images) / columns)
            width, height = (max(sides) for sides in zip(*(i.size for i in images), strict=True))
            sheet = Image.new("RGB", (columns * width, rows * height), "white")
            for i, image in enumerate(images):
                sheet.paste(image, (i % columns * width, i // columns * height))
            content = io.BytesIO()
            sheet.save(content, format="PNG")
            write_whole(self.path / "grid.png", content.getvalue())

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"--out={self.path}: {error.strerror or error}"
            if self._manifest and (done := len(self._wanted) - len(self.missing)):
                reason += (
                    f"; {done} of {len(self._wanted)} images are done,"
                    " and the same command draws the others"
                )
            raise UserError(reason) from error

    def _line(self, file: str, content: bytes) -> Line:
        settings = self._wanted[file]
        sha256 = hashlib.sha256(content).hexdigest()
        key = key_of(settings)
        return {"file": file, **settings, **self._notes, "sha256": sha256, "key": key}

    def _survey(self) -> None:
        """Leaves the lines of exactly those wanted pictures in the manifest that are done."""
        lines = self._manifest.lines
        with ThreadPoolExecutor() as pool:
            found = dict(zip(self._wanted, pool.map(self._find, self._wanted), strict=True))
        others = [file for file, line in found.items() if line == {}]
        if others and not self._overwrite:
            more = f" and {len(others) - 1} more are" if others[1:] else " is"
            raise UserError(
                f"{self.path / others[0]}{more} there, of other settings or another origin;"
                " use another --out, or --overwrite to replace what is there"
            )
        for file, line in found.items():
            lines.pop(file, None)
            if line:
                lines[file] = line

    def _find(self, file: str) -> Line | None:
        """The line of a picture that is done; None: it is to be drawn; {}: it is another one."""
        line, key = self._manifest.lines.get(file), key_of(self._wanted[file])
        if line and line["key"] != key:
            return {}
        try:
            content = (self.path / file).read_bytes()
        except FileNotFoundError:
            return None
        if line:
            return line if hashlib.sha256(content).hexdigest() == line["sha256"] else None
        # The run was killed before it wrote the line.
        found, whole = _read_key(content)
        if found != key:
            return {}
        return self._line(file, content) if whole else None


def _encode_png(pixels: np.ndarray, settings: dict[str, Any]) -> bytes:
    info = PngInfo()
    texts = {name: str(settings[name]) for name in ("prompt", "negative_prompt", "seed")}
    texts |= {"settings": json.dumps(settings), "sana_jax": key_of(settings)}
    for name, text in texts.items():
        # Text chunks hold no half surrogates and no NUL; the JSON has them escaped.
        info.add_itxt(name, text.encode("utf-8", "replace").decode().replace("\0", ""))
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG", pnginfo=info)
    return content.getvalue()


def _read_key(content: bytes) -> tuple[str | None, bool]:
    """The key in a PNG's header, and whether the picture can be read to its end."""
    key = None
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            key = image.info.get("sana_jax")
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return key, False
    return key, True


@contextlib.contextmanager
def _made(folder: epath.Path) -> Iterator[None]:
    """Makes a folder, and removes it again where nothing came into it."""
    new = [path for path in (folder, *folder.parents) if is_local(path) and not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in new:
                os.rmdir(path)


@contextlib.contextmanager
def _locked(folder: epath.Path) -> Iterator[None]:
    """Refuses a folder that another process has locked; the system unlocks for one that dies."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read() or "just started"
                raise UserError(f"another run ({owner}) writes to --out={folder}") from None
            except OSError:
                pass  # a file system without locks
            # The run before may have removed the file between our opening and our locking it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break
        file.truncate(0)
        file.write(f"pid {os.getpid()}, {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
