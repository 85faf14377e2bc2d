"""The devices, errors about them that a user can act on, and the cache of compiled programs."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import logging

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import is_local


def find(all_hosts: bool = False) -> list[jax.Device]:
    """Returns this host's devices, or all hosts'. Raises UserError if JAX cannot open any."""
    try:
        return jax.devices() if all_hosts else jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the latter: JAX_PLATFORMS=cuda without CUDA
        reason = (str(error).splitlines() or ["none of that kind"])[0]
        raise UserError(
            f"no device for JAX_PLATFORMS={jax.config.jax_platforms}: {reason}"
        ) from None


def describe() -> str:
    """Returns all hosts' devices in words, such as "256 x TPU v5 lite of 64 hosts"."""
    hosts = f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{hosts}"


@contextlib.contextmanager
def memory_errors(remedies: str) -> Iterator[None]:
    """Turns XLA's complaint about too little memory into a UserError that says what to try."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text or "vmem" in text.lower():  # that of a kernel is ours
            raise
        needed = re.search(r"\d[\d.]* ?(bytes|[KMGT]i?B?\b)", text)
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        raise UserError(
            "the device has too little memory"
            + (f", {limit} bytes" if limit else "")
            + (f", for the {needed[0]} asked for" if needed else "")
            + f"; try {remedies}"
        ) from error


def cache_folder() -> Path:
    """Returns $XDG_CACHE_HOME/sana_jax or ~/.cache/sana_jax. Raises RuntimeError without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sana_jax")


def enable_compilation_cache(folder: str | None = None) -> None:
    """Keeps programs that take a second or more to compile in `folder`, for later runs.

    Call it before the first program is compiled.

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
