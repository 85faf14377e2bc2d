"""The folder of pictures: which are done, which are missing, with one writer at a time.

A picture is NUMBER_SEED.png. Its header and its line of manifest.jsonl hold the prompt and all
settings. Only complete files get a name; the next run repairs what a killed run leaves behind.
Pictures that are there are not decoded to look at them: a small file can hold very many pixels.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import reprlib
import types
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sana_jax.batch import image_files, png
from sana_jax.batch.manifest import ASIDE, Line, Manifest, key_of
from sana_jax.pictures import encode_png, in_rows, make_grid
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import check_is_file, is_local, reason_of, write_atomically
from sana_jax.runtime.lock import locked

LEFTOVER = re.compile(rf"(\d{{6,}}_\d+\.png|manifest\.jsonl({ASIDE})?|grid\.png|probe)\.part")
OWN = {"manifest.jsonl", f"manifest.jsonl{ASIDE}"}  # names beside those of pictures
THUMBNAIL, THUMBNAILS = 256, 64  # pixels a side, and how many the contact sheet shows at most
OF_GRID = "grid"  # the contact sheet's mark, where pictures have their key
CHANGED = "changed since it was drawn"
OPTIONAL = ("loras", "unconditional_mask")  # settings that only some runs have


class OutputFolder:
    """A context in which no other run writes to the folder.

    Raises UserError, naming the folder, or Retry if storage fails once pictures are being made.
    """

    def __init__(
        self,
        path: str,
        wanted: dict[str, Line],
        notes: Line,
        overwrite: bool = False,
        grid: bool = False,
        extras: Mapping[str, Line] = types.MappingProxyType({}),
    ):
        """
        Args:
          path: the folder, made if missing; it may be remote.
          wanted: file -> the settings that decide its pixels, `height` and `width` among them.
          notes: fields that every line of the manifest holds too.
          overwrite: replace pictures of other settings that have a wanted name.
          grid: whether grid.png is wanted too.
          extras: file -> further fields of its line.
        """
        self.path, self._wanted, self._notes = epath.Path(path), wanted, notes
        self._extras = extras
        self._overwrite, self._grid = overwrite, grid
        self._stack, self._done = contextlib.ExitStack(), set()
        self._manifest: Manifest | None = None

    def __enter__(self) -> "OutputFolder":
        with self._errors(), contextlib.ExitStack() as stack:
            stack.enter_context(_made(self.path))
            if is_local(self.path):
                stack.enter_context(locked(self.path))
                self._check_files()
            self._manifest = Manifest(self.path / "manifest.jsonl")
            stack.callback(self._manifest.close)
            self._survey()
            self._check_manifest()
            self._check_grid()
            for path in [*self.path.iterdir()] if self.path.exists() else ():  # no key, no folder
                if LEFTOVER.fullmatch(path.name):
                    path.unlink()
            self._manifest.set_aside()
            self._manifest.tidy()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        # What ends a run goes before what storage says of closing.
        with self._errors(Retry) if kind is None else contextlib.suppress(Exception), self._stack:
            if kind is None:
                self._manifest.sort()

    @property
    def missing(self) -> set[str]:
        """The wanted files that are still to be drawn."""
        return self._wanted.keys() - self._done

    def probe(self, size: int) -> None:
        """Writes `size` bytes and removes them, to find a full disk before any work is done."""
        part = self.path / "probe.part"
        with self._errors():
            try:
                part.write_bytes(os.urandom(size))
            finally:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)

    def save(self, file: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        """Writes a wanted picture, then its line of the manifest. Threads may call it."""
        content = encode(pixels, self._wanted[file])
        with self._errors(Retry):
            write_atomically(self.path / file, content)
            self._manifest.append(self._line(file, hashlib.sha256(content).hexdigest()))
            self._done.add(file)

    def write_grid(self) -> None:
        """Writes grid.png: the first 64 wanted pictures, small, side by side."""
        images = []
        with self._errors(Retry), _of_any_size():
            for file in [*self._wanted][:THUMBNAILS]:
                images.append(_thumbnail(self.path / file))
            columns = math.ceil(math.sqrt(len(images)))
            sheet = make_grid(in_rows(images, columns), gap=0)
            content = encode_png(sheet, pnginfo=_texts({"sana_jax": OF_GRID}))
            write_atomically(self.path / "grid.png", content)

    @contextlib.contextmanager
    def _errors(self, kind: type[Exception] = UserError) -> Iterator[None]:
        """Turns storage's errors into one line: UserError, or Retry once pictures are made."""
        try:
            yield
        except (UserError, Retry):
            raise
        except Exception as error:
            # What reads remote addresses has errors of its own, or is not installed.
            if is_local(self.path) and not isinstance(error, OSError):
                raise
            reason = f"--out={self.path}: {_name_in(self.path, error)}{reason_of(error)}"
            if self._manifest and (done := len(self._wanted) - len(self.missing)):
                reason += (
                    f"; {done} of {len(self._wanted)} images are done,"
                    " and the same command draws the others"
                )
            raise kind(reason) from error

    def _line(self, file: str, sha256: str) -> Line:
        settings = self._wanted[file]
        own = {"file": file, **settings, **self._notes, "sha256": sha256, "key": key_of(settings)}
        return own | self._extras.get(file, {})

    def _check_files(self) -> None:
        """Refuses what has one of our names and is no file: a pipe is read for ever."""
        names = {*self._wanted, *OWN, *(["grid.png"] if self._grid else [])}
        for name in os.listdir(self.path):
            if name in names or LEFTOVER.fullmatch(name):
                check_is_file(self.path / name, f"{self.path / name}")

    def _check_manifest(self) -> None:
        """Refuses a file that holds nothing of this program, where no picture is of it either."""
        found = self._manifest
        if found.strange and not found.lines and not self._overwrite:
            raise UserError(
                f"{self.path / 'manifest.jsonl'} is not of this program; move the file away, use"
                " another --out, or --overwrite to replace what is there"
            )

    def _check_grid(self) -> None:
        path = self.path / "grid.png"
        if self._grid and not self._overwrite and path.exists():
            with path.open("rb") as file:
                if png.read(file).texts.get("sana_jax") != OF_GRID:
                    raise UserError(
                        f"{path} is not of this program; use another --out, or --overwrite to"
                        " replace what is there"
                    )

    def _survey(self) -> None:
        """Finds the pictures that are done, and adds missing lines for them.

        A line for another picture stays until the picture that replaces it is written.
        """
        with ThreadPoolExecutor() as pool:
            found = dict(zip(self._wanted, pool.map(self._find, self._wanted), strict=True))
        others = [file for file, line in found.items() if isinstance(line, str)]
        if others and not self._overwrite:
            more = f" and {len(others) - 1} more are" if others[1:] else " is"
            raise UserError(
                f"{self.path / others[0]}{more} there, {found[others[0]]};"
                " use another --out, or --overwrite to replace what is there"
            )
        done = {file: line for file, line in found.items() if isinstance(line, dict)}
        self._manifest.lines.update(done)
        self._done = {*done}

    def _find(self, file: str) -> Line | str | None:
        """Returns a done picture's line, None if it is missing, or why the file is another's."""
        line, settings = self._manifest.lines.get(file), self._wanted[file]
        key = key_of(settings)
        same = line is not None and line["key"] == key
        ours = same and re.fullmatch("[0-9a-f]{64}", line["sha256"])  # else it is damaged
        try:
            with (self.path / file).open("rb") as content:
                sha256 = _sha256_of(content)
                if ours and sha256 == line["sha256"]:
                    return line | settings | self._extras.get(file, {})
                content.seek(0)
                texts, size, whole = png.read(content)
        except FileNotFoundError:
            lost = line and not same and _changes(line, settings)
            return _differences(line, settings) if lost else None
        if ours or texts.get("sana_jax") == key:
            if not whole:
                return None
            if ours or size != (settings["height"], settings["width"]):
                return CHANGED
            return self._line(file, sha256)  # the run was killed before it wrote the line
        if line is None and "settings" not in texts:
            return "of another program"
        return _differences(line or _parse(texts["settings"]), settings)


