"""Estimates the cost of the transformer's blocks on one TPU chip, for the table in a README.md.

    python -m tests.benchmarks.trunk_estimate --model=1.6B --what=backward --chip=v5e

Covers all blocks, with mask and biases, in bfloat16 or forward with `--quantise`, but not
embeddings, output projection and optimizer. `forward` is of a step of sampling, which has each
layer's weights by themselves: a few layers stand for all, since more compile longer. `backward` is
forward and backward with full rematerialisation, and `lora` the same of a LoRA of rank 4 on both
attentions, below which no weight needs a gradient; both loop over the stack of all layers, or with
`--unroll` do not. FLOPs count the matrix products, linear attention and convolution, including keys
and values of the text; three times for `backward` and twice for `lora`. Needs libtpu and minutes,
for the kernels' schedules. The last line is JSON. Not a test: its figures are in a README.md.
"""

import json
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
from absl import flags
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

from sana_jax.checkpoints.components import abstract_params, in_dtype
from sana_jax.kernels.int8 import join, part
from sana_jax.lora.adapter import attach, new_adapter
from sana_jax.lora.config import LoraConfig
from sana_jax.measure import tpu_estimate
from sana_jax.models import flops
from sana_jax.models.dit import PRESETS, Block, SanaConfig
from sana_jax.models.layers import unstack
from sana_jax.models.remat import REMAT, remat_scan
from sana_jax.quantisation.table import METHODS, choose
from sana_jax.runtime import cli

MODELS = {"0.6B": ("sana_600m_1024", 16), "1.6B": ("sana_1600m_1024", 8)}
TOPOLOGIES = {"v5e": "2x2", "v6e": "2x2", "v5p": "2x2x1"}
ROWS = 300  # of text

MODEL = flags.DEFINE_enum("model", "0.6B", list(MODELS), "transformer")
WHAT = flags.DEFINE_enum("what", "forward", ["forward", "backward", "lora"], "program")
CHIP = flags.DEFINE_enum("chip", "v5e", list(TOPOLOGIES), "chip")
IMPLEMENTATION = flags.DEFINE_enum("implementation", "pallas", ["pallas", "xla"], "kernels or none")
BATCH = flags.DEFINE_integer("batch_size", None, "default: 16 for 0.6B, 8 for 1.6B", lower_bound=1)
QUANTISE = flags.DEFINE_enum("quantise", None, list(METHODS), "default: bfloat16 weights")
LAYERS = flags.DEFINE_integer("layers", None, "default: four if apart, else all", lower_bound=1)
UNROLL = flags.DEFINE_bool("unroll", False, "as config.unroll=DEPTH of a training")
SIZE = flags.DEFINE_integer("size", 1024, "pixels a side", lower_bound=32)
TOP = flags.DEFINE_integer("top", 40, "operations to list")


def main(argv: list[str]) -> None:
    del argv
    preset, batch = MODELS[MODEL.value]
    batch = BATCH.value or batch
    apart = WHAT.value == "forward"  # as pipeline/denoise.py
    config = PRESETS[preset]
    config = replace(config, depth=LAYERS.value or (4 if apart else config.depth))
    c, side = config.width, SIZE.value // 32
    _, devices = tpu_estimate.tpu_devices(f"{CHIP.value}:{TOPOLOGIES[CHIP.value]}")
    here = SingleDeviceSharding(devices[0])

    def like(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    types = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    block = Block(config, implementation=IMPLEMENTATION.value, **types)
    inputs = (
        like((batch, side, side, c)),
        like((batch, 6, c), jnp.float32),
        like((batch, ROWS, c)),
        like((batch, ROWS), jnp.bool_),
    )
    params = {"params": _weights(config, QUANTISE.value)}
    if apart:
        rest, values = part(params["params"])
        params = jax.eval_shape(unstack, rest), values
    params = jax.tree.map(lambda x: like(x.shape, x.dtype), params)

    def blocks(params, x, *rest):
        def layer(x, own, *rest):
            return block.apply(own, x, *rest)[0]

        def again(x, own):
            return jax.checkpoint(layer, policy=REMAT["full"])(x, own, *rest), None

        if apart:
            layers, values = params
            for own in layers.values():
                x = layer(x, {"params": join(own, values)}, *rest)
            return x
        if UNROLL.value:
            return jax.lax.scan(again, x, params, unroll=config.depth)[0]
        return remat_scan(layer, x, params, *rest)

    def loss(*args):
        return jnp.sum(blocks(*args).astype(jnp.float32) ** 2)

    def loss_of_lora(adapter, params, *rest):
        return loss({"params": attach(params["params"], [(adapter, 1.0)])}, *rest)

    programs = {
        "forward": (blocks, 1),
        "backward": (jax.grad(loss), 3),
        "lora": (jax.grad(loss_of_lora), 2),
    }
    fn, passes = programs[WHAT.value]
    if WHAT.value == "lora":
        lora = LoraConfig(rank=4, targets=(r"(attention|cross_attention)/[qkv]",))
        boxed = abstract_params(config)["blocks"]
        adapter = nn.unbox(jax.eval_shape(lambda: new_adapter(boxed, lora, jax.random.key(0))))
        inputs = params, *inputs
        params = jax.tree.map(lambda x: like(x.shape, x.dtype), adapter)
    count = passes * batch * flops.blocks(config, side * side, ROWS)
    found = tpu_estimate.estimate(fn, params, *inputs, chip=CHIP.value)

    for cycles, name in found.operations[: TOP.value]:
        print(f"{cycles / config.depth / 1e6:8.3f} M cycles a layer  {name[-100:]}")
    for name, (calls, kernel) in found.kernels.items():
        print(f"{name}: {calls} in {config.depth} layers, {asdict(kernel)}")
    result = {flag.name: flag.value for flag in (MODEL, WHAT, CHIP, IMPLEMENTATION, QUANTISE, SIZE)}
    result |= dict(batch=batch, layers=config.depth, unroll=UNROLL.value)
    result |= dict(cycles=found.cycles, kernel_cycles=found.kernel_cycles)
    print(json.dumps(result | dict(share_of_peak=round(found.utilisation(count), 4))))


def _weights(config: SanaConfig, quantise: str | None):
    """Returns the abstract weights of the blocks, some of them in int8, all others in bfloat16."""
    if quantise:
        choice = choose({"dit": abstract_params(config)}, quantise)
        config = replace(config, quantised=choice.quantised["dit"])
    return in_dtype(nn.unbox(abstract_params(config))["blocks"], "bfloat16")


if __name__ == "__main__":
    cli.run(main)
