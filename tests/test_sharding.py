"""The mesh and the rule table."""

import ast
import dataclasses
import functools
import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from sana_jax import models, sharding
from sana_jax.checkpoints.components import abstract_params, module_for
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import PRESETS, SanaConfig
from sana_jax.models.gemma2 import Gemma2Config
from sana_jax.runtime.errors import UserError
from tests import toy

NETWORKS = {
    "dit": PRESETS["sana1.5_1600m_1024"],
    "vae": DCAEConfig(),
    "text_encoder": Gemma2Config(),
}


def specs(config):
    tree = nn.get_partition_spec(abstract_params(config))
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, P))


def constrained_names() -> set[str]:
    """The names that networks give the axes of their activations, read from their source."""
    calls = (
        node
        for file in Path(models.__path__[0]).glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "constrain"
    )
    names = [a.value for call in calls for a in call.args[1:] if isinstance(a, ast.Constant)]
    return {name for name in names if name is not None}


def test_every_name_has_a_rule_and_every_rule_a_use():
    weights = {n for c in NETWORKS.values() for spec in specs(c) for n in spec if n is not None}
    rules = [name for name, _ in sharding.RULES]
    assert len(set(rules)) == len(rules)
    assert weights | constrained_names() == set(rules)


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_divide_over_a_pod(network):
    """fsdp 32 x tensor 2: no matrix of the trunk or of Gemma stays whole, no axis is used twice."""
    mesh = jax.sharding.AbstractMesh((1, 32, 1, 2), sharding.MESH_AXES)
    boxed = abstract_params(NETWORKS[network])
    leaves = jax.tree.leaves_with_path(sharding.shardings_for(boxed, mesh))
    shapes = dict(jax.tree.leaves_with_path(nn.unbox(boxed)))
    for path, leaf in leaves:
        used = [axis for axis in leaf.spec if axis]
        assert len(set(used)) == len(used), (path, leaf.spec)
        if network != "vae" and shapes[path].size > 10**7:
            assert set(used) >= {"fsdp"}, (path, leaf.spec)


def test_mesh_sizes():
    mesh = sharding.make_mesh(replica=-1, fsdp=2)
    assert dict(mesh.shape) == {"replica": 4, "fsdp": 2, "sequence": 1, "tensor": 1}
    assert sharding.batch_divisor(mesh) == 8
    for sizes in (dict(replica=3), dict(replica=-1, fsdp=3), dict(replica=-1, fsdp=-1)):
        with pytest.raises(UserError, match="does not fit 8 devices"):
            sharding.make_mesh(**sizes)


def device(number, platform, kind, **fields):
    return types.SimpleNamespace(id=number, platform=platform, device_kind=kind, **fields)


