"""Options of the TPU compiler, which reads them from the environment once, when JAX loads it.

`sana_jax` sets them on import, so before that; what a user sets stays.
"""

import os

# The VMEM that a product's own blocks may take, KiB. With XLA's 16 MiB the weights of Mix-FFN have
# to come in parts, and each part reads the tokens again. A v5p has 64 MiB, a v5e or v6e 128.
OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": 32768}


def set_defaults() -> None:
    """Adds the options that LIBTPU_INIT_ARGS does not name to it."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    ours = (f"--{name}={value}" for name, value in OPTIONS.items() if name not in given)
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([given, *ours]).strip()
