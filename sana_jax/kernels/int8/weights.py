"""What may stand in a network's parameters in the place of an array, beside or for int8 weights."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Int32


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "range", "layer"),
    meta_fields=("rows",),
)
@dataclasses.dataclass(frozen=True)
class Quantised:
    """An array that is values * scale, for the places in a network that take either.

    Its leaves have leading axes for the layers of a stack, which nn.scan takes off, and may be
    boxed with their logical axes, as those of other parameters.
    """

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]  # float32; as `values`, but 1 long along the axes that a sum is over
    # float32, a number for each layer: the scale of the rows that the weights are multiplied with.
    # None: every row has its own.
    range: Float[Array, "..."] | None = None
    rows: str = "float"  # what the weights are multiplied with: "float" or "int8" rows
    # The number of a layer whose values still lie among those of all layers: a kernel reads them
    # there, and everything else calls `alone` first. Not for gradients: each layer would keep all.
    layer: Int32[Array, ""] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape if self.layer is None else self.values.shape[1:]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def alone(self) -> "Quantised":
        """Returns the same with its values by themselves."""
        if self.layer is None:
            return self
        values = jax.lax.dynamic_index_in_dim(self.values, self.layer, keepdims=False)
        return dataclasses.replace(self, values=values, layer=None)

    def astype(self, dtype: DTypeLike) -> Array:
        """Returns the array itself, for operations that know of no int8."""
        return (self.alone().values.astype(jnp.float32) * self.scale).astype(dtype)

    def columns(self, start: int, stop: int) -> "Quantised":
        """Returns the weights of some outputs."""
        whole = self.alone()
        values, scale = (x[..., start:stop] for x in (whole.values, whole.scale))
        return dataclasses.replace(whole, values=values, scale=scale)


@partial(
    jax.tree_util.register_dataclass, data_fields=("kernel", "layer"), meta_fields=("name", "tell")
)
@dataclasses.dataclass(frozen=True)
class Watched:
    """An array that tells the largest number in every channel of the rows that it is multiplied by.

    The rows of a calibration: whoever runs the network waits for `tell` by jax.effects_barrier().
    """

    kernel: Float[Array, "..."]
    layer: Array  # its number in the stack, int32; a stack has all of them
    name: str  # of the layer
    tell: Callable[[str, Array, Array], None]  # of the name, the layer, and (C,) in float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def columns(self, start: int, stop: int) -> "Watched":
        """Returns the weights of some outputs."""
        return dataclasses.replace(self, kernel=self.kernel[..., start:stop])

    def watch(self, x: Float[Array, "*B C"]) -> Float[Array, "C D"]:
        """Returns the kernel, after it told of x."""
        largest = jnp.max(jnp.abs(x), tuple(range(x.ndim - 1))).astype(jnp.float32)
        jax.debug.callback(partial(self.tell, self.name), self.layer, largest)
        return self.kernel


@partial(jax.tree_util.register_dataclass, data_fields=("kernel",), meta_fields=("products",))
@dataclasses.dataclass(frozen=True)
class Simulated:
    """An array that trains, and is rounded to int8 whenever it is multiplied.

    `products` names the products in int8: "forward", and of the backward pass "rows", which gives
    the gradient of the rows, and "weights", which gives the kernel's.
    """

    kernel: Float[Array, "..."]
    products: frozenset[str]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def columns(self, start: int, stop: int) -> "Simulated":
        """Returns the weights of some outputs."""
        return dataclasses.replace(self, kernel=self.kernel[..., start:stop])


Weight = Quantised | Watched | Simulated


def cast(kernel: Array | Weight, dtype: DTypeLike) -> Array | Weight:
    """Returns an array in `dtype`, and everything else as it is."""
    return kernel if isinstance(kernel, Weight) else kernel.astype(dtype)


def is_quantised(x: Any) -> bool:
    return isinstance(x, Quantised)


def part(stack: Any) -> tuple[Any, Any]:
    """Takes the values of weights for int8 rows out of a tree of stacked arrays, which stay whole.

    Returns the tree with None in their place, and a tree of them with None in the place of all
    else. `join` puts them back.
    """

    def stays(x):
        return is_quantised(x) and x.rows == "int8"

    def without(x):
        return dataclasses.replace(x, values=None) if stays(x) else x

    rest = jax.tree.map(without, stack, is_leaf=is_quantised)
    values = jax.tree.map(lambda x: x.values if stays(x) else None, stack, is_leaf=is_quantised)
    return rest, values


def layer_of(stack: Any, i: Int32[Array, ""] | int) -> Any:
    """Returns layer i of a tree of stacked arrays, or of the first that `part` gives."""

    def row(x):
        return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

    def cut(x):
        layer = jax.tree.map(row, x)
        if is_quantised(x) and x.values is None:
            return dataclasses.replace(layer, layer=jnp.asarray(i, jnp.int32))
        return layer

    return jax.tree.map(cut, stack, is_leaf=is_quantised)


def join(layer: Any, values: Any) -> Any:
    """Returns a layer with weights that know where they lie: among the values of all layers.

    Both are of `part`. See Quantised.layer.
    """

    def put(x, values):
        return x if values is None else dataclasses.replace(x, values=values)

    return jax.tree.map(put, layer, values, is_leaf=is_quantised)