def test_machines_with_gpus():
    """XLA says that each is a slice; a mesh over them has the devices in a row."""
    devices = np.array([device(k, "gpu", "H200", slice_index=k // 4) for k in range(8)])
    grid = sharding._grid((1, 8, 1, 1), devices)
    assert grid.shape == (1, 8, 1, 1) and (grid.ravel() == devices).all()


def test_tpu_slices_hold_whole_replicas():
    devices = np.array(
        [
            device(4 * s + k, "tpu", "TPU v4", slice_index=s, coords=(k, 0, 0), core_on_chip=0)
            for s in range(2)
            for k in range(4)
        ]
    )
    for replica in 2, 4:
        grid = sharding._grid((replica, 8 // replica, 1, 1), devices)
        slices = [{d.slice_index for d in row.ravel()} for row in grid]
        assert grid.size == 8 and [len(found) for found in slices] == [1] * replica
    with pytest.raises(UserError, match="replica=1 on 2 slices"):
        sharding._grid((1, 8, 1, 1), devices)


def test_constrain_needs_no_mesh():
    x = jnp.ones((2, 3, 4))
    assert (sharding.constrain(x, "batch", "tokens", "residual") == x).all()
    with pytest.raises(KeyError):
        sharding.constrain(x, "bach", "tokens", "residual")


def test_constrain_leaves_whole_what_does_not_divide():
    with jax.set_mesh(sharding.make_mesh(fsdp=8)):
        assert sharding.constrain(jnp.ones((3, 5)), "batch", None).shape == (3, 5)


SMALL = {
    "dit": SanaConfig(depth=2, width=64, cross_heads=2, caption_channels=48, latent_channels=8),
    "vae": DCAEConfig(
        latent_channels=8,
        attention_head_dim=8,
        encoder_channels=(16,) * 3 + (32,) * 3,
        decoder_channels=(16,) * 3 + (32,) * 3,
        encoder_layers=(1,) * 6,
        decoder_layers=(1,) * 6,
    ),
}


def compiled(config, mesh, method, *inputs) -> str:
    """The program of a network, batch and weights sharded."""
    boxed = abstract_params(config)
    place = sharding.batch_sharding(mesh)
    params = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        nn.unbox(boxed),
        sharding.shardings_for(boxed, mesh),
    )
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in inputs]
    module = module_for(config, "float32")
    with jax.set_mesh(mesh):
        apply = jax.jit(lambda p, *a: module.apply({"params": p}, *a, method=method))
        return apply.lower(params, *inputs).compile().as_text()


def exchanges(text: str) -> list[tuple[str, list[tuple[int, ...]]]]:
    """The kind of every collective of a program, and the shapes of its results."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    calls = re.findall(rf"= (\([^()]*\)|\S+) ({kinds})(?:-start)?\(", text)

    def shapes(types):
        return [
            tuple(map(int, filter(None, s.split(",")))) for s in re.findall(r"\[(.*?)\]", types)
        ]

    return [(kind, shapes(types)) for types, kind in calls]


# As SANA does, so do the parts that it replaced.
SMALL["variant"] = dataclasses.replace(SMALL["dit"], attention="softmax", ffn="mlp")


@pytest.mark.parametrize("network", SMALL)
def test_weights_travel_and_activations_stay(network):
    """With weights and batch over fsdp=8, nothing that has pixels or tokens is exchanged."""
    mesh, config = sharding.make_mesh(replica=1, fsdp=8), SMALL[network]
    batch, height, width, rows = 8, 6, 10, 7
    latents = ((batch, height, width, 8), jnp.float32)
    if network == "vae":
        text = compiled(config, mesh, "decode", latents)
    else:
        caption, mask = ((batch, rows, 48), jnp.float32), ((batch, rows), jnp.bool_)
        text = compiled(config, mesh, "__call__", latents, ((batch,), jnp.float32), caption, mask)
    found = [shape for _, shapes in exchanges(text) for shape in shapes]
    weights = {leaf.shape for leaf in jax.tree.leaves(nn.unbox(abstract_params(config)))}
    layer = {shape[1:] for shape in weights}
    # Upsampling's 3x3 kernels, folded to 2x2 for the four pixels that each input pixel becomes.
    layer |= {(2, 2, s[2], 4 * s[3]) for s in weights if s[:2] == (3, 3) and len(s) == 4}
    assert found, "nothing is exchanged: the weights are not sharded"
    for shape in found:
        squeezed = tuple(n for n in shape if n != 1)
        known = {tuple(n for n in s if n != 1) for s in weights | layer}
        assert squeezed in known, f"{shape} is exchanged and no weight"


def test_states_and_halo_rows_travel_and_tokens_stay():
    """With rows over sequence=4, a layer sums its state and key sum and swaps two rows."""
    mesh, config = sharding.make_mesh(replica=1, sequence=4, devices=toy.devices(4)), SMALL["dit"]
    batch, height, width, rows = 2, 20, 11, 7
    text = compiled(
        config,
        mesh,
        "__call__",
        ((batch, height, width, 8), jnp.float32),
        ((batch,), jnp.float32),
        ((batch, rows, 48), jnp.float32),
        ((batch, rows), jnp.bool_),
    )
    head, wide = config.head_dim, 2 * int(config.mlp_ratio * config.width)
    heads = config.width // head
    state = [(batch, heads, head), (batch, heads, head, head)]
    halo = [(batch, 1, width, wide)]
    found = sorted((kind, sorted(shapes, key=len)) for kind, shapes in exchanges(text))
    # Once each: the layers are a loop.
    assert found == [("all-reduce", state)] + 2 * [("collective-permute", halo)]


def test_tokens_stay_in_training():
    """Nor do they travel backward, where halo rows go home and weights' gradients are summed."""
    mesh, config = sharding.make_mesh(replica=1, sequence=4, devices=toy.devices(4)), SMALL["dit"]
    batch, height, width, rows = 2, 20, 11, 7
    model, whole = module_for(config, "float32"), sharding.batch_sharding(mesh)

    def loss(params, latents, caption):
        mask = jnp.ones(caption.shape[:2], bool)
        found = model.apply({"params": params}, latents, jnp.ones(batch), caption, mask)
        return jnp.sum((found - latents) ** 2)

    inputs = nn.unbox(abstract_params(config)), jnp.zeros((batch, height, width, 8))
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        (*inputs, jnp.zeros((batch, rows, 48))),
    )
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(*inputs).compile().as_text()
    halo = (batch, 1, width, 2 * int(config.mlp_ratio * config.width))
    permuted = [shapes for kind, shapes in exchanges(text) if kind == "collective-permute"]
    summed = [s for kind, shapes in exchanges(text) if kind == "all-reduce" for s in shapes]
    assert permuted == 4 * [[halo]]
    assert {kind for kind, _ in exchanges(text)} == {"all-reduce", "collective-permute"}
    tokens = {height, height // 4, width, height * width, height * width // 4}
    assert summed and not [shape for shape in summed if tokens & set(shape)]


@pytest.mark.parametrize("network", SMALL)
def test_float32_islands_are_float32_on_a_tpu(network):
    """In bfloat16, every product of float32 numbers asks for full precision.

    TPUs would round them to bfloat16 otherwise, which no run on a CPU can show.
    """
    config = SMALL[network]
    module = module_for(config, "bfloat16")
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16),
        nn.unbox(abstract_params(config)),
    )
    latents = jnp.zeros((2, 6, 10, 8))
    inputs = [latents, jnp.zeros(2), jnp.zeros((2, 7, 48)), jnp.ones((2, 7), bool)]
    method, inputs = ("decode", [latents]) if network == "vae" else ("__call__", inputs)
    apply = jax.jit(lambda p, *a: module.apply({"params": p}, *a, method=method))
    with jax.default_matmul_precision("default"):
        text = apply.trace(params, *inputs).lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    exact = [
        line for line in products if re.search(r": \(tensor<[\dx]*f32>, tensor<[\dx]*f32>", line)
    ]
    assert exact and len(exact) < len(products)
    assert all("HIGHEST" in line for line in exact), exact


HOST = """
import sys, jax, numpy as np
index, port = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(index))
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from sana_jax import sharding
from sana_jax.checkpoints import random_weights
from sana_jax.checkpoints.components import place
devices, batch = np.array(jax.devices()), np.arange(24).reshape(8, 3)
for order, sizes in (
    ((0, 1, 2, 3), (2, 2, 1, 1)),  # as hosts have them
    ((0, 2, 1, 3), (2, 2, 1, 1)),  # a host's rows do not follow one another
    ((0, 1, 2, 3), (1, 2, 1, 2)),
    ((0, 2, 1, 3), (1, 2, 1, 2)),  # both hosts hold all rows
    ((0, 1, 2, 3), (1, 1, 1, 4)),
):
    mesh = Mesh(devices[list(order)].reshape(sizes), sharding.MESH_AXES)
    rows = sharding.batch_rows(mesh, 8)
    placed = sharding.put_batch({"x": batch[rows]}, mesh)["x"]
    assert placed.shape == batch.shape, (order, sizes)
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, batch[shard.index])

made = random_weights.make("tiny")
weights = jax.tree.map(np.asarray, made.params["dit"])
multihost_utils.process_allgather = None  # each host has them, none travel
mesh = sharding.make_mesh(fsdp=4, devices=devices)
placed = place(weights, made.dit, "float32", mesh)
for found, wanted in zip(jax.tree.leaves(placed), jax.tree.leaves(weights), strict=True):
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(shard.data, wanted[shard.index])
assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(placed))
"""


def test_hosts_put_together_batches_and_weights():
    """Two hosts of two devices: each row is where it would be on one host, on every mesh."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = functools.partial(subprocess.Popen, cwd=Path(__file__).parents[1], env=environment)
    hosts = [run([sys.executable, "-c", HOST, host, port], stderr=subprocess.PIPE) for host in "01"]
    errors = [host.communicate(timeout=300)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], errors
