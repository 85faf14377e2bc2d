"""The full-size recipes, by shapes alone."""

import importlib.util
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from sana_jax import sharding
from sana_jax.models import flops
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import PRESETS
from sana_jax.models.gemma2 import Gemma2Config
from sana_jax.training.text_to_image.abstract import abstract_training
from sana_jax.training.text_to_image.recipe import check_batches, check_figures, read_recipe

ROOT = Path(__file__).parents[3]
SIZES = {  # millions of parameters, pixels, chips that share a picture
    "sana_600m_512": (592, 512, 1),
    "sana_1600m_1024": (1604, 1024, 1),
    "sana_1600m_4096": (1604, 4096, 4),
    "sana1.5_4800m_1024": (4722, 1024, 1),
}


def config(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("name", SIZES)
def test_recipe_is_what_it_says(name):
    """On 256 chips: the size of the network, the bytes on a chip, and a step that is traced."""
    recipe, (millions, side, sharing) = config(name), SIZES[name]
    axes = tuple(recipe.mesh[name] for name in sharding.MESH_AXES)
    assert axes == (4 // sharing, 64, sharing, 1)
    mesh = jax.sharding.AbstractMesh(axes, sharding.MESH_AXES)
    check_batches(recipe, mesh)
    check_figures(recipe)
    # The authors' auto_lr: the rate of a batch of 256, times the root.
    rate = 2e-5 if name.startswith("sana1.5") else 1e-4
    scaled = rate * math.sqrt(recipe.recipe.batch_size / 256)
    np.testing.assert_allclose(read_recipe(recipe).optimizer.learning_rate, scaled)
    step, state, batch, inputs, size, count = abstract_training(recipe, mesh)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert round(numbers / 1e6) == millions
    image = batch["image"]
    assert (image.shape, image.dtype) == ((recipe.recipe.batch_size, side, side, 3), "uint8")
    # Parameters, their average and CAME's momentum, in float32, cut into 64 parts; small filters,
    # biases and factored statistics are not.
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * 4
        for tree in (state.params, state.ema, state.opt_state)
        for x in jax.tree.leaves(tree)
    )
    assert held < 1.4 * 3 * numbers * 4 / 64
    # By hand: after SANA's instruction a caption's rows look back at it too.
    gemma, latents = Gemma2Config(), side // 32
    read = flops.text(gemma, 299) + gemma.num_layers * 4 * 299 * 240 * 8 * 256
    drawn = 3 * flops.trunk(PRESETS[name], latents, latents, 300)
    assert (size, count) == (side, drawn + flops.encode(DCAEConfig(), side, side) + read)
    with jax.sharding.use_abstract_mesh(mesh):
        after, metrics = jax.eval_shape(step, state, batch, *inputs)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert {"loss", "gradient_norm", "learning_rate", "skipped", "streak"} == metrics.keys()


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_a_config_says_whether_its_transformer_takes_kernels(implementation):
    recipe = config("sana_600m_512")
    assert recipe.network.implementation == "auto"
    recipe.network.update(depth=1, implementation=implementation)
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 1), sharding.MESH_AXES)
    step, state, batch, inputs, *_ = abstract_training(recipe, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        program = str(jax.make_jaxpr(step)(state, batch, *inputs))
    assert ("pallas_call" in program) == (implementation == "pallas")
