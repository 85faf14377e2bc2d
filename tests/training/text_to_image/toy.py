"""A tiny text-to-image training: its checkpoint, its pictures, its config; its stored latents."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from sana_jax.checkpoints import native
from sana_jax.data.precomputed import ShardWriter, weights_sha256, write_json
from sana_jax.training.text_to_image.run import TextToImageTraining
from tests import mini

CONFIG = """
from sana_jax.models.dit import SanaConfig
from sana_jax.training.text_to_image.recipe import text_to_image

NETWORK = SanaConfig(depth=1, width=32, head_dim=16, latent_channels=8, cross_heads=1,
                     caption_channels=48, sample_size=4)

def get_config():
    config = text_to_image(NETWORK, steps=20, batch_size=8)
    config.autoencoder = config.text_encoder.checkpoint = FOLDER + "/base"
    config.text_encoder.rows = 8
    config.dtype = "float32"
    config.data.source = FOLDER + "/photos"
    config.recipe.optimizer.update(name="adamw", warmup_steps=2, learning_rate=3e-3)
    config.auto_lr = "none"
    config.loop.update(log_every=5, checkpoint_every=5)
    config.loader.update(threads=1, prefetch=1)
    config.images.update(prompts=("a red cat", "a blue dog"), num_steps=1)
    config.evaluation.update(batches=1, sigmas=(0.2, 0.8))
    return config
"""


def prepare(folder: Path) -> Path:
    """Writes the checkpoint, its autoencoder alone, 32 captioned pictures and the config's file."""
    mini.save(folder / "base")
    native.save(mini.alone(folder / "base"), folder / "autoencoder")
    rng = np.random.default_rng(0)
    for split in "train", "test":
        (folder / "photos" / split).mkdir(parents=True)
        for i in range(16):
            picture = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
            stem = folder / "photos" / split / f"{i}"
            picture.resize((24, 20), Image.BICUBIC).save(f"{stem}.png")
            words = "red green blue".split()[i % 3], "cat dog".split()[i % 2]
            Path(f"{stem}.txt").write_text("a {} {}".format(*words))
    (folder / "config.py").write_text(CONFIG.replace("FOLDER", repr(str(folder))))
    return folder / "config.py"


def load(path: Path, **changes) -> ConfigDict:
    """Returns the config in the file, with changes by dotted keys."""
    namespace = {}
    exec(path.read_text(), namespace)
    config = namespace["get_config"]()
    if "phases" in changes:  # as an autoencoder's recipe has
        config.phases = changes.pop("phases")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def store(folder, config, split, shapes, **changes):
    """Writes stored latents of these shapes, eight of each, and embeddings if `text` is given."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    base, writer = native.open_folder(config.parent / "base"), ShardWriter(folder / split, 0)
    index = {"format": 1, "split": split, "text": None, "text_encoder": None}
    index |= {"scaling_factor": base.vae.scaling_factor} | changes
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(8 * shapes):
        row = {"key": str(i), "truth": "", "captions": ["a cat"], "scores": [], "scaled": True}
        row["latents"] = rng.standard_normal((height, width, 8)).astype(np.float32)
        if index["text"]:
            row["embeddings"] = [rng.standard_normal((3, 48)).astype(np.float32)]
        writer.add(row)
    index["autoencoder"] = weights_sha256(base.vae, base.params["vae"])
    write_json(folder / split / "index.json", index | {"shards": [writer.finish({})]} | changes)


def stored(folder, config, **changes):
    """Returns a training on a folder of stored latents."""
    changes = dict(data__source=f"precomputed:{folder}") | changes
    return TextToImageTraining(load(config, **changes), str(folder / "run"))
