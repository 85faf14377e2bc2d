"""The LoRAs of a pipeline: beside its weights, on its mesh."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh

from sana_jax.checkpoints.components import Checkpoint, abstract_params
from sana_jax.checkpoints.loras import Lora, open_lora, pairs_of
from sana_jax.kernels.int8 import is_quantised
from sana_jax.lora.adapter import TEXT_ENCODER, attach, axes_of_halves, detach
from sana_jax.pipeline.remembered import Remembered
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
    _prefixes: Remembered
    _negatives: Remembered

    def load_lora(self, name: str, weight: float = 1.0) -> None:
        """Draws with a LoRA from now on, beside those loaded before.

        The weights of the checkpoint stay as they are, so that `unload_lora` leaves no trace.

        Args:
          name: a .safetensors file, a folder with pytorch_lora_weights.safetensors, or a hub id.
            One that is loaded already is replaced.
          weight: the factor of its updates.

        Raises UserError if the file is no LoRA of these networks, and Retry if the hub does not
        answer; the pipeline is then as before.
        """
        lora = open_lora(name, weight, self.checkpoint)
        self.set_loras([*{**self.loras, lora.name: lora}.values()])

    def unload_lora(self, name: str | None = None) -> None:
        """Draws without the LoRA that was loaded as `name`, or without any. Raises UserError."""
        if name is not None and name not in self.loras:
            raise UserError(f"no LoRA {name!r} is loaded, but {', '.join(self.loras) or 'none'}")
        kept = [lora for lora in self.loras.values() if name not in (None, lora.name)]
        self.set_loras(kept)

    def set_loras(self, loras: Sequence[Lora]) -> None:
        """Draws with these opened LoRAs (checkpoints/loras.py) and with no others."""
        pairs, params = pairs_of(loras), {}
        for network in ("dit", TEXT_ENCODER):
            if network in self.params:
                boxes = abstract_params(getattr(self.checkpoint, network))
                given = self.params[network], pairs.get(network, []), boxes, self.mesh
                params[network] = with_adapters(*given)
        self.params = {**self.params, **params}
        self.loras = {lora.name: lora for lora in loras}
        self._prefixes, self._negatives = Remembered(), Remembered()  # of another text encoder

    def check_no_loras(self) -> None:
        """Raises UserError if LoRAs are loaded, which a saved checkpoint would not have."""
        if self.loras:
            raise UserError(
                f"{', '.join(self.loras)} would not be saved: call unload_lora(), or merge it by"
                " python -m sana_jax.convert --lora=FILE:WEIGHT"
            )


def with_adapters(
    params: PyTree, pairs: Sequence[tuple[PyTree, float]], boxes: PyTree, mesh: Mesh
) -> PyTree:
    """Returns a network's parameters with these adapters and no others beside the kernels.

    The kernels and all other arrays are those of `params`, not copies. The updates are placed on
    `mesh`, split where their kernels are, by the axes that `boxes` name. Raises UserError for an
    adapter of another network.
    """
    plain = detach(params)
    if not pairs:
        return plain
    flat = traverse_util.flatten_dict(attach(plain, pairs), sep="/")
    of_kernels = traverse_util.flatten_dict(boxes, sep="/")
    updates = {}
    for name in flat:
        layer, _, half = name.rpartition("/lora/")
        if layer:
            box = of_kernels[f"{layer}/kernel"]
            names = axes_of_halves((box.values if is_quantised(box) else box).names)[half]
            shape = jax.ShapeDtypeStruct(flat[name].shape, flat[name].dtype)
            updates[name] = nn.LogicallyPartitioned(shape, names)
    for name, where in shardings_for(updates, mesh).items():
        flat[name] = jax.device_put(flat[name], where)
    return traverse_util.unflatten_dict(flat, sep="/")
