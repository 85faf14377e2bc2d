#!/usr/bin/env bash
# diffusers 0.42.1 (torch 2.13.0, Python 3.11): the argument `timesteps` of SanaSprintPipeline and SanaSprintImg2ImgPipeline
# always raises. With it the pipeline leaves out the number of steps, which SCMScheduler.set_timesteps demands; without
# `max_timesteps=None` and `intermediate_timesteps=None` it raises before that. So the paper's four angles cannot be asked for.
#
# Valid input: timesteps=[1.5683, 1.3, 1.1, 0.6, 0.0] and num_inference_steps=4, as the documentation has it. Seen:
# TypeError: SCMScheduler.set_timesteps() missing 1 required positional argument: 'num_inference_steps'
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'diffusers==0.42.1' 'transformers==5.24.0'
cat > "$folder/look.py" <<'PYTHON'
import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

torch.manual_seed(0)
kinds, widths = ("ResBlock", "ResBlock"), (16, 32)
vae = AutoencoderDC(
    latent_channels=4,
    encoder_block_types=kinds,
    decoder_block_types=kinds,
    encoder_block_out_channels=widths,
    decoder_block_out_channels=widths,
    encoder_layers_per_block=(1, 1),
    decoder_layers_per_block=(1, 1),
    encoder_qkv_multiscales=((), ()),
    decoder_qkv_multiscales=((), ()),
)
transformer = SanaTransformer2DModel(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=1,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=8,
    guidance_embeds=True,
)
pipe = SanaSprintPipeline(None, None, vae, transformer, SCMScheduler())
pipe.set_progress_bar_config(disable=True)
embeds = torch.randn(2, 5, 8)  # of two prompts
size = dict(height=64, width=64, use_resolution_binning=False, output_type="latent")

mask = torch.ones(2, 5).long()
given = dict(prompt_embeds=embeds, prompt_attention_mask=mask, num_inference_steps=4)
given |= dict(max_timesteps=None, intermediate_timesteps=None)
try:
    pipe(timesteps=[1.5683, 1.3, 1.1, 0.6, 0.0], **given, **size)
    print("drawn")
except TypeError as error:
    print(error)
PYTHON
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | tee "$folder/out"
grep -q "missing 1 required positional argument: 'num_inference_steps'" "$folder/out"
