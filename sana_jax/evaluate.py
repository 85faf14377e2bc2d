"""Measures a checkpoint.

    python -m sana_jax.evaluate --task=reconstruction --checkpoint=DIR_OR_HUB_ID --data=PICTURES
    python -m sana_jax.evaluate --task=reconstruction --checkpoint=shapes --out=pairs.png
    python -m sana_jax.evaluate --task=shapes --checkpoint=shapes --out=sheet.png

reconstruction: how near decode(encode(image)) is to the image, for the images of --data, centre
cropped to squares. Both are rounded to 8 bits first; figures are means over the images.

    psnr                  peak signal-to-noise ratio, dB
    ssim                  structural similarity, Gaussian window, as scikit-image has it
    lpips                 on AlexNet, with --lpips_weights (null without)
    high_frequency_ratio  energy above 0.25 cycles a pixel, over that of the originals
    baseline_...          the same of images that are shrunk until they hold as many numbers as
                          the latents do, baseline_size, and enlarged again, both bicubic
    count, rejected       images that were measured, and those that could not be, by reason

shapes: what a model draws for --count prompts (512) whose combinations of shape and colour it was
not trained on, parsed without a sight of the prompt. Figures are shares, null where nothing was
stated, or where the checkpoint is an autoencoder alone.

    overall               pictures that have every stated fact right
    overall_error         its standard error, of so many prompts
    facts, count, shape, colour, size, position, relation
                          facts that are right, of all that are stated, and of that kind
    by_objects, by_style  overall, by number of objects and by the prompt's style
    by_shape              objects whose shape is right, by the stated one
    held_out              shape and colour right, for each combination training has not
    control_shuffled      overall against another picture's prompt: chance
    parser_overall        overall of the ground truth, which is drawn exactly
    parser                all shares of it, from overall to relation
    ceiling               overall of the ground truth after the autoencoder
    reconstruction, reconstruction_by_objects, reconstruction_by_shape
                          all shares of that, and by objects and shapes as above
    prompts, pixels       how many there were, and the pictures' side
    flow_shift            of the noise levels that sampling went through

The last line is a JSON object with these figures and what was measured: task and checkpoint; of
reconstruction data, split, size and dtype; of shapes the options.
"""

import dataclasses
import json
from functools import partial

from absl import flags
from etils import epath

from sana_jax.pictures import check_out, make_grid, save_png
from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

SHAPES_TEST = 1000  # images of the built-in data set that are made where there are none
SHOWN = 8  # images in the picture
OWN = {  # flags that one task alone reads
    "reconstruction": ("data", "data_dir", "split", "lpips_weights"),
    "shapes": ("seed", "num_steps", "guidance_scale", "flow_shift"),
}

FLAGS = flags.FLAGS
_TASK = flags.DEFINE_enum("task", "reconstruction", ["reconstruction", "shapes"], "what to measure")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "native or diffusers folder, bundled name, or hub id", required=True
)
_DATA = flags.DEFINE_string(
    "data", "shapes", "shapes, a folder of images, or tfds:NAME[/CONFIG][:VERSION]"
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "folder where shapes or TFDS data were prepared; default: TFDS' own, and for shapes a cache,"
    " where its test images are drawn the first time",
)
_SPLIT = flags.DEFINE_string(
    "split", None, "of the data; default: test, or all of a folder without such a subfolder"
)
_SIZE = flags.DEFINE_integer(
    "size",
    128,
    "side of the images in pixels; what the task shapes draws has the native size",
    16,
    2**13,
)
_COUNT = flags.DEFINE_integer(
    "count", None, "the first images of the data, default: all; or prompts, default: 512", 1, 10**6
)
_BATCH = flags.DEFINE_integer(
    "batch_size", 16, "images at once; rounded up to the number of devices", 1, 2**16
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "what networks compute in")
_LPIPS = flags.DEFINE_string(
    "lpips_weights",
    None,
    "AlexNet and LPIPS' heads, a .safetensors or .pth file, or TOWER,HEADS in two",
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "a .png to write, replaced if it is there: originals above reconstructions; or what was drawn,"
    " framed green where every fact is right",
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "of the prompts of shapes, and of the first picture; the others count up", 0, 2**31
)
_STEPS = flags.DEFINE_integer("num_steps", 20, "of sampling, 1 .. 1000", 1, 1000)
_GUIDANCE = flags.DEFINE_float(
    "guidance_scale", 2.0, "classifier-free guidance; off where <= 1", 0, 1000
)
_SHIFT = flags.DEFINE_float(
    "flow_shift", None, "of the sampler's noise levels; default: the checkpoint's", 1e-3, 1e3
)
_VARIANT = flags.DEFINE_string("variant", None, "of a diffusers folder's weights, such as bf16")
_REVISION = flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")


