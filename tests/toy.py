"""Small random models that diffusers and transformers build, and the parity tests' measures."""

import dataclasses

import jax
import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from flax import traverse_util
from transformers import Gemma2Config, Gemma2Model

from sana_jax.checkpoints.diffusers_configs import sana_from_diffusers
from sana_jax.checkpoints.diffusers_names import entries
from sana_jax.models.dit import SanaConfig
from sana_jax.text.tokenizers import toy_tokenizer


def relative_error(ours, reference) -> float:
    """||ours - reference|| / ||reference||; NaN where either is not finite, so a gate fails."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def assert_close(ours, reference, tolerance: float, what: str = "") -> None:
    """Fails where the relative error is above `tolerance`; `pytest -rP` shows what it was."""
    error = relative_error(ours, reference)
    largest = np.abs(np.asarray(ours, np.float64) - np.asarray(reference, np.float64)).max()
    print(f"{what}: relative error {error:.2e}, bar {tolerance:.0e}, largest {largest:.2e}")
    assert error <= tolerance


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter and statistic a value that a wrong formula cannot hide behind.

    Matrices keep the spread that preserves the size of activations; norm scales vary around one,
    biases and modulation tables around zero; batch-norm variances stay positive.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor):
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32)

    statistics = [(n, b) for n, b in module.named_buffers() if "running_" in n]
    for name, tensor in [*module.named_parameters(), *statistics]:
        if name.endswith("running_var"):
            tensor.copy_(0.5 + normal(tensor).abs())
        elif "scale_shift_table" in name:
            tensor.copy_(0.3 * normal(tensor))
        elif tensor.ndim >= 2:
            tensor.copy_(normal(tensor) / max(1, tensor[0].numel()) ** 0.5)
        elif "norm" in name and name.endswith("weight"):
            tensor.copy_(1 + 0.2 * normal(tensor))
        else:
            tensor.copy_(0.2 * normal(tensor))
    return module.eval()


def params(module: torch.nn.Module, config):
    """The weights of a torch module as the parameters of our network with that config."""
    theirs = {name: tensor.float().numpy() for name, tensor in module.state_dict().items()}
    flat = {entry.path: entry.read(theirs) for entry in entries(config)}
    return traverse_util.unflatten_dict(flat, sep="/")


def transformer(seed: int = 0, **changes) -> tuple[torch.nn.Module, SanaConfig]:
    """A small SanaTransformer2DModel with random weights, and our config of it."""
    config = dict(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=48,
        sample_size=8,
    )
    module = SanaTransformer2DModel(**{**config, **changes})
    return randomise(module, seed), sana_from_diffusers(dict(module.config))


SPRINT = dict(qk_norm="rms_norm_across_heads", guidance_embeds=True)


def autoencoder(seed: int = 0, **changes) -> torch.nn.Module:
    """A small AutoencoderDC in the style of Sana's, factor 32."""
    widths = (8, 16, 16, 32, 32, 64)
    config = dict(
        latent_channels=8,
        attention_head_dim=16,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 2, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    module = randomise(AutoencoderDC(**{**config, **changes}), seed)
    with torch.no_grad():  # few pixels leave the range of an image
        module.decoder.conv_out.weight *= 0.4
    return module


def text_encoder(vocab_size: int, seed: int = 0) -> torch.nn.Module:
    """A small Gemma2Model whose sliding window and soft cap are reached."""
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=8,
        attn_logit_softcapping=5.0,
        attn_implementation="eager",
    )
    return randomise(Gemma2Model(config), seed)


def pipeline(seed: int = 0, **changes) -> SanaPipeline:
    """A whole diffusers pipeline of small networks; `changes` go to the transformer."""
    tokenizer = toy_tokenizer()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(len(tokenizer), seed),
        vae=autoencoder(seed),
        transformer=transformer(seed, **changes)[0],
        scheduler=DPMSolverMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    )


def set_angles(scheduler: SCMScheduler, angles) -> None:
    """Gives diffusers' sampler these angles, which its `timesteps` cannot: that raises (0.42)."""

    def set_timesteps(num_inference_steps, device=None, **_):
        assert num_inference_steps == len(angles) - 1
        scheduler.timesteps = torch.tensor(angles, dtype=torch.float32)
        scheduler.num_inference_steps = num_inference_steps
        scheduler._step_index = scheduler._begin_index = None

    scheduler.set_timesteps = set_timesteps


def sprint_pipeline(seed: int = 0) -> SanaSprintPipeline:
    """The same for Sprint."""
    tokenizer = toy_tokenizer()
    return SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(len(tokenizer), seed),
        vae=autoencoder(seed),
        transformer=transformer(seed, **SPRINT)[0],
        scheduler=SCMScheduler(),
    )


def devices(count: int):
    """The first forced host devices."""
    assert len(jax.devices()) >= count
    return jax.devices()[:count]


def replace_config(pipe, **changes):
    """Our pipeline with other fields in the transformer's config, the weights as they are."""
    dit = dataclasses.replace(pipe.checkpoint.dit, **changes)
    checkpoint = dataclasses.replace(pipe.checkpoint, dit=dit)
    return type(pipe)(checkpoint, pipe.mesh, pipe.dtype)
