"""Finds the folder of a named checkpoint: native, diffusers, bundled or on the hub."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from sana_jax.checkpoints import diffusers
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import is_full, named, sha256_of

ASSETS = Path(__file__).parent.parent / "assets"
# Every checkpoint has one of these files: native, diffusers, an autoencoder alone.
WHOLE = "model.json", "model_index.json"
MARKERS = *WHOLE, "config.json"
# The files of a hub repository that we read besides its weights, which are fetched by variant.
HUB_FILES = ["*.json", "tokenizer/*"]
LORA = "pytorch_lora_weights.safetensors"  # as diffusers names it, in a folder or on the hub


def checkpoint_hash(folder: Path, variant: str | None = None) -> str:
    """Returns a hash of all that a native or a diffusers folder draws with.

    For a native folder it is the hash of model.json, which holds the hash of every other file. For
    a diffusers folder it covers every byte of the files that are read for `variant`; the hub's
    cache has hashed its large files already.
    """
    folder = Path(folder)
    if (folder / "model.json").is_file():
        return file_sha256(folder / "model.json")
    digest = hashlib.sha256()
    for file in diffusers.files(folder, variant):
        digest.update(f"{file.relative_to(folder).as_posix()} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file.

    A large file in the hub's cache is a link to a file named by its sha256, and is not read.
    """
    target = path.resolve().name
    if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", target):
        return target
    return sha256_of(path)


def find(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """Returns the folder of a checkpoint; downloads it if `name` is a hub id.

    The hub cache's folder of a repository, models--ORG--NAME, stands for its only snapshot. Raises
    UserError, or Retry if the hub does not answer.
    """
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"a checkpoint is named by a text, not by {name!r}")
    name = named(name)
    if not isinstance(revision, str | None):
        raise UserError(f"revision {revision!r} is no text")
    if page := re.match(r"https?://(?:huggingface\.co|hf\.co)/([^/\s?#]+/[^/\s?#]+)", name):
        raise UserError(f"{name} is a page of the hub: give the id alone, {page[1]}")
    if "://" in name:
        raise UserError(f"{name}: checkpoints are read from local folders; copy it to one first")
    path = Path(name)
    is_folder, is_file = _look(path, "checkpoint")
    if is_file:
        raise UserError(_of_file(path, name))
    if is_folder:
        if revision:
            raise UserError(f"{name} is a folder, which has no revision {revision!r}")
        if _has_one(path, MARKERS):
            return path
        if name in bundled():  # the folder holds something else, such as the data set
            return bundled()[name]
        return _only_snapshot(path, name)
    if name in bundled():
        return bundled()[name]
    if _is_hub_id(name):
        return _download(name, revision, variant)
    names = " or ".join(bundled()) or "none yet"
    no_hub = f"; {path.parent} is a folder here, so that it is no hub id" * _is_mistyped(path)
    raise UserError(
        f"no checkpoint {name!r}: give a native folder, a diffusers folder, "
        f"a bundled name ({names}) or a hub id (org/name){no_hub}"
    )


def find_lora(name: str) -> Path:
    """Returns the file of a LoRA: the file itself, that of a folder, or that of a hub id.

    Raises UserError, or Retry if the hub does not answer.
    """
    name = named(name)
    path = Path(name)
    is_folder, is_file = _look(path, "LoRA")
    if is_file:
        return path
    if is_folder:
        if (path / LORA).is_file():
            return path / LORA
        # A training has its LoRA in model/.
        inside = [*sorted(path.glob("*.safetensors")), *path.glob(f"model/{LORA}")]
        others = " or ".join(map(str, inside[:4]))
        raise UserError(f"{name} has no {LORA}" + f": give {others}" * bool(others))
    if _is_hub_id(name) and path.suffix != ".safetensors":
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()
        with _fetching(name):
            return Path(huggingface_hub.hf_hub_download(name, LORA))
    raise UserError(
        f"no LoRA {name!r}: give a .safetensors file, a folder with {LORA}, or a hub id (org/name)"
    )


def _look(path: Path, what: str) -> tuple[bool, bool]:
    """Returns whether a folder, and whether a file, is there. Raises UserError for a bad name."""
    try:
        return path.is_dir(), path.is_file()
    except OSError as error:
        raise UserError(f"no {what} {os.fspath(path)!r:.60}: {error.strerror}") from None


def _is_hub_id(name: str) -> bool:
    path = Path(name)
    local = path.is_absolute() or name.startswith(".") or _is_mistyped(path)
    return name.count("/") == 1 and not local


def _is_mistyped(path: Path) -> bool:
    """Returns True if the parent is a folder here: a mistyped path rather than a hub id."""
    return path.parent != Path(".") and path.parent.is_dir()


