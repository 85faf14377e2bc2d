"""Compares the full-size networks with diffusers, in float32, one at a time.

    python -m sana_jax.random_checkpoint --out=DIR --preset=sana_600m_512 --format=diffusers
    python -m tests.benchmarks.full_size_parity DIR [dit] [vae] [text_encoder]

Not part of the suite: it needs 12 GB of disk, 16 GB of memory and some minutes. The exit status is
1 if a relative error is above its bar.
"""

import functools
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderDC, SanaTransformer2DModel  # noqa: E402
from transformers import Gemma2Model  # noqa: E402

from sana_jax.checkpoints import diffusers  # noqa: E402
from sana_jax.checkpoints.components import module_for, place  # noqa: E402
from sana_jax.sharding import make_mesh  # noqa: E402
from tests import toy  # noqa: E402

jax.config.update("jax_default_matmul_precision", "float32")


def ours(folder: Path, name: str, method: str, *args):
    """Returns the result of our network `name`."""
    config, params = diffusers.open_component(folder, name)
    params = place(params, config, "float32", make_mesh())
    module = module_for(config, "float32")
    apply = jax.jit(functools.partial(module.apply, method=method))
    start = time.monotonic()
    out = np.asarray(apply({"params": params}, *args))
    print(f"{name}: ours {time.monotonic() - start:.1f} s, compilation included", flush=True)
    return out


def theirs(kind, folder: Path, call):
    """Returns call(module) for a module of diffusers or transformers."""
    module = kind.from_pretrained(folder, torch_dtype=torch.float32).eval()
    start = time.monotonic()
    with torch.no_grad():
        out = call(module)
    print(f"{kind.__name__}: {time.monotonic() - start:.1f} s", flush=True)
    return out.numpy()


def dit(folder: Path):
    """Returns both velocities, and the bar of their relative error."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 16, 16, 32), np.float32)
    caption = rng.standard_normal((2, 300, 2304), np.float32)
    mask = np.arange(300)[None] < np.array([[300], [7]])
    found = ours(folder, "dit", "__call__", latents, np.full(2, 749.0, np.float32), caption, mask)

    def call(module):
        return module(
            torch.tensor(latents).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.tensor(caption),
            timestep=torch.full((2,), 749),
            encoder_attention_mask=torch.tensor(mask).int(),
        ).sample.permute(0, 2, 3, 1)

    return found, theirs(SanaTransformer2DModel, folder / "transformer", call), 1e-5


def vae(folder: Path):
    """Returns both decoded images, and the bar of their relative error."""
    latents = np.random.default_rng(0).standard_normal((1, 8, 12, 32), np.float32)
    found = ours(folder, "vae", "decode", latents)

    def call(module):
        return module.decode(torch.tensor(latents).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1)

    return found, theirs(AutoencoderDC, folder / "vae", call), 1e-5


def text_encoder(folder: Path):
    """Returns both hidden states, and the bar of their relative error."""
    tokens = np.random.default_rng(0).integers(4, 500, (1, 64)).astype(np.int32)
    found = ours(folder, "text_encoder", "__call__", tokens)
    call = lambda module: module(torch.tensor(tokens).long())[0]  # noqa: E731
    return found, theirs(Gemma2Model, folder / "text_encoder", call), 2e-5


def main(folder: str, *names: str) -> int:
    failed = 0
    for name in names or ("dit", "vae", "text_encoder"):
        found, expected, bar = globals()[name](Path(folder))
        error, largest = toy.relative_error(found, expected), np.abs(found - expected).max()
        print(f"{name}: relative error {error:.2e} (bar {bar:.0e}), largest {largest:.2e}")
        failed += error > bar
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
