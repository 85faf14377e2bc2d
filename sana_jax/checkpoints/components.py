"""The parts of a checkpoint: three networks, a tokenizer and the settings of the sampler."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array

from sana_jax.checkpoints.mapping import flat_leaves
from sana_jax.kernels.int8 import is_quantised
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import SanaConfig, SanaTransformer
from sana_jax.models.gemma2 import Gemma2, Gemma2Config
from sana_jax.models.layers import Dtype
from sana_jax.quantisation.table import with_quantised
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import shardings_for
from sana_jax.text.instruction import Instruction
from sana_jax.text.tokenizers import vocabulary_size

Config = SanaConfig | DCAEConfig | Gemma2Config
CONFIGS = {"dit": SanaConfig, "vae": DCAEConfig, "text_encoder": Gemma2Config}

# The text rows that the transformer sees without the prompt: those of the negative prompt, as in
# diffusers; or as many as the prompt has, of the negative prompt and its padding, as in NVlabs'
# code, where the embedding is replaced and the mask is kept, in training and in sampling.
MASKS = ("negative", "prompt")


@dataclasses.dataclass
class Checkpoint:
    """The contents of a checkpoint's folder. An autoencoder may stand alone.

    `params` has the keys of CONFIGS; its leaves are arrays of any kind. The leaves of an opened
    folder are LazyArrays, read when they are used: `place` puts them on devices.
    """

    vae: DCAEConfig
    dit: SanaConfig | None = None
    text_encoder: Gemma2Config | None = None
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Any = None
    text_rows: int = 300  # rows of text that the transformer attends to
    flow_shift: float = 3.0
    unconditional_mask: str = MASKS[0]
    instruction: Instruction | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def configs(self) -> dict[str, Config]:
        """Returns the configs of the networks that this checkpoint has, by name."""
        configs = {name: getattr(self, name) for name in CONFIGS}
        return {name: config for name, config in configs.items() if config is not None}


def check_fit(checkpoint: Checkpoint) -> None:
    """Checks that the networks and the tokenizer belong together. Raises UserError."""
    dit, vae, text_encoder = checkpoint.dit, checkpoint.vae, checkpoint.text_encoder
    if dit and dit.latent_channels != vae.latent_channels:
        raise UserError(
            f"the transformer has {dit.latent_channels} latent channels, the autoencoder"
            f" {vae.latent_channels}: they do not belong together"
        )
    if dit and text_encoder and dit.caption_channels != text_encoder.hidden_size:
        raise UserError(
            f"the transformer reads text of width {dit.caption_channels}, the text encoder writes"
            f" {text_encoder.hidden_size}: they do not belong together"
        )
    tokens = vocabulary_size(checkpoint.tokenizer) if checkpoint.tokenizer is not None else 0
    if text_encoder and tokens > text_encoder.vocab_size:
        raise UserError(
            f"the tokenizer has {tokens} tokens, the text encoder {text_encoder.vocab_size}: they"
            " do not belong together"
        )


def component_dtype(component: str, dtype: Dtype) -> Dtype:
    """Returns the dtype of one component in a pipeline of `dtype`.

    The autoencoder and Gemma overflow float16: beside a float16 transformer they run in bfloat16.
    """
    narrow = jnp.dtype(dtype) == jnp.float16 and component != "dit"
    return jnp.bfloat16 if narrow else dtype


def module_for(
    config: Config, dtype: Dtype, param_dtype: Dtype | None = None, **fields: Any
) -> nn.Module:
    """Makes the network of a config, computing in `dtype`; `fields` are further module fields."""
    module = {SanaConfig: SanaTransformer, DCAEConfig: DCAE, Gemma2Config: Gemma2}[type(config)]
    return module(config, dtype=dtype, param_dtype=param_dtype or dtype, **fields)


def init_params(module: nn.Module, key: Array) -> Any:
    """Returns new parameters of one of the three networks, boxed with their logical axes."""
    config = module.config
    if isinstance(config, SanaConfig):
        patch = config.patch_size
        latents = jnp.zeros((1, patch, patch, config.latent_channels))
        caption = jnp.zeros((1, 1, config.caption_channels))
        guidance = jnp.ones(1) if config.is_sprint else None
        inputs = latents, jnp.zeros(1), caption, jnp.ones((1, 1), bool), guidance
    elif isinstance(config, DCAEConfig):
        inputs = (jnp.zeros((1, config.factor, config.factor, config.in_channels)),)
    else:
        inputs = (jnp.zeros((1, 1), jnp.int32),)
    return module.init(key, *inputs)["params"]


@functools.cache
def abstract_params(config: Config):
    """Returns the shapes of a network's parameters, boxed with their logical axes.

    Nothing is computed. Raises UserError if the config names quantised layers that there are not.
    """
    init = partial(init_params, module_for(config, "float32"))
    return with_quantised(jax.eval_shape(init, jax.random.key(0)), config.quantised)


def regrouped(params: Any, config: Config) -> Any:
    """Returns nested parameters whose quantised weights are one leaf again, as networks read them.

    Files hold their parts: kernel/values, kernel/scale.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in traverse_util.flatten_dict(abstract_params(config), sep="/").items():
        if is_quantised(leaf):
            parts = {n: flat.pop(f"{path}/{n}", None) for n in ("values", "scale", "range")}
            flat[path] = dataclasses.replace(leaf, **parts)
    return traverse_util.unflatten_dict(flat, sep="/")


def in_dtype(shapes: Any, dtype: Dtype) -> Any:
    """Returns a tree of shapes in `dtype`; quantised weights keep theirs."""

    def cast(x):
        return x if is_quantised(x) else jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype))

    return jax.tree.map(cast, shapes, is_leaf=is_quantised)


def param_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape of every parameter by its "/"-joined path."""
    return flat_leaves(nn.unbox(abstract_params(config)))


def abstract_placed(config: Config, dtype: Dtype, mesh: Mesh):
    """Returns ShapeDtypeStructs of the parameters as `place` would put them.

    The devices of `mesh` need not exist.
    """
    boxed = abstract_params(config)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        in_dtype(nn.unbox(boxed), dtype),
        shardings_for(boxed, mesh),
    )


def place(params, config: Config, dtype: Dtype, mesh: Mesh):
    """Puts parameters on the devices of `mesh`, cast as by `in_dtype`, one after the other."""
    boxed = abstract_params(config)

    def put(array, wanted, sharding):
        full = np.asarray(array, wanted.dtype)
        # Each host has the whole array. device_put would gather all the hosts' copies on every
        # device to check that they are equal.
        return jax.make_array_from_callback(full.shape, sharding, lambda index: full[index])

    return jax.tree.map(put, params, in_dtype(nn.unbox(boxed), dtype), shardings_for(boxed, mesh))