def open_data(data: str, data_dir: str | None, split: str | None, size: int):
    """The source and the name of its split, None of a folder without any. Raises UserError.

    Draws the test images of shapes into a cache where `data_dir` is None.
    """
    from sana_jax.data.sources import open_source

    if data == "shapes" and data_dir is None:
        if split not in (None, "test"):
            raise UserError(f"--split={split} of shapes: name the folder it is in with --data_dir")
        from sana_jax.runtime.devices import cache_folder
        from sana_jax.shapes.dataset import prepare

        try:
            data_dir = str(cache_folder() / "shapes_test")
        except RuntimeError:
            raise UserError("there is no home folder for a cache: give --data_dir") from None
        # A record depends on its number and split alone: the others need not be drawn.
        prepare(data_dir, size, train=1, test=SHAPES_TEST)
    if data.startswith("precomputed:"):
        raise UserError(f"--data={data}: these are latents; give images")
    if split is None:
        named, root = data == "shapes" or data.startswith("tfds:"), epath.Path(data).expanduser()
        split = "test" if named or (root / "test").is_dir() else "train"
        if not named and not (root / split).is_dir():
            return open_source(data), None
    return open_source(data, split, data_dir, size), split


def reconstruction() -> None:
    """The task of that name."""
    out = check_out(_OUT.value)
    size = _SIZE.value

    import jax
    import numpy as np

    from sana_jax import sharding
    from sana_jax.checkpoints.components import module_for
    from sana_jax.checkpoints.load import open_checkpoint, place_all
    from sana_jax.data.loader import EvaluationLoader
    from sana_jax.data.transforms import ImageTransform
    from sana_jax.metrics import lpips
    from sana_jax.metrics.reconstruction_figures import figures
    from sana_jax.runtime import checks
    from sana_jax.runtime.progress import Progress

    options = dict(variant=_VARIANT.value, revision=_REVISION.value)
    checkpoint = open_checkpoint(_CHECKPOINT.value, **options)
    checkpoint = dataclasses.replace(checkpoint, dit=None, text_encoder=None)
    config = checkpoint.vae
    checks.multiple(f"--size={size}", size, config.factor)
    distance = None
    if _LPIPS.value is not None:
        measure = jax.jit(partial(lpips.lpips, tower="alex"))
        distance = partial(measure, jax.device_put(lpips.load("alex", _LPIPS.value)))
        if size < lpips.SMALLEST["alex"]:
            raise UserError(f"--lpips_weights needs --size={lpips.SMALLEST['alex']} or more")
    source, split = open_data(_DATA.value, _DATA_DIR.value, _SPLIT.value, size)
    mesh = sharding.make_mesh()
    batch = _BATCH.value + -_BATCH.value % sharding.batch_divisor(mesh)
    loader = EvaluationLoader(
        source, ImageTransform(size, size), batch_size=batch, limit=_COUNT.value
    )

    place_all(checkpoint, _CHECKPOINT.value, _DTYPE.value, mesh)
    apply = jax.jit(module_for(config, _DTYPE.value).apply)
    params = {"params": checkpoint.params["vae"]}

    def reconstruct(images):
        return apply(params, jax.device_put(images, sharding.batch_sharding(mesh)))

    values = config.latent_channels / config.factor**2
    with (
        jax.set_mesh(mesh),
        jax.default_matmul_precision("float32"),
        Progress(loader.records, "image") as progress,
    ):
        found = figures(reconstruct, loader, values, distance, progress.update)
        if not np.isfinite(found["psnr"]):
            raise UserError(
                f"{_CHECKPOINT.value} reconstructs some of {_DATA.value} with NaN or infinite"
                " values: its weights are not those of a trained autoencoder, or need another"
                " --dtype"
            )
        if out is not None:
            save_png(out, pairs(reconstruct, loader))

    data = _DATA.value if split is None else f"{_DATA.value} {split}"
    print(f"{data}, {found['count']} images at {size} px; {loader.counts}")
    print(table(found))
    about = {
        "task": "reconstruction",
        "checkpoint": _CHECKPOINT.value,
        "data": _DATA.value,
        "split": split,
        "size": size,
        "dtype": _DTYPE.value,
    }
    rejected = {reason: count for reason, count in loader.counts.rejected.items() if count}
    print(json.dumps(about | found | {"rejected": rejected}))


