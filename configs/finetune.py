"""Trains a checkpoint further on a folder of pictures, of five or of fifty thousand.

    python -m sana_jax.train --config=configs/finetune.py --workdir=RUN --config.start=CHECKPOINT \\
        --config.data.source=FOLDER --config.data.caption="a photo of sks dog"

CHECKPOINT is `shapes`, a native folder, a diffusers folder or a hub id. Its networks, their sizes,
its instruction, its flow shift and its native size are used, unless the command line names others.
The result is RUN/model/pytorch_lora_weights.safetensors, a LoRA of rank 4, which diffusers loads as
well. With `--config=configs/finetune.py:full` all weights train, and RUN/model is a whole model.

The caption is for pictures that have none beside them, in a.txt or the other files of
data/sidecars.py; {name} and {folder} in it stand for the names of the picture and of its folder,
and a caption with {caption}, such as "{caption}, in the style of sks", is made of the picture's
own. Pictures keep their aspect ratios where the size has buckets (512, 1024, 2048 and 4096 px); the
step is compiled for each bucket that they need.

    --config.prior.prompt="a photo of a dog"          # or --config.prior.prompts=FILE, one a line
    --config.recipe.steps=2000 --config.recipe.batch_size=32

With the first line the checkpoint draws 100 pictures of the class before it is trained, or one of
each prompt of a file, and half of each batch is of them (data/prior.py). A batch is 4 pictures, or
one for each device where there are more; twice as many with a prior.

Optimizer, clipping, batch and steps, and the rate of a LoRA, are those of diffusers' DreamBooth
script for SANA. The rate of all weights is that of SANA-1.5's stages after the first (arXiv
2501.18427). Noise levels are SANA's, logit-normal and shifted; in the script they are uniform and
have no shift. Nothing here has been run on published weights yet.
"""

from sana_jax.models.dit import SanaConfig
from sana_jax.training.text_to_image.recipe import text_to_image
from sana_jax.training.text_to_image.start import leave_open


def get_config(kind="lora"):
    if kind not in ("lora", "full"):
        raise ValueError(f"{kind} is neither lora nor full")
    config = leave_open(text_to_image(SanaConfig(), steps=500, batch_size=4))
    config.auto_lr = "none"
    config.remat = "full"
    config.recipe.optimizer.update(
        name="adamw", learning_rate=1e-4, weight_decay=1e-4, warmup_steps=0, clip_norm=1.0
    )
    # The checkpoint knows the empty prompt already, which few pictures would make one of them.
    config.recipe.update(caption_dropout=0.0, ema_decay=0.99)
    config.data.update(repeat=True, check_first=1000, upscale=True)
    config.loop.update(log_every=10, checkpoint_every=100, images_every=100)
    if kind == "lora":
        config.lora.rank = 4
    else:
        config.recipe.optimizer.learning_rate = 2e-5
        config.loop.checkpoint_every = 250  # of 26 GB at 1.6B
        config.keep = 1
    return config
