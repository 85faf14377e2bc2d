"""Translates config.json of diffusers and transformers to our networks' configs, and back.

Reading raises ValueError, naming the field whose value is not supported.
"""

import dataclasses
from typing import Any

from sana_jax.checkpoints.diffusers_fields import (
    AUTOENCODER,
    TEXT_ENCODER,
    TRANSFORMER,
    check_supported,
)
from sana_jax.models.config import MAX_WIDTH
from sana_jax.models.dc_ae_config import MAX_STAGES, PER_STAGE, DCAEConfig
from sana_jax.models.dit import SPRINT, SanaConfig
from sana_jax.models.gemma2 import Gemma2Config


def config_json(config: SanaConfig | DCAEConfig | Gemma2Config) -> dict[str, Any]:
    """Returns the contents of a network's config.json: diffusers', or transformers 5's for Gemma.

    `clip_attention` and `quantised` have no place in these files.
    """
    table = {SanaConfig: _sana_json, DCAEConfig: _dc_ae_json, Gemma2Config: _gemma2_json}
    return table[type(config)](config)


# Defaults of the fields that an older diffusers may leave out of a SanaTransformer2DModel's config.
_SANA_DEFAULTS = dict(
    in_channels=32,
    num_attention_heads=70,
    attention_head_dim=32,
    num_layers=20,
    num_cross_attention_heads=20,
    cross_attention_head_dim=112,
    caption_channels=2304,
    mlp_ratio=2.5,
    attention_bias=False,
    sample_size=32,
    patch_size=1,
    interpolation_scale=None,
    guidance_embeds=False,
    guidance_embeds_scale=0.1,
    qk_norm=None,
    timestep_scale=1.0,
)


_HEADS = [f"num_{cross}attention_heads" for cross in ("", "cross_")]
_HEADS += [f"{cross}attention_head_dim" for cross in ("", "cross_")]


def sana_from_diffusers(config: dict[str, Any]) -> SanaConfig:
    """Reads a SanaTransformer2DModel's config.json."""
    kind = config.get("_class_name", "SanaTransformer2DModel")
    if kind != "SanaTransformer2DModel":
        raise ValueError(f"transformer {kind} is not supported, only SanaTransformer2DModel")
    get = {**_SANA_DEFAULTS, **config}.__getitem__
    for key in _HEADS:  # before they are multiplied: a text a billion times takes the memory
        if type(get(key)) is not int or not 0 < get(key) <= MAX_WIDTH:
            raise ValueError(f"transformer {key} {get(key)!r} is not in 1 .. {MAX_WIDTH}")
    width = get("num_attention_heads") * get("attention_head_dim")
    check_supported("transformer", TRANSFORMER, config)
    guidance, timestep_scale = None, get("timestep_scale")
    if get("guidance_embeds"):  # Sprint, whose pipeline gives times of 0 .. 1 whatever the scale is
        guidance, timestep_scale = get("guidance_embeds_scale"), SPRINT["timestep_scale"]
        if guidance is None:
            raise ValueError("transformer guidance_embeds_scale None is not a positive number")
    expected = {
        "out_channels": get("in_channels"),
        "cross_attention_dim": width,
    }
    for key, value in expected.items():
        if config.get(key, value) not in (value, None):
            message = f"transformer {key} {config[key]!r} is not supported, only {value!r}"
            raise ValueError(message)
    if get("num_cross_attention_heads") * get("cross_attention_head_dim") != width:
        raise ValueError(f"transformer cross_attention_head_dim does not divide width {width}")
    if get("qk_norm") not in (None, "rms_norm_across_heads"):
        raise ValueError(f"transformer qk_norm {get('qk_norm')!r} is not supported")
    return SanaConfig(
        latent_channels=get("in_channels"),
        depth=get("num_layers"),
        width=width,
        head_dim=get("attention_head_dim"),
        cross_heads=get("num_cross_attention_heads"),
        caption_channels=get("caption_channels"),
        mlp_ratio=get("mlp_ratio"),
        patch_size=get("patch_size"),
        sample_size=get("sample_size"),
        interpolation_scale=get("interpolation_scale"),
        qk_norm=get("qk_norm") is not None,
        attention_bias=get("attention_bias"),
        timestep_scale=timestep_scale,
        guidance_embedding=guidance,
    )


def _sana_json(config: SanaConfig) -> dict[str, Any]:
    guidance = config.guidance_embedding
    return {
        **_SANA_DEFAULTS,
        "_class_name": "SanaTransformer2DModel",
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "num_layers": config.depth,
        "num_attention_heads": config.width // config.head_dim,
        "attention_head_dim": config.head_dim,
        "num_cross_attention_heads": config.cross_heads,
        "cross_attention_head_dim": config.width // config.cross_heads,
        "cross_attention_dim": config.width,
        "caption_channels": config.caption_channels,
        "mlp_ratio": config.mlp_ratio,
        "patch_size": config.patch_size,
        "sample_size": config.sample_size,
        "interpolation_scale": config.interpolation_scale,
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
        "attention_bias": config.attention_bias,
        "timestep_scale": config.timestep_scale,
        **({"guidance_embeds": True, "guidance_embeds_scale": guidance} if guidance else {}),
    }


