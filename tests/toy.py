"""Small random models that diffusers and transformers build, and the measures of the parity tests."""

import numpy as np
import torch
from diffusers import SanaTransformer2DModel
from flax import traverse_util

from sana_jax.checkpoints.diffusers_names import entries
from sana_jax.models.dit import SanaConfig


def relative_error(ours, reference) -> float:
    """||ours - reference|| / ||reference||; NaN where either is not finite, so a gate fails."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def assert_close(ours, reference, tolerance: float, what: str = "") -> None:
    """Fails with the relative error and the largest absolute difference beside it."""
    error = relative_error(ours, reference)
    largest = np.abs(np.asarray(ours, np.float64) - np.asarray(reference, np.float64)).max()
    assert error <= tolerance, f"{what}: relative {error:.2e} > {tolerance:.0e}, largest {largest:.2e}"


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter and buffer a value that a wrong formula cannot hide behind.

    Matrices keep the spread that preserves the size of activations; norm scales vary around one,
    biases and modulation tables around zero; batch-norm variances stay positive.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor):
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32)

    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point() or "pos_embed" in name or "inv_freq" in name:
            continue
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
    return randomise(module, seed), SanaConfig.from_diffusers(dict(module.config))
