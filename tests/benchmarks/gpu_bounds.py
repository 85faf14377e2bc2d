"""Bounds each operation that `auto` gives a kernel on a GPU, beside XLA's own form of it.

    python -m tests.benchmarks.gpu_bounds
    python -m tests.benchmarks.gpu_bounds --cards=a100 --models=1.6B --pixels=512,4096

Forward alone, and with all gradients, both forms as the network calls them, compiled for a card
that is not there; a row says the bound of either and their quotient, which must not exceed one. It
exits with 1 where one does. Needs no GPU but the extra gpu-compile, and some seconds a row. Not a
test: its figures are in sana_jax/kernels/README.md.
"""

import itertools
import sys
from functools import partial

import jax
import jax.numpy as jnp
from absl import flags

from sana_jax import sharding
from sana_jax.kernels.cross_attention import cross_attention
from sana_jax.kernels.glumbconv import api as glumbconv
from sana_jax.kernels.linear_attention import linear_attention
from sana_jax.measure.gpu_compile import gpu_devices
from sana_jax.measure.gpu_estimate import estimate
from sana_jax.measure.programs import TEXT_ROWS
from sana_jax.models.dit import PRESETS, SanaConfig
from sana_jax.runtime import cli
from tests.kernels.helpers import spec

MODELS = {"0.6B": "sana_600m_1024", "1.6B": "sana_1600m_1024"}  # 4.8B has the blocks of 1.6B
FACTOR = 32  # pixels of a latent
PASSES = "forward", "backward"

_CARDS = flags.DEFINE_list("cards", "h100", "cards")
_MODELS = flags.DEFINE_list("models", list(MODELS), "transformers")
_PIXELS = flags.DEFINE_list("pixels", "512,1024,4096", "sides of the picture")
_BATCHES = flags.DEFINE_list("batches", "2,32", "rows of the batch: of a picture with guidance, 2")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "type")
HEAD = (
    "| card | model | px | rows | operation | pass | `auto`, us | XLA, us | `auto` / XLA |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main(argv: list[str]) -> int:
    del argv
    jax.config.update("jax_platforms", "cpu")
    numbers = [list(map(int, x)) for x in (_PIXELS.value, _BATCHES.value)]
    print(HEAD, flush=True)
    worst = 0.0
    for case in itertools.product(_CARDS.value, _MODELS.value, *numbers, OPERATIONS, PASSES):
        auto, xla = (bound(*case, form) for form in ("auto", "xla"))
        worst = max(worst, auto / xla)
        cells = *case, f"{1e6 * auto:.1f}", f"{1e6 * xla:.1f}", f"{auto / xla:.2f}"
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if worst > 1:
        print(f"a kernel is bounded at {worst:.2f} of XLA's own form", file=sys.stderr)
    return int(worst > 1)


def bound(card, model, pixels, batch, name, direction, form) -> float:
    """Returns the bound of an operation in seconds, a sum over its launches."""
    described, devices = gpu_devices(f"{card}:1")
    mesh = sharding.make_mesh(devices=devices)
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    made = partial(spec, sharding=placed, dtype=_DTYPE.value)
    operands = shapes(made, PRESETS[MODELS[model]], pixels // FACTOR, batch)[name]
    forward = partial(OPERATIONS[name], PRESETS[MODELS[model]], form)

    def squares(*args):
        return jnp.sum(forward(*args).astype(jnp.float32) ** 2)

    arrays = [i for i, x in enumerate(operands) if x.dtype != jnp.bool]
    fn = forward if direction == "forward" else jax.grad(squares, argnums=arrays)
    with jax.set_mesh(mesh):
        return estimate(fn, *operands, card=described).seconds


def shapes(made, config: SanaConfig, side: int, batch: int):
    """Returns the operands of every operation."""
    width, tokens, hidden = config.width, side * side, round(config.width * config.mlp_ratio)
    text = made(batch, TEXT_ROWS, width)
    weights = made(width, 2 * hidden), made(2 * hidden), made(3, 3, 2 * hidden), made(2 * hidden)
    return {
        "linear attention": (made(batch, tokens, 3 * width),),
        "cross attention": (
            made(batch, tokens, width),
            text,
            text,
            made(batch, TEXT_ROWS, dtype=bool),
        ),
        "glumbconv": (made(batch, side, side, width), *weights, made(hidden, width)),
    }


def attend(config, form, qkv):
    """Every token to every other."""
    return linear_attention(qkv, config.head_dim, implementation=form)


def attend_to_text(config, form, q, k, v, mask):
    """As a GPU does it, with keys and values apart."""
    return cross_attention(q, (k, v), mask, config.cross_heads, form)


def mix(config, form, x, expand, bias, kernel, depthwise_bias, contract):
    """Mix-FFN with both products, which are the same in either form."""
    weights = bias, kernel, depthwise_bias
    return glumbconv.glumbconv(x, expand, weights, contract, implementation=form)


OPERATIONS = {
    "linear attention": attend,
    "cross attention": attend_to_text,
    "glumbconv": mix,
}


if __name__ == "__main__":
    cli.run(main)
