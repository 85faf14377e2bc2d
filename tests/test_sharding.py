"""The mesh and the rule table."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from sana_jax import sharding
from sana_jax.checkpoints.components import abstract_params
from sana_jax.errors import UserError
from sana_jax.models.dc_ae import DCAEConfig
from sana_jax.models.dit import PRESETS
from sana_jax.models.gemma2 import Gemma2Config

NETWORKS = {
    "dit": PRESETS["sana1.5_1600m_1024"],
    "vae": DCAEConfig(),
    "text_encoder": Gemma2Config(),
}
ACTIVATIONS = {"batch", "tokens", "residual"}


def specs(config):
    tree = nn.get_partition_spec(abstract_params(config))
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, P))


def test_every_name_has_a_rule_and_every_rule_a_use():
    names = {n for c in NETWORKS.values() for spec in specs(c) for n in spec if n is not None}
    rules = [name for name, _ in sharding.RULES]
    assert len(set(rules)) == len(rules)
    assert names | ACTIVATIONS == set(rules)


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


def test_constrain_needs_no_mesh():
    x = jnp.ones((2, 3, 4))
    assert (sharding.constrain(x, "batch", "tokens", "residual") == x).all()
