"""The TPU compiler gets its options before JAX loads it, and a user's own stay."""

import os
import subprocess
import sys

import pytest

from sana_jax.runtime import tpu_flags
from sana_jax.runtime.tpu_flags import OPTIONS

OURS = "--xla_tpu_scoped_vmem_limit_kib=32768"


@pytest.mark.parametrize(
    "given, set_to",
    [
        (None, OURS),
        ("--xla_a=1 --xla_b=2", f"--xla_a=1 --xla_b=2 {OURS}"),
        ("--xla_tpu_scoped_vmem_limit_kib=65536 --xla_a=1", None),
        ("-xla_tpu_scoped_vmem_limit_kib 65536", None),
    ],
)
def test_what_is_given_stays(monkeypatch, given, set_to):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    if given is not None:
        monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    tpu_flags.set_defaults()
    assert os.environ["LIBTPU_INIT_ARGS"] == (set_to or given)


def test_an_import_sets_them_and_loads_no_jax():
    program = (
        "import os, sys, sana_jax; print(os.environ['LIBTPU_INIT_ARGS'], 'jax' in sys.modules)"
    )
    environment = {name: v for name, v in os.environ.items() if name != "LIBTPU_INIT_ARGS"}
    line = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert line == f"{OURS} False\n" and len(OPTIONS) == 1
