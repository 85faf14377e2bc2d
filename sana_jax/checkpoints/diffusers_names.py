"""The tables that map tensors of diffusers and transformers to our parameters."""

from collections.abc import Iterator

from sana_jax.checkpoints.mapping import DEPTHWISE, POINTWISE, Entry, conv, linear
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.models.gemma2 import Gemma2Config


def entries(config: SanaConfig | DCAEConfig | Gemma2Config) -> list[Entry]:
    """Returns the whole table of a network."""
    table = {SanaConfig: dit_entries, DCAEConfig: dc_ae_entries, Gemma2Config: gemma2_entries}
    return list(table[type(config)](config))


def glumbconv_entries(ours: str, theirs: str, **kwargs) -> Iterator[Entry]:
    yield Entry(f"{ours}/expand/kernel", (f"{theirs}.conv_inverted.weight",), POINTWISE, **kwargs)
    yield Entry(f"{ours}/expand_bias", (f"{theirs}.conv_inverted.bias",), **kwargs)
    yield Entry(f"{ours}/depthwise_kernel", (f"{theirs}.conv_depth.weight",), DEPTHWISE, **kwargs)
    yield Entry(f"{ours}/depthwise_bias", (f"{theirs}.conv_depth.bias",), **kwargs)
    yield Entry(f"{ours}/contract/kernel", (f"{theirs}.conv_point.weight",), POINTWISE, **kwargs)


def dit_entries(config: SanaConfig) -> Iterator[Entry]:
    """Yields the entries of a SanaTransformer2DModel."""
    sizes = (("p", config.patch_size), ("q", config.patch_size))
    patch = "patch_embed.proj"
    yield Entry("patch_embed/kernel", (f"{patch}.weight",), "o c p q -> (c p q) o", sizes=sizes)
    yield Entry("patch_embed/bias", (f"{patch}.bias",))
    time = "time_embed" if config.is_sprint else "time_embed.emb"
    for name in ("linear_1", "linear_2"):
        yield from linear(f"time_embed/{name}", f"{time}.timestep_embedder.{name}")
        yield from linear(f"caption_embed/{name}", f"caption_projection.{name}")
        if config.is_sprint:
            yield from linear(f"time_embed/guidance_{name}", f"{time}.guidance_embedder.{name}")
    yield from linear("time_embed/modulation", "time_embed.linear")
    yield Entry("caption_embed/norm/scale", ("caption_norm.weight",))
    yield Entry("final_table", ("scale_shift_table",))
    yield from linear("proj_out", "proj_out")

    layers = {"layers": range(config.depth)}
    block = "transformer_blocks.{i}"
    attn1, attn2 = f"{block}.attn1", f"{block}.attn2"
    yield Entry("blocks/modulation_table", (f"{block}.scale_shift_table",), **layers)
    qkv = [f"{attn1}.to_{t}" for t in "qkv"]
    yield from linear("blocks/attention/qkv", *qkv, bias=config.attention_bias, **layers)
    yield from linear("blocks/attention/out", f"{attn1}.to_out.0", **layers)
    yield from linear("blocks/cross_attention/q", f"{attn2}.to_q", **layers)
    yield from linear("blocks/cross_attention/kv", f"{attn2}.to_k", f"{attn2}.to_v", **layers)
    yield from linear("blocks/cross_attention/out", f"{attn2}.to_out.0", **layers)
    if config.qk_norm:
        for ours, theirs in ("attention", attn1), ("cross_attention", attn2):
            for t in "qk":
                name = f"{theirs}.norm_{t}.weight"
                yield Entry(f"blocks/{ours}/{t}_norm/scale", (name,), **layers)
    yield from glumbconv_entries("blocks/ffn", f"{block}.ff", **layers)


def gemma2_entries(config: Gemma2Config) -> Iterator[Entry]:
    """Yields the entries of a Gemma2Model."""
    yield Entry("embed/embedding", ("embed_tokens.weight",))
    yield Entry("final_norm/scale", ("norm.weight",))
    layers = {"layers": range(config.num_layers)}
    names = {
        "input_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_ffn_norm": "pre_feedforward_layernorm",
        "post_ffn_norm": "post_feedforward_layernorm",
    }
    for ours, theirs in names.items():
        yield Entry(f"layers/{ours}/scale", (f"layers.{{i}}.{theirs}.weight",), **layers)
    for t in "qkvo":
        yield from linear(f"layers/{t}", f"layers.{{i}}.self_attn.{t}_proj", bias=False, **layers)
    for t in ("gate", "up", "down"):
        yield from linear(f"layers/{t}", f"layers.{{i}}.mlp.{t}_proj", bias=False, **layers)


