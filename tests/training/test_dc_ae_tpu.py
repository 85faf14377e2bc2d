"""The train step of configs/dc_ae_f32c32.py, compiled for a TPU slice that is not here."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import dc_ae_f32c32
from sana_jax import tpu_estimate
from sana_jax.metrics import lpips
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.sharding import MESH_AXES, batch_sharding
from sana_jax.training.autoencoder import AutoencoderTask
from sana_jax.training.dc_ae_phases import read_phase
from sana_jax.training.discriminator import Discriminator
from sana_jax.training.state import on_mesh


def step_estimate(network, phase, topology, fsdp, remat):
    """The estimate of a phase's step, with LPIPS' VGG16, over so many chips of a v5e slice."""
    mesh = tpu_estimate.tpu_mesh(topology, dict.fromkeys(MESH_AXES, 1) | {"fsdp": fsdp})
    distance = partial(lpips.lpips, tower="vgg", dtype=jnp.bfloat16)
    model = DCAE(network, jnp.bfloat16, jnp.float32, remat=remat)
    task = AutoencoderTask(model, Discriminator(dtype=jnp.bfloat16), phase, distance)
    state, _ = on_mesh(lambda: task.init(jax.random.key(0)), mesh)

    def array(shape, sharding=None):
        sharding = sharding or NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    convs, heads, channels = {}, [], 3
    for layers in lpips.TOWERS["vgg"].slices:
        for conv in filter(None, layers):
            kernel = array((conv.size, conv.size, channels, conv.channels))
            convs[str(conv.index)], channels = (kernel, array((conv.channels,))), conv.channels
        heads.append(array((channels,)))
    size = phase.image_size
    images = array((phase.batch_size, size, size, 3), batch_sharding(mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    with jax.set_mesh(mesh):
        return tpu_estimate.estimate(
            task.step,
            state,
            {"image": images},
            {"convs": convs, "heads": heads},
            donate_argnums=0,
            out_shardings=(shardings, None),
        )


def phase(name, **changes):
    found = dc_ae_f32c32.get_config().phases[name].to_dict()
    return dataclasses.replace(read_phase(found), **changes)


@pytest.mark.slow  # the TPU compiler takes minutes even for this, most of them for the VGG
def test_a_small_step_compiles_with_its_weights_sharded():
    network = DCAEConfig(
        encoder_channels=(32, 64, 128),
        decoder_channels=(32, 64, 128),
        encoder_blocks=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_blocks=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_layers=(1, 1, 1),
        decoder_layers=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        decoder_norms=("rms_norm",) * 3,
        decoder_activations=("silu",) * 3,
    )
    whole, quarter = (
        step_estimate(
            network, phase("low_resolution", image_size=64, batch_size=8), "2x2", fsdp, remat=True
        )
        for fsdp in (1, 4)
    )
    assert quarter.collectives and not whole.collectives
    # Parameters, two moments and the average: a quarter, and what has no "embed" axis or does not
    # divide (biases, depthwise kernels), a tenth of so small a network. The VGG is on every chip.
    vgg = 4 * 14_716_160
    assert quarter.argument_bytes - vgg < 0.45 * (whole.argument_bytes - vgg)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["low_resolution", "latent_adaptation", "local_refinement"])
def test_full_size_step_fits_v5e_4x4(name):
    """312 M parameters on 16 chips of 16 GB, at the config's own batch and image sizes."""
    config = dc_ae_f32c32.get_config()
    found = step_estimate(DCAEConfig(), phase(name), "4x4", 16, remat=config.remat)
    gib = 2**30
    print(
        f"{name}: {found.hbm_bytes / gib:.2f} GiB a chip, of which {found.temp_bytes / gib:.2f}"
        f" for activations; {found.seconds:.3f} s a step by the compiler's estimate, without the"
        f" collectives {found.collectives}"
    )
    assert found.hbm_bytes < found.chip.hbm_bytes
