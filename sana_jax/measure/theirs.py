"""The reference's side of a measurement: diffusers, with the same weights as our side.

The only file of the package that uses torch and diffusers, in a process of its own.
"""

import gc
import os

import numpy as np

from sana_jax.checkpoints.diffusers_configs import config_json
from sana_jax.checkpoints.diffusers_names import entries
from sana_jax.checkpoints.mapping import write_params
from sana_jax.diffusion import scm
from sana_jax.measure import inputs
from sana_jax.measure.inputs import PARTS, Settings


class Diffusers:
    """Like measure.ours.Ours, for diffusers at its best: inference mode, all cores, channels last.

    Channels last suits torch: on two CPU cores its depthwise convolution takes 20 ms, and 53 ms in
    the default order (float32, 5760 channels of 32 x 32), the autoencoder's encoder 8 % less time,
    its decoder 1 to 4 % less.
    """

    def __init__(self, settings: Settings):
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        # With float32, as precise as our side.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        self.settings, self.cuda = settings, torch.cuda.is_available()

    def load(self) -> None:
        """Makes the part's network with our weights, on the device."""
        checkpoint = inputs.checkpoint(self.settings)
        module = _make_module(checkpoint, self.settings, "cuda" if self.cuda else "cpu")
        self._run = _prepare(checkpoint, self.settings, module)

    def run(self, call: int):
        """Runs the part on the inputs of this call and waits for the result."""
        import torch

        with torch.inference_mode():
            out = self._run(call)
            if self.cuda:
                torch.cuda.synchronize()
        return out

    def to_numpy(self, out) -> np.ndarray:
        """Returns the result in float32, channels last as on our side."""
        array = out.float().cpu().numpy()
        return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array

    def describe(self) -> dict[str, str]:
        """Returns the versions of the libraries and the kind of device."""
        import diffusers
        import torch

        return dict(
            torch=torch.__version__,
            diffusers=diffusers.__version__,
            reference_platform="gpu" if self.cuda else "cpu",  # as JAX names them
        )

    def peak_bytes(self) -> int | None:
        """Returns the peak use of the GPU's memory; None on a CPU."""
        import torch

        return torch.cuda.max_memory_allocated() if self.cuda else None


def _make_module(checkpoint, settings: Settings, device: str):
    """Returns the part's network with the random weights of our side."""
    import torch
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from torch.overrides import TorchFunctionMode
    from transformers import Gemma2Config, Gemma2Model

    class Uninitialised(TorchFunctionMode):
        """Skips torch's initialisation of weights, which are overwritten at once."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if getattr(function, "__module__", None) == "torch.nn.init":
                return kwargs["tensor"] if "tensor" in kwargs else args[0]
            return function(*args, **kwargs)

    # The module, in its dtype from the start.
    name, dtype = PARTS[settings.part], getattr(torch, settings.dtype)
    config = getattr(checkpoint, name)
    standard = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with Uninitialised(), torch.device(device):
            if name == "text_encoder":
                module = Gemma2Model(Gemma2Config(**config_json(config)))
            else:
                kind = {"dit": SanaTransformer2DModel, "vae": AutoencoderDC}[name]
                module = kind.from_config(config_json(config))
    finally:
        torch.set_default_dtype(standard)

    # Our weights, one tensor at a time. Only counters of batches may be left over.
    tensors = module.state_dict()
    for key, lazy in write_params(entries(config), checkpoint.params[name]):
        array = np.asarray(lazy)
        if settings.dtype == "bfloat16":  # torch does not know ml_dtypes' type
            value = torch.from_numpy(array.view(np.uint16)).view(dtype)
        else:
            value = torch.from_numpy(array)
        tensors.pop(key).copy_(value)
    assert all("num_batches_tracked" in key for key in tensors), sorted(tensors)
    del array, value, lazy
    gc.collect()
    module = module.eval().requires_grad_(False)
    if name != "text_encoder":
        module = module.to(memory_format=torch.channels_last)
    return module


def _prepare(checkpoint, settings: Settings, module):
    import torch

    device, dtype = module.device, module.dtype
    batch, side = settings.batch, settings.size // checkpoint.vae.factor
    channels, dit = checkpoint.vae.latent_channels, checkpoint.dit
    network = side, channels, checkpoint.text_rows, dit.caption_channels
    halves = inputs.halves(dit)

    def tensor(array, dtype=dtype):
        """Returns a tensor on the device; images get torch's axes, channels last in memory."""
        value = torch.tensor(array, device=device)
        if value.ndim == 4:
            value = value.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        return value.to(dtype)

    def compiled(function):
        mode = "max-autotune" if device.type == "cuda" else "default"
        return torch.compile(function, mode=mode) if settings.compiled else function

    if settings.part == "trunk":
        given = inputs.trunk(halves * batch, *network)
        latents, captions = tensor(given["latents"]), tensor(given["captions"])
        mask = tensor(given["mask"], torch.int32)
        time = inputs.TIMESTEP * dit.timestep_scale
        timestep = torch.full((halves * batch,), time, device=device)
        run = compiled(module)
        named = dict(encoder_hidden_states=captions, encoder_attention_mask=mask)
        if dit.is_sprint:
            scale = torch.full((batch,), inputs.GUIDANCE_SCALE, device=device)
            named["guidance"] = scale * dit.guidance_embedding

        def trunk(call):
            return run(latents, timestep=timestep, **named, return_dict=False)[0]

        return trunk
    if settings.part == "decode":
        latents, run = tensor(inputs.decode(batch, side, channels)), compiled(module.decode)
        scale = module.config.scaling_factor
        return lambda call: run(latents / scale, return_dict=False)[0]
    if settings.part == "encode":
        images, run = tensor(inputs.encode(batch, settings.size)), compiled(module.encode)
        scale = module.config.scaling_factor
        return lambda call: run(images, return_dict=False)[0] * scale

    pipe = _make_pipeline(checkpoint, settings, compiled(module))
    pipe.set_progress_bar_config(disable=True)
    if settings.part == "text":
        text = [inputs.instruction()]

        def encode(call):
            prompts = inputs.prompts(batch, call)
            rows, mask, *_ = pipe.encode_prompt(prompts, False, complex_human_instruction=text)
            return rows * mask[..., None]

        return encode

    return _prepare_loop(checkpoint, settings, pipe, tensor)