# Our field of the autoencoder -> diffusers' name, where it differs.
_DC_AE_NAMES = {
    "encoder_blocks": "encoder_block_types",
    "decoder_blocks": "decoder_block_types",
    "encoder_channels": "encoder_block_out_channels",
    "decoder_channels": "decoder_block_out_channels",
    "encoder_layers": "encoder_layers_per_block",
    "decoder_layers": "decoder_layers_per_block",
    "decoder_norms": "decoder_norm_types",
    "decoder_activations": "decoder_act_fns",
    "downsample": "downsample_block_type",
    "upsample": "upsample_block_type",
    "decoder_out_activation": "decoder_conv_act_fn",
}
# diffusers' default of an absent field, where ours differs.
_DC_AE_DEFAULTS = {
    "encoder_blocks": "ResBlock",
    "decoder_blocks": "ResBlock",
    "decoder_norms": "rms_norm",
    "decoder_activations": "silu",
    "downsample": "pixel_unshuffle",
    "upsample": "pixel_shuffle",
    "scaling_factor": 1.0,
}


def dc_ae_from_diffusers(config: dict[str, Any]) -> DCAEConfig:
    """Reads an AutoencoderDC's config.json."""
    kind = config.get("_class_name", "AutoencoderDC")
    if kind != "AutoencoderDC":
        raise ValueError(f"autoencoder {kind} is not supported, only AutoencoderDC")
    check_supported("autoencoder", AUTOENCODER, config)

    def freeze(value):
        return tuple(map(freeze, value)) if isinstance(value, list | tuple) else value

    ours = {}
    for field in dataclasses.fields(DCAEConfig):
        missing = _DC_AE_DEFAULTS.get(field.name, field.default)
        ours[field.name] = freeze(config.get(_DC_AE_NAMES.get(field.name, field.name), missing))
    stages = len(ours["encoder_channels"])
    if stages > MAX_STAGES:  # before each field has as many entries
        raise ValueError(f"encoder_block_out_channels has {stages} stages, at most {MAX_STAGES}")
    for field in PER_STAGE:
        # As in diffusers: a string holds for all stages; values beyond the last stage are ignored.
        value = ours[field]
        ours[field] = (value,) * stages if isinstance(value, str) else value[:stages]
    ours["downsample"] = str(ours["downsample"]).lower()  # published files say "Conv"
    try:
        return DCAEConfig(**ours)
    except ValueError as error:
        network, field, problem = str(error).split(" ", 2)
        alias = f" ({_DC_AE_NAMES[field]} in diffusers)" if field in _DC_AE_NAMES else ""
        raise ValueError(f"{network} {field}{alias} {problem}") from None


def _dc_ae_json(config: DCAEConfig) -> dict[str, Any]:
    def thaw(value):
        return [thaw(v) for v in value] if isinstance(value, tuple) else value

    ours = {name: value for name, value in vars(config).items() if name != "quantised"}
    theirs = {_DC_AE_NAMES.get(name, name): thaw(value) for name, value in ours.items()}
    return {"_class_name": "AutoencoderDC", **theirs}


_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA2_NAMES = dict(
    vocab_size="vocab_size",
    hidden_size="hidden_size",
    intermediate_size="intermediate_size",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    num_kv_heads="num_key_value_heads",
    head_dim="head_dim",
    query_pre_attn_scalar="query_pre_attn_scalar",
    attn_logit_softcap="attn_logit_softcapping",
    sliding_window="sliding_window",
    rms_norm_eps="rms_norm_eps",
    max_positions="max_position_embeddings",
)


def gemma2_from_transformers(config: dict[str, Any]) -> Gemma2Config:
    """Reads a Gemma 2 config.json of transformers 4 or 5."""
    if config.get("model_type") != "gemma2":
        kind = config.get("model_type")
        raise ValueError(f"text encoder model_type {kind!r} is not supported, only 'gemma2'")
    check_supported("text encoder", TEXT_ENCODER, config)
    values = {ours: config[theirs] for ours, theirs in _GEMMA2_NAMES.items() if theirs in config}
    rope = {"rope_theta": config.get("rope_theta", Gemma2Config.rope_theta)}
    for key in ("rope_scaling", "rope_parameters"):  # transformers 4, transformers 5
        rope |= config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"text encoder {key} of type {kind!r} is not supported")
        # Such as one dictionary for each kind of layer, as later Gemmas have it.
        if others := sorted(set(rope) - {"rope_theta", "rope_type", "type"}):
            raise ValueError(f"text encoder {key} with {', '.join(others)} is not supported")
    plain = Gemma2Config(**values, rope_theta=rope["rope_theta"])
    kinds = config.get("layer_types")
    if kinds is None or plain.sliding_window is None:
        return plain
    if not isinstance(kinds, list | tuple):
        raise ValueError(f"text encoder layer_types {kinds!r} is no list")
    if unknown := set(kinds) - {_SLIDING, _FULL}:
        raise ValueError(f"text encoder layer_types {sorted(unknown)} are not supported")
    if len(kinds) != plain.num_layers:
        raise ValueError(
            f"text encoder layer_types names {len(kinds)} of {plain.num_layers} layers"
        )
    slides = tuple(kind == _SLIDING for kind in kinds)
    if not any(slides):
        return dataclasses.replace(plain, sliding_window=None)
    if slides == plain.slides:
        return plain
    return dataclasses.replace(plain, sliding_layers=slides)


def _gemma2_json(config: Gemma2Config) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2Model"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": None,
        **{theirs: getattr(config, ours) for ours, theirs in _GEMMA2_NAMES.items()},
        # transformers wants a number even where no layer slides.
        "sliding_window": config.sliding_window or config.max_positions,
        "layer_types": [_SLIDING if slides else _FULL for slides in config.slides],
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
