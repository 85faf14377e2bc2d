"""Every test runs on eight CPU devices, in true float32."""

import os

from tests import xla

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", xla.flags(devices=8))
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import torch  # noqa: E402

jax.config.update("jax_default_matmul_precision", "float32")
torch.set_num_threads(2)