def pairs(reconstruct, loader):
    """A sheet of the first usable images, their reconstructions below them."""
    import numpy as np

    from sana_jax.metrics.reconstruction import to_uint8

    batches = (loader.load(step)[0] for step in range(len(loader)))
    batch = next(batch for batch in batches if batch["valid"].any())
    rows = batch["image"], reconstruct(batch["image"])
    return make_grid([list(np.asarray(to_uint8(x))[batch["valid"]][:SHOWN]) for x in rows])


def table(found: dict) -> str:
    """The figures for people."""
    small = "x".join(map(str, found["baseline_size"]))
    lines = [f"{'':26}{'PSNR dB':>9}{'SSIM':>9}{'LPIPS':>9}{'fine detail':>13}"]
    for name, prefix in ("reconstruction", ""), (f"bicubic from {small}", "baseline_"):
        psnr, ssim, lpips, ratio = (
            found[prefix + key] for key in ("psnr", "ssim", "lpips", "high_frequency_ratio")
        )
        measured = (f"{value:.4f}" if value is not None else "-" for value in (lpips, ratio))
        lines.append("{:26}{:9.2f}{:9.4f}{:>9}{:>13}".format(name, psnr, ssim, *measured))
    return "\n".join(lines)


def shapes() -> None:
    """The task of that name."""
    out = check_out(_OUT.value)

    from sana_jax.shapes import evaluation

    options = evaluation.Options(
        count=_COUNT.value or 512,
        seed=_SEED.value,
        num_steps=_STEPS.value,
        guidance_scale=_GUIDANCE.value,
        flow_shift=_SHIFT.value,
        batch_size=_BATCH.value,
        size=_SIZE.value,
        dtype=_DTYPE.value,
        variant=_VARIANT.value,
        revision=_REVISION.value,
    )
    found, sheet = evaluation.measure(_CHECKPOINT.value, options)
    if out is not None:
        save_png(out, sheet)
    error = found["overall_error"]
    sure = "" if error is None else f" (overall +- {100 * error:.1f}, a standard error)"
    print(f"{found['prompts']} held-out prompts, {found['pixels']} px; per cent{sure}:")
    print(evaluation.table(found))
    if found["overall"] is None:
        print(f"note: {_CHECKPOINT.value} is an autoencoder alone, which draws nothing")
    about = {"task": "shapes", "checkpoint": _CHECKPOINT.value}
    # Under a key of their own: count and size are kinds of facts here.
    print(json.dumps(about | {"options": dataclasses.asdict(options)} | found))


TASKS = {"reconstruction": reconstruction, "shapes": shapes}


def main(argv):
    del argv
    for name in (name for task, names in OWN.items() if task != _TASK.value for name in names):
        if FLAGS[name].present:
            raise UserError(f"--{name} is not of --task={_TASK.value}; leave it out")
    from sana_jax.runtime import devices

    with devices.memory_errors("a smaller --batch_size or --size"):
        TASKS[_TASK.value]()


if __name__ == "__main__":
    cli.run(main)