def _res_block(ours: str, theirs: str, batch_norm: bool, **layers) -> Iterator[Entry]:
    yield from conv(f"{ours}/conv1", f"{theirs}.conv1", **layers)
    yield from conv(f"{ours}/conv2", f"{theirs}.conv2", bias=False, **layers)
    yield from _norm(f"{ours}/norm", f"{theirs}.norm", batch_norm, **layers)


def _norm(ours: str, theirs: str, batch_norm: bool = False, **layers) -> Iterator[Entry]:
    yield Entry(f"{ours}/scale", (f"{theirs}.weight",), **layers)
    yield Entry(f"{ours}/bias", (f"{theirs}.bias",), **layers)
    if batch_norm:
        yield Entry(f"{ours}/mean", (f"{theirs}.running_mean",), **layers)
        yield Entry(f"{ours}/var", (f"{theirs}.running_var",), **layers)


def _efficient_vit_block(
    ours: str,
    theirs: str,
    batch_norm: bool,
    groups: int,
    scales: tuple[int, ...],
    **layers,
) -> Iterator[Entry]:
    attn = f"{theirs}.attn"
    # Despite their names, to_q, to_k and to_v are the thirds of one projection, whose outputs are
    # the q, k and v of one head after another.
    thirds = [f"{attn}.to_{t}" for t in "qkv"]
    yield from linear(f"{ours}/qkv", *thirds, bias=False, **layers)
    for j in range(len(scales)):
        scale, name = f"{ours}/multiscale_{j}", f"{attn}.to_qkv_multiscale.{j}"
        depthwise, pointwise = f"{name}.proj_in.weight", f"{name}.proj_out.weight"
        yield Entry(f"{scale}/depthwise_kernel", (depthwise,), DEPTHWISE, **layers)
        grouped, sizes = "(g o) i 1 1 -> g i o", (("g", groups),)
        yield Entry(f"{scale}/pointwise_kernel", (pointwise,), grouped, sizes=sizes, **layers)
    yield from linear(f"{ours}/out", f"{attn}.to_out", bias=False, **layers)
    yield from _norm(f"{ours}/norm", f"{attn}.norm_out", batch_norm, **layers)
    yield from glumbconv_entries(f"{ours}/ffn", f"{theirs}.conv_out", **layers)
    yield from _norm(f"{ours}/ffn_norm", f"{theirs}.conv_out.norm", **layers)


def dc_ae_entries(config: DCAEConfig) -> Iterator[Entry]:
    """Yields the entries of an AutoencoderDC."""

    def blocks(side: str, stage: int, first: int) -> Iterator[Entry]:
        ours = f"{side}/stage_{stage}/blocks"
        theirs = f"{side}.{'down' if side == 'encoder' else 'up'}_blocks.{stage}.{{i}}"
        depth = getattr(config, f"{side}_layers")[stage]
        layers = {"layers": range(first, first + depth)}
        if depth == 0:
            return
        batch_norm = side == "decoder" and config.decoder_norms[stage] == "batch_norm"
        if getattr(config, f"{side}_blocks")[stage] == "ResBlock":
            yield from _res_block(ours, theirs, batch_norm, **layers)
        else:
            width = getattr(config, f"{side}_channels")[stage]
            scales = getattr(config, f"{side}_qkv_multiscales")[stage]
            groups = 3 * width // config.attention_head_dim
            yield from _efficient_vit_block(ours, theirs, batch_norm, groups, scales, **layers)

    last = len(config.encoder_channels) - 1
    skips = {side: getattr(config, f"{side}_layers")[0] == 0 for side in ("encoder", "decoder")}
    yield from conv("encoder/conv_in", "encoder.conv_in" + ".conv" * skips["encoder"])
    yield from conv("encoder/conv_out", "encoder.conv_out")
    yield from conv("decoder/conv_in", "decoder.conv_in")
    yield from _norm("decoder/norm_out", "decoder.norm_out")
    yield from conv("decoder/conv_out", "decoder.conv_out" + ".conv" * skips["decoder"])
    for stage in range(last + 1):
        yield from blocks("encoder", stage, first=0)
        depth = config.encoder_layers[stage]
        if depth and stage < last:
            name = f"encoder.down_blocks.{stage}.{depth}.conv"
            yield from conv(f"encoder/stage_{stage}/down", name)
        # In the decoder the upsampling comes first in its stage.
        rises = bool(config.decoder_layers[stage]) and stage < last
        if rises:
            yield from conv(f"decoder/stage_{stage}/up", f"decoder.up_blocks.{stage}.0.conv")
        yield from blocks("decoder", stage, first=int(rises))
