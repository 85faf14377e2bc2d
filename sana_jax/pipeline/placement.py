"""Where a pipeline computes: its mesh, its process, and the settings of JAX around its calls."""

import contextlib
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from sana_jax import sharding
from sana_jax.runtime.errors import UserError


class Placement:
    """The devices of one pipeline, in the process that made it."""

    def __init__(self, mesh: Mesh, dtype: str):
        self.mesh, self._dtype, self._process = mesh, dtype, os.getpid()

    def spread(self, x) -> Array:
        """Splits the batch of `x` over the mesh, padded with copies of the last row to fit."""
        self.check_process()
        x = np.asarray(x) if not isinstance(x, jax.Array) else x
        missing = -x.shape[0] % sharding.batch_divisor(self.mesh)
        if missing:
            x = jnp.concatenate([jnp.asarray(x), jnp.repeat(x[-1:], missing, axis=0)])
        return jax.device_put(x, sharding.batch_sharding(self.mesh))

    def check_process(self) -> None:
        """Raises UserError in a fork, where JAX would wait for ever."""
        if os.getpid() != self._process:
            raise UserError(
                "this pipeline is of the process that was forked, and JAX does not work in a fork:"
                " start processes by spawn, and let each make its own pipeline"
            )

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Sets the mesh for the networks; with it float32 means float32 on every device."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.set_mesh(self.mesh))
            if self._dtype == "float32":
                stack.enter_context(jax.default_matmul_precision("float32"))
            yield
