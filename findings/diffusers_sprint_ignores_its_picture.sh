#!/usr/bin/env bash
# diffusers 0.42.1 (torch 2.13.0, Python 3.11): SanaSprintImg2ImgPipeline ignores its picture, without a word, when strength and
# the number of steps are left at their defaults. Of 2 steps a strength of 0.6 runs ceil(1.2) = 2, that is all of them, from
# the angle 1.5708: there the picture counts cos(1.5708) = -3.7e-6 times. Any strength above 0.5 does the same.
#
# Valid input: a black and a white picture, a prompt, and the same noise. Seen: latents that differ by 1e-5 at the defaults,
# and by 1.5 with strength=0.5.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'diffusers==0.42.1' 'transformers==5.24.0'
cat > "$folder/look.py" <<'PYTHON'
import torch
from diffusers import AutoencoderDC, SanaSprintImg2ImgPipeline, SanaTransformer2DModel, SCMScheduler

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
pipe = SanaSprintImg2ImgPipeline(None, None, vae, transformer, SCMScheduler())
pipe.set_progress_bar_config(disable=True)
embeds = torch.randn(2, 5, 8)  # of two prompts
size = dict(height=64, width=64, use_resolution_binning=False, output_type="latent")


def draw(level, **options):
    noise = torch.Generator().manual_seed(2)
    picture, mask = torch.full((1, 3, 64, 64), level), torch.ones(1, 5).long()
    given = dict(prompt_embeds=embeds[:1], prompt_attention_mask=mask, generator=noise)
    return pipe(image=picture, **given, **size, **options).images


for options in {}, {"strength": 0.5}:
    apart = (draw(0.0, **options) - draw(1.0, **options)).abs().max().item()
    seen = "hardly" if apart < 1e-4 else "much"
    print(f"{options or 'defaults'}: two pictures change the result {seen} ({apart:.0e})")
PYTHON
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | tee "$folder/out"
grep -q "defaults: two pictures change the result hardly" "$folder/out"
grep -q "'strength': 0.5}: two pictures change the result much" "$folder/out"