def convert_command(source: str | os.PathLike, *flags: str) -> str:
    """Returns the command that makes a native folder of `source`, for messages."""
    return " ".join(
        ("python -m sana_jax.convert", f"--source={source}", *flags, "--out=NATIVE_DIR")
    )


def _has_one(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def _of_file(path: Path, name: str) -> str:
    """Returns why a file is no checkpoint, and what to give instead."""
    for folder in path.absolute().parents[:2]:
        if _has_one(folder, WHOLE):
            return f"{name} is a file of a checkpoint: give the folder {folder}"
    if path.suffix in (".pth", ".safetensors"):
        command = convert_command(name, "--rest=DIR")
        return f"{name} has to be converted before it is used: {command}"
    return f"{name} is a file; name the folder of the checkpoint that it belongs to"


def _only_snapshot(path: Path, name: str) -> Path:
    """Returns the only snapshot in the hub cache's folder of a repository. Raises UserError."""
    cached = path / "snapshots" if (path / "snapshots").is_dir() else path
    is_cache = cached.name == "snapshots"
    marks = MARKERS if is_cache else WHOLE
    inside = [child for child in sorted(cached.iterdir()) if _has_one(child, marks)]
    if is_cache and len(inside) == 1:
        return inside[0]
    lacks = f"{name} has neither model.json (native) nor model_index.json (diffusers)"
    if (path / LORA).is_file():
        lacks += f", but a LoRA: give the checkpoint that it is of, and this by --lora={name}"
    elif inside:
        lacks += f": give {' or '.join(map(str, inside[:4]))}"
    elif is_cache:
        lacks += ", and no whole snapshot of the hub: give its id, org/name, to fetch it"
    elif _has_one(path.parent, WHOLE):
        lacks += f": give {path.parent}"
    elif (path / "checkpoints").is_dir():  # of a training, or of NVlabs'
        source = next(iter(sorted(path.glob("checkpoints/*.pth"))), name)
        flags = () if source == name else ("--rest=DIR",)
        lacks += f": convert it first, {convert_command(source, *flags)}"
    elif (path / "transformer" / "config.json").is_file():
        lacks += f": convert its transformer first, {convert_command(name, '--rest=DIR')}"
    raise UserError(lacks)


def bundled() -> dict[str, Path]:
    """Returns the folders of the checkpoints that come with the package, by name."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*/model.json"))}


def _download(name: str, revision: str | None, variant: str | None) -> Path:
    """Fetches a hub repository's configs and needed weights; returns its folder in the cache."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # our own errors say what is missing
    fetch = partial(huggingface_hub.snapshot_download, name, revision=revision)
    # The files of a variant have its name between two dots; plain files have one dot.
    plain = dict(allow_patterns=["*.safetensors"], ignore_patterns=["*.*.safetensors"])
    with _fetching(name):
        folder = Path(fetch(allow_patterns=HUB_FILES))
        if not _has_one(folder, MARKERS):
            raise UserError(
                f"{name} has no {' or '.join(MARKERS)}; of NVlabs' repositories give the one whose"
                " name ends in _diffusers, or convert a .pth file of it"
            )
        if not (folder / "model.json").is_file():
            diffusers.component_names(folder)  # raises for other kinds, before gigabytes are here
        # From here on by commit: a branch may move before the next call.
        fetch = partial(huggingface_hub.snapshot_download, name, revision=folder.name)
        if variant:
            fetch(allow_patterns=[f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"])
            files = folder.rglob(f"*.{variant}*.safetensors")
            there = {path.relative_to(folder).parent.as_posix() for path in files}
            if not there:
                raise UserError(f"{name} has no files of variant {variant!r}")
            if "." in there:  # an autoencoder alone has no other weights
                return folder
            plain["allow_patterns"] = [
                f"{part}/*.safetensors" for part, *_ in diffusers.COMPONENTS.values()
            ]
            plain["ignore_patterns"] += [f"{part}/*" for part in there]
        fetch(**plain)
        return folder


@contextlib.contextmanager
def _fetching(name: str) -> Iterator[None]:
    """Turns the errors of the hub into UserError, or into Retry where it does not answer."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except Exception as error:  # each transport raises errors of its own
        away = _is_away(error) and not huggingface_hub.constants.HF_HUB_OFFLINE
        if not (away or isinstance(error, HfHubHTTPError | HFValidationError | OSError)):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        message = f"{name} is no folder here, and fetching it from the hub failed: {reason}"
        raise (Retry if away else UserError)(message) from error


def _is_away(error: Exception) -> bool:
    """Returns True if the same download may succeed later."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        return status is None or status in (408, 429) or status >= 500
    # The transport errors of httpx are no OSErrors; hf_xet raises RuntimeError.
    lost = isinstance(error, LocalEntryNotFoundError | ConnectionError | TimeoutError)
    lost = lost or (isinstance(error, OSError) and is_full(error))
    return lost or type(error) is RuntimeError or type(error).__module__.startswith("httpx")
