"""The LoRAs of a pipeline: beside its weights, on its mesh."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh

from sana_jax.checkpoints.components import Checkpoint, abstract_params
from sana_jax.checkpoints.loras import Lora, open_lora
from sana_jax.lora.adapter import attach, axes_of_halves, detach
from sana_jax.models.dit import SanaConfig
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import shardings_for

PyTree = Any


class WithLoras:
    """The methods of a pipeline that change which LoRAs it draws with.

    `params` has them beside the kernels, `checkpoint` has not. No other thread may draw meanwhile.
    """

    checkpoint: Checkpoint
    mesh: Mesh
    params: dict[str, PyTree]
    loras: Mapping[str, Lora] = {}  # by name, never changed in place

    def load_lora(self, name: str, weight: float = 1.0) -> None:
        """Draws with a LoRA from now on, beside those loaded before.

        The weights of the checkpoint stay as they are, so that `unload_lora` leaves no trace.

        Args:
          name: a .safetensors file, a folder with pytorch_lora_weights.safetensors, or a hub id.
            One that is loaded already is replaced.
          weight: the factor of its updates.

        Raises UserError if the file is no LoRA of this transformer, and Retry if the hub does not
        answer; the pipeline is then as before.
        """
        lora = open_lora(name, weight, self.checkpoint.dit)
        self.set_loras([*{**self.loras, lora.name: lora}.values()])

    def unload_lora(self, name: str | None = None) -> None:
        """Draws without the LoRA that was loaded as `name`, or without any. Raises UserError."""
        if name is not None and name not in self.loras:
            raise UserError(f"no LoRA {name!r} is loaded, but {', '.join(self.loras) or 'none'}")
        kept = [lora for lora in self.loras.values() if name not in (None, lora.name)]
        self.set_loras(kept)

    def set_loras(self, loras: Sequence[Lora]) -> None:
        """Draws with these opened LoRAs (checkpoints/loras.py) and with no others."""
        dit = with_loras(self.params["dit"], loras, self.checkpoint.dit, self.mesh)
        self.params = {**self.params, "dit": dit}
        self.loras = {lora.name: lora for lora in loras}

    def check_no_loras(self) -> None:
        """Raises UserError if LoRAs are loaded, which a saved checkpoint would not have."""
        if self.loras:
            raise UserError(
                f"{', '.join(self.loras)} would not be saved: call unload_lora(), or merge it by"
                " python -m sana_jax.convert --lora=FILE:WEIGHT"
            )


def with_loras(params: PyTree, loras: Sequence[Lora], config: SanaConfig, mesh: Mesh) -> PyTree:
    """Returns a transformer's parameters with these LoRAs and no others beside the kernels.

    The kernels and all other arrays are those of `params`, not copies. The updates are placed on
    `mesh`, split where their kernels are. Raises UserError for a LoRA of another network.
    """
    plain = detach(params)
    if not loras:
        return plain
    flat = traverse_util.flatten_dict(
        attach(plain, [(lora.adapter, lora.weight) for lora in loras]), sep="/"
    )
    boxes = traverse_util.flatten_dict(abstract_params(config), sep="/")
    updates = {}
    for name in flat:
        layer, _, half = name.rpartition("/lora/")
        if layer:
            axes = axes_of_halves(boxes[f"{layer}/kernel"].names)[half]
            shape = jax.ShapeDtypeStruct(flat[name].shape, flat[name].dtype)
            updates[name] = nn.LogicallyPartitioned(shape, axes)
    for name, where in shardings_for(updates, mesh).items():
        flat[name] = jax.device_put(flat[name], where)
    return traverse_util.unflatten_dict(flat, sep="/")
