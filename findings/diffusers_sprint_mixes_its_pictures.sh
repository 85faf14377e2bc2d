#!/usr/bin/env bash
# diffusers 0.42.1 (torch 2.13.0, Python 3.11): SanaSprintImg2ImgPipeline gives prompts the pictures of one another where
# num_images_per_prompt is above 1. It repeats prompts in place (a, a, b, b), and the pictures' latents as a whole
# (1, 2, 1, 2).
#
# Valid input: two prompts a and b, a picture for each, 1 and 2, two images a prompt, a generator for each image. Seen: of the
# two images of prompt a the second is the one that prompt a draws alone from picture 2; the first of prompt b is from 1.
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
pictures = [torch.full((1, 3, 64, 64), level) for level in (0.0, 1.0)]


def draw(prompts, images, seeds, **options):
    noise, mask = [torch.Generator().manual_seed(s) for s in seeds], torch.ones(len(prompts), 5)
    given = dict(prompt_embeds=embeds[prompts], prompt_attention_mask=mask.long(), generator=noise)
    return pipe(image=torch.cat(images), strength=0.5, **given, **size, **options).images


together = draw([0, 1], pictures, range(4), num_images_per_prompt=2)
for i, image in enumerate(together):
    apart = [(draw([i // 2], [x], [i])[0] - image).abs().max().item() for x in pictures]
    print(f"image {i} of prompt {'ab'[i // 2]} is from picture {1 + (apart[1] < apart[0])}")
PYTHON
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | tee "$folder/out"
grep -q "image 1 of prompt a is from picture 2" "$folder/out"
grep -q "image 2 of prompt b is from picture 1" "$folder/out"
