"""Every test runs on eight CPU devices, in true float32, and checks the shapes in annotations."""

import ctypes
import gc
import os
import tempfile
from pathlib import Path

from tests import xla

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", xla.flags(devices=8))
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests import annotations  # noqa: E402

# Before any test imports them; commands that tests start are not checked.
jaxtyping.install_import_hook(annotations.MODULES, f"{annotations.__name__}.check_arrays")

jax.config.update("jax_default_matmul_precision", "float32")

# Commands that tests start keep their programs for one another, and none in the user's own folder;
# a worker has the folder of the process that started it.
PROGRAMS = tempfile.TemporaryDirectory(prefix="programs-", ignore_cleanup_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", PROGRAMS.name)
os.environ["XDG_CACHE_HOME"] = PROGRAMS.name  # of the indices of tars
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Not so this process: its estimates for TPUs have to compile, and JAX asks only once for a cache.
jax.config.update("jax_compilation_cache_dir", None)

torch.set_num_threads(1)  # networks are small here, and workers share the cores
LIBC = ctypes.CDLL(None)
FORGET_ABOVE = 2 * 2**30  # bytes; forgetting takes a second, a process without programs 0.6 GiB


def pytest_collection_finish():
    """Spares Python the search for garbage in what is imported by now: a fifth of tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Gives back the memory of the programs that files of tests have compiled, once it is much."""
    yield
    if _resident_bytes() > FORGET_ABOVE:
        jax.clear_caches()
        gc.collect()
        if hasattr(LIBC, "malloc_trim"):  # glibc keeps what is free: 250 MB after Gemma's tests
            LIBC.malloc_trim(0)


def _resident_bytes() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return float("inf")
    return pages * os.sysconf("SC_PAGE_SIZE")
