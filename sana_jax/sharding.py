"""Where arrays live: the mesh and the one table from logical axis names to mesh axes.

Mesh axes: `replica` holds copies of the weights, `fsdp` shards them, both split the batch;
`sequence` splits the tokens of an image, `tensor` the heads and the hidden width.
"""

from collections.abc import Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax.errors import UserError

MESH_AXES = ("replica", "fsdp", "sequence", "tensor")

# Logical name -> mesh axis. Weights first, activations after.
RULES = (
    ("layers", None),
    ("embed", "fsdp"),  # the width of the residual stream
    ("heads", "tensor"),  # all heads of one projection, side by side
    ("mlp", "tensor"),  # the hidden width of a feed-forward network
    ("vocab", "tensor"),
    ("batch", ("replica", "fsdp")),
    ("tokens", "sequence"),
    ("residual", None),
)


def make_mesh(
    replica: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over `devices` (default: this host's); one size may be -1, "all that is left"."""
    devices = np.asarray(jax.local_devices() if devices is None else devices)
    sizes = replica, fsdp, sequence, tensor
    try:
        devices = devices.reshape(sizes)
    except ValueError:
        wanted = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        raise UserError(f"a mesh of {wanted} does not fit {devices.size} devices") from None
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def shardings_for(abstract_params, mesh: Mesh):
    """The NamedSharding of every weight of a tree as `jax.eval_shape(module.init, ...)` gives it.

    A dimension that its mesh axis does not divide stays whole.
    """
    specs = nn.get_partition_spec(abstract_params)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)

    def fit(leaf, sharding):
        axes = zip(leaf.shape, sharding.spec, strict=False)
        spec = (a if a and size % mesh.shape[a] == 0 else None for size, a in axes)
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(fit, nn.unbox(abstract_params), shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over the batch axes, everything else whole."""
    return NamedSharding(mesh, P(("replica", "fsdp")))


def batch_divisor(mesh: Mesh) -> int:
    """The number that a batch must be a multiple of."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Fixes the layout of an activation inside a network; does nothing where no mesh is set."""
    return nn.with_logical_constraint(x, names, rules=RULES)