def _prepare_loop(checkpoint, settings: Settings, pipe, tensor):
    """Returns the part "loop"; `tensor` puts an array on the device."""
    import torch
    from diffusers.schedulers import scheduling_scm

    batch, side = settings.batch, settings.size // checkpoint.vae.factor
    channels, dit = checkpoint.vae.latent_channels, checkpoint.dit
    given = inputs.loop(batch, side, channels, checkpoint.text_rows, dit.caption_channels)
    options = dict(
        prompt_embeds=tensor(given["captions"]),
        prompt_attention_mask=tensor(given["mask"], torch.int32),
        latents=tensor(given["latents"], torch.float32),
        num_inference_steps=settings.steps,
        guidance_scale=inputs.GUIDANCE_SCALE,
        height=settings.size,
        width=settings.size,
        use_resolution_binning=False,
        output_type="latent",
        return_dict=False,
    )
    if dit.is_sprint:
        fresh = inputs.fresh(batch, settings.steps, side, channels)
        noise = [tensor(z, torch.float32) for z in fresh.swapaxes(0, 1)]
        angles = torch.tensor(scm.named_angles(None, settings.steps), dtype=torch.float32)

        def set_timesteps(*_, **__):  # its argument `timesteps` raises in diffusers 0.42
            pipe.scheduler.timesteps = angles.to(pipe.device)
            pipe.scheduler.num_inference_steps = settings.steps
            pipe.scheduler._step_index = None

        pipe.scheduler.set_timesteps = set_timesteps
        options["intermediate_timesteps"] = None

        def draw(call):
            left = iter(noise)
            scheduling_scm.randn_tensor = lambda shape, **_: next(left)
            return pipe(**options)[0]

        return draw
    # Without a text, the pipeline uses the embeddings of the negative prompt.
    options |= dict(
        negative_prompt=None,
        negative_prompt_embeds=tensor(given["negative"]),
        negative_prompt_attention_mask=tensor(given["negative_mask"], torch.int32),
    )
    return lambda call: pipe(**options)[0]


def _make_pipeline(checkpoint, settings: Settings, module):
    """Returns diffusers' own pipeline of one network, for the parts "text" and "loop"."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaSprintPipeline,
        SCMScheduler,
    )

    is_sprint = checkpoint.dit.is_sprint and settings.part == "loop"
    scheduler = DPMSolverMultistepScheduler(
        flow_shift=checkpoint.flow_shift,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
    )
    return (SanaSprintPipeline if is_sprint else SanaPipeline)(
        tokenizer=checkpoint.tokenizer if settings.part == "text" else None,
        text_encoder=module if settings.part == "text" else None,
        transformer=module if settings.part == "loop" else None,
        vae=None,
        scheduler=SCMScheduler() if is_sprint else scheduler,
    )
