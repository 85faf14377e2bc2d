"""The placement of arrays: the mesh, and the one table from logical axis names to mesh axes.

Mesh axes: `replica` holds copies of the weights and `fsdp` shards them; both split the batch.
`sequence` splits the tokens of an image by rows, `tensor` splits the heads and the hidden width.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax.runtime.devices import find
from sana_jax.runtime.errors import UserError

MESH_AXES = ("replica", "fsdp", "sequence", "tensor")

# Logical name -> mesh axis. Weights first, activations after.
RULES = (
    ("layers", None),
    ("embed", "fsdp"),  # the width of the residual stream
    ("heads", "tensor"),  # all heads of one projection, side by side
    ("mlp", "tensor"),  # the hidden width of a feed-forward network
    ("vocab", "tensor"),
    ("batch", ("replica", "fsdp")),
    ("tokens", "sequence"),  # of the transformer, row by row; or the axis of the rows
    ("residual", None),
)


def make_mesh(
    replica: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns a mesh over `devices` (default: this host's); a size of -1 takes all that are left.

    Raises UserError for sizes that do not fit, and for a replica that would span TPU slices.
    """
    devices = np.asarray(find() if devices is None else devices)
    sizes = replica, fsdp, sequence, tensor
    try:
        sizes = np.empty(devices.size).reshape(sizes).shape  # fills in the -1
    except ValueError:
        wanted = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        raise UserError(f"a mesh of {wanted} does not fit {devices.size} devices") from None
    return Mesh(_grid(sizes, devices.ravel()), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def _grid(sizes: tuple[int, ...], devices: np.ndarray) -> np.ndarray:
    """Returns the devices in the shape of the mesh; neighbours in it are neighbours in the slice.

    XLA calls every machine with GPUs a slice, and numbers its devices consecutively, so their order
    is good enough. The network between TPU slices is slow, so each slice holds whole replicas.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # An axis of a slice may have to be split, as 4 x 64 splits 16 x 16.
    split = {"allow_split_physical_axes": True}
    if slices == 1 or devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(sizes, devices, **split)
    if sizes[0] % slices:
        raise UserError(f"replica={sizes[0]} on {slices} slices: give a multiple of these")
    inner = sizes[0] // slices, *sizes[1:]
    return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices, **split)


def check_mesh(mesh: Mesh) -> None:
    """Raises UserError for a mesh that a pipeline cannot run on."""
    if not isinstance(mesh, Mesh) or mesh.axis_names != MESH_AXES:
        raise UserError(f"mesh {mesh!r} is not one of sharding.make_mesh")
    if mesh.is_multi_process:
        raise UserError("the mesh has devices of other hosts; a pipeline uses those of its own")


def shardings_for(abstract_params, mesh: Mesh):
    """Returns the NamedSharding of every weight of a tree from `jax.eval_shape(module.init, ...)`.

    A dimension that its mesh axis does not divide stays whole. Warns if `fsdp` splits no weight.
    """
    specs = nn.get_partition_spec(abstract_params)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)

    def fit(leaf, sharding):
        return NamedSharding(mesh, _fit(leaf.shape, sharding.spec, mesh))

    fitted = jax.tree.map(fit, nn.unbox(abstract_params), shardings)
    if mesh.shape["fsdp"] > 1 and not any("fsdp" in s.spec for s in jax.tree.leaves(fitted)):
        logging.warning(
            "no weight divides over fsdp=%d: every device holds all", mesh.shape["fsdp"]
        )
    return fitted


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits axis 0 over the batch axes and leaves all others whole."""
    return NamedSharding(mesh, P(("replica", "fsdp")))


def batch_divisor(mesh: Mesh) -> int:
    """Returns the number of which a batch size must be a multiple."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def whole_batch(size: int, mesh: Mesh) -> int:
    """Returns the smallest batch of `size` or more that the mesh can split."""
    return size + -size % batch_divisor(mesh)


def batch_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the numbers of the batch's rows that this host's devices hold, in order.

    Hosts whose devices differ only in `sequence` and `tensor` hold the same rows. The rows of one
    host need not be consecutive. The order of rows in the global batch never depends on the mesh.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in parts for row in range(batch_size)[rows]})


def put_batch(batch, mesh: Mesh):
    """Places the global batch on the devices; each host passes its `batch_rows` of every array."""
    where, parts = batch_sharding(mesh), batch_rows(mesh, batch_divisor(mesh))

    def put(leaf: np.ndarray) -> jax.Array:
        size = len(leaf) // len(parts)  # rows per device

        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            first = size * parts.index((index[0].start or 0) // size)
            return leaf[first : first + size]

        shape = size * batch_divisor(mesh), *leaf.shape[1:]
        return jax.make_array_from_callback(shape, where, of_device)

    return jax.tree.map(put, batch)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Fixes the layout of an activation inside a network; `names` has a logical name per axis.

    Without this the compiler may copy activations to where the weights are. Does nothing if no mesh
    is set. An axis that its mesh axes do not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rules = dict(RULES)
    axes = [name and rules[name] for name in names]
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _fit(x.shape, axes, mesh)))


def check_tokens(height: int, width: int) -> None:
    """Raises UserError if the mesh that is set cannot split `height` rows of tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["sequence"]
    if height % shards:
        raise UserError(
            f"an image of {height} x {width} tokens does not split by rows over"
            f" sequence={shards}: choose a height or a mesh that divides"
        )


def _fit(shape: tuple[int, ...], axes, mesh) -> P:
    """Returns `axes` without the axes that do not divide their dimension."""

    def divides(size, axis):
        names = (axis,) if isinstance(axis, str) else axis
        return size % math.prod(mesh.shape[name] for name in names) == 0

    pairs = zip(shape, axes, strict=False)
    return P(*(axis if axis and divides(size, axis) else None for size, axis in pairs))
