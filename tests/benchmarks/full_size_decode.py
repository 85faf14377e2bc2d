"""Decodes one large picture in tiles and reports the peak memory.

    python -m sana_jax.random_checkpoint --out=DIR --preset=sana_600m_512 --format=diffusers
    python -m tests.benchmarks.full_size_decode DIR [SIDE=4096] [TILE=1024] [STRIDE=896]

Not part of the suite: 4096 px take a quarter of an hour on two cores. The last line has the peak
resident memory of the process, including the weights (1.25 GB in float32) and the picture.
"""

import os
import resource
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from sana_jax.checkpoints import diffusers  # noqa: E402
from sana_jax.checkpoints.components import module_for, place  # noqa: E402
from sana_jax.pipeline.tiling import tiled_decode  # noqa: E402
from sana_jax.sharding import make_mesh  # noqa: E402


def main(folder: str, side: str = "4096", tile: str = "1024", stride: str = "896"):
    config, params = diffusers.open_component(Path(folder), "vae")
    params = place(params, config, "float32", make_mesh())
    module = module_for(config, "float32")
    decode = partial(jax.jit(partial(module.apply, method="decode")), {"params": params})
    latent = int(side) // config.factor
    latents = np.random.default_rng(0).standard_normal((1, latent, latent, 32), np.float32)
    start, tiles = time.monotonic(), 0

    def watched(z):
        nonlocal tiles
        tiles += 1
        print(f"tile {tiles}, {time.monotonic() - start:.0f} s", flush=True)
        return decode(z)

    image = tiled_decode(watched, jax.numpy.asarray(latents), int(tile), int(stride), config.factor)
    assert image.shape == (1, int(side), int(side), 3) and bool(jax.numpy.isfinite(image).all())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds = time.monotonic() - start
    print(f"{side} px in {tiles} tiles of {tile}/{stride}: {seconds:.0f} s, peak {peak:.2f} GB")


if __name__ == "__main__":
    main(*sys.argv[1:])