def _sha256_of(file: BinaryIO) -> str:
    found = hashlib.sha256()
    while block := file.read(png.BLOCK):
        found.update(block)
    return found.hexdigest()


def _thumbnail(path: epath.Path) -> np.ndarray:
    content = path.read_bytes()
    try:
        image = Image.open(io.BytesIO(content))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path} cannot be shown in grid.png ({error}); remove it, and the same command draws"
            " it again"
        ) from None


def _name_in(folder: epath.Path, error: Exception) -> str:
    """Returns the name of the file in `folder` that could not be read, with a colon, or nothing."""
    path = getattr(error, "filename", None)
    inside = isinstance(path, str) and os.path.dirname(path) == os.fspath(folder)
    return f"{os.path.basename(path)}: " if inside else ""


@contextlib.contextmanager
def _of_any_size() -> Iterator[None]:
    """Lets Pillow open pictures that are as large as the user has asked for."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def encode(pixels: UInt8[np.ndarray, "H W 3"], settings: dict[str, Any]) -> bytes:
    """Returns a picture's file: a PNG whose header has the settings."""
    texts = {name: str(settings[name]) for name in ("prompt", "negative_prompt", "seed")}
    texts |= {"settings": json.dumps(settings), "sana_jax": key_of(settings)}
    return encode_png(pixels, pnginfo=_texts(texts))


def _texts(texts: dict[str, str]) -> PngInfo:
    info = PngInfo()
    for name, text in texts.items():
        # Text chunks hold no half surrogates and no NUL; the JSON has them escaped.
        info.add_itxt(name, text.encode("utf-8", "replace").decode().replace("\0", ""))
    return info


def _parse(text: str) -> Line:
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(text), dict):
            return found
    return {}


def _differences(old: Line, new: Line) -> str:
    return f"of other settings ({', '.join(_changes(old, new)) or 'of another version'})"


def _changes(old: Line, new: Line) -> list[str]:
    """Names the settings that differ, such as "batch_size 8 -> 3"."""
    new = json.loads(json.dumps(new))  # tuples are lists there
    # Settings that a line has only where they were used.
    new = dict.fromkeys(name for name in (*OPTIONAL, *image_files.SETTINGS) if name in old) | new
    return [
        f"{name} {reprlib.repr(old[name]) if name in old else 'unknown'} -> {reprlib.repr(value)}"
        for name, value in new.items()
        if name not in old or old[name] != value
    ]


@contextlib.contextmanager
def _made(folder: epath.Path) -> Iterator[None]:
    """Makes a folder, and removes it again if it stays empty."""
    new = [path for path in (folder, *folder.parents) if is_local(path) and not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in new:
                os.rmdir(path)
