"""The place where caches belong, and JAX's persistent compilation cache there."""

import os
import tempfile
from pathlib import Path

import jax
from absl import logging

from sana_jax.errors import UserError
from sana_jax.files import is_local


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/sana_jax, or ~/.cache/sana_jax. RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sana_jax")


def enable(folder: str | None = None) -> None:
    """Keeps what takes a second to compile in `folder`, for the next run; call it before the first.

    None: $XDG_CACHE_HOME/sana_jax, or ~/.cache/sana_jax, or what JAX_COMPILATION_CACHE_DIR says. A
    default that cannot be written is left alone with a warning. "": no cache. Raises UserError.
    """
    if folder == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder is None and jax.config.jax_compilation_cache_dir:
        return
    try:
        path = cache_folder() if folder is None else Path(folder)
        if is_local(path):
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        if folder is not None:
            raise UserError(f"--compilation_cache={folder}: {error}") from None
        logging.warning("compilations are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", folder or str(path))
