"""Measures a checkpoint, or a folder of pictures.

    python -m sana_jax.evaluate --task=reconstruction --checkpoint=DIR_OR_HUB_ID --data=PICTURES
    python -m sana_jax.evaluate --task=reconstruction --checkpoint=shapes --out=pairs.png
    python -m sana_jax.evaluate --task=shapes --checkpoint=shapes --out=sheet.png
    python -m sana_jax.evaluate --task=importance --checkpoint=DIR --prompts=prompts.txt \\
        --guidance_scale=4.5 --out=importance.json
    python -m sana_jax.evaluate --task=shapes --checkpoint=TAUGHT/model --novel
    python -m sana_jax.evaluate --task=fid --data=PICTURES --reference=REAL_OR_STATISTICS.npz \\
        --weights=pt_inception-2015-12-05-6726825d.pth --protocol=sana --workdir=FEATURES
    python -m sana_jax.evaluate --task=clip_score --data=BATCH_RUN --weights=CLIP_FOLDER
    python -m sana_jax.evaluate --task=clip_score --checkpoint=DIR --prompts=prompts.jsonl \\
        --data=BATCH_RUN --weights=CLIP_FOLDER --protocol=sana
    python -m sana_jax.evaluate --task=cmmd --data=PICTURES --reference=REAL --weights=CLIP_FOLDER

reconstruction: how near decode(encode(image)) is to the image, for the images of --data, centre
cropped to squares. Both are rounded to 8 bits first; the figures are means over the images.

    psnr                  peak signal-to-noise ratio, dB
    ssim                  structural similarity with a Gaussian window, as in scikit-image
    lpips                 LPIPS on AlexNet, with --lpips_weights (null without)
    high_frequency_ratio  energy above 0.25 cycles per pixel, divided by that of the originals
    baseline_...          the same for images that are shrunk until they hold no more numbers than
                          the latents do, to baseline_size, and enlarged again, both bicubic
    count, rejected       images that were measured, and those that could not be, by reason

shapes: how well a model draws --count prompts (512) with combinations of shape and colour that it
was not trained on. A parser that does not see the prompt reads the pictures. Figures are shares,
null where nothing was stated, or where the checkpoint is an autoencoder alone.

    overall               pictures that have every stated fact right
    overall_error         standard error of overall, for this number of prompts
    facts, count, shape, colour, size, position, relation
                          facts that are right: of all that are stated, and of each kind
    by_objects, by_style  overall, by the number of objects and by the prompt's style
    by_shape              objects whose shape is right, by the stated shape
    held_out              shape and colour right, for each combination left out of training
    control_shuffled      overall against another picture's prompt: chance
    parser_overall        overall of the ground truth, which is drawn exactly
    parser                all shares of the ground truth, from overall to relation
    ceiling               overall of the ground truth after the autoencoder
    reconstruction, reconstruction_by_objects, reconstruction_by_shape
                          all shares of the ceiling, and by objects and by shapes as above
    prompts, pixels       the number of prompts, and the side of the pictures
    flow_shift            shift of the noise levels that sampling used, null for Sana-Sprint
    options               all of the settings
    novel                 with --novel, the colour that every prompt names; the bundled model has
                          not seen it (make_shapes --novel), and held_out is about it

importance: how much each block of the transformer changes its input, for `convert --prune`. The
first --count prompts (100) of --prompts, by default held-out prompts of shapes, are drawn, and at
every step 1 - cos of a token's state before and after each block is measured. --out gets a .json:

    importance            the mean over tokens, steps and prompts, for every block in order
    sha256, depth         hash of the transformer's weights, and the number of its blocks
    prompts, evaluations  the number of prompts, and of evaluations of the network, one a step
    flow_shift            shift of the noise levels that sampling used
    instruction           sha256 of the complex human instruction, null without
    pictures              (in --out alone) the prompt and the settings of every picture

fid, clip_score, cmmd: how good the pictures of a folder are; sana_jax/metrics/README.md has the
formulas. With --workdir a killed run goes on, and ends with the figures of an unbroken one. With
--checkpoint and --prompts the pictures are first drawn into --data, those that are not there yet,
as --protocol says.

    fid                   Frechet distance of Inception's features to those of --reference
    kid, kid_std          kernel distance of the same: mean and spread over 100 subsets of 1,000
    precision, recall     share of the pictures among the reference's, and the reverse
    clip_score, standard_error
                          mean of 100 x the cosine of picture and prompt in CLIP's space
    cmmd                  Gaussian kernel's distance of CLIP's features, x 1,000
    count, rejected, rejected_pictures, reference_...
                          pictures that were measured, and each that could not be, with the reason
    protocol, resize, size, jpeg, jpeg_quality, preprocess, weights_sha256, ...
                          everything that decided the figures
    drawing, seeds, prompts_sha256
                          of a batch run: the settings that its pictures share, the first and the
                          last seed, and a hash of the prompts
    deviations            with --protocol: the settings that it would have chosen otherwise

The last line is a JSON object with these figures and what was measured: task and checkpoint, then
data, split, size and dtype for reconstruction, or the options for the other tasks.
"""

import json
from functools import partial

from absl import flags

from sana_jax.checkpoints import flags as checkpoint_flags
from sana_jax.checkpoints.flags import given
from sana_jax.pictures import check_out, save_png
from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

CHECKPOINT = "checkpoint", "variant", "revision", "dtype", "out"
SAMPLING = "seed", "num_steps", "guidance_scale", "flow_shift"
PICTURES = "data", "weights", "workdir", "protocol", "jpeg"
PICTURES += "checkpoint", "variant", "revision", "prompts"
OWN = {  # flags that not every task reads
    "reconstruction": (*CHECKPOINT, "data", "data_dir", "split", "lpips_weights", "size"),
    "shapes": (*CHECKPOINT, *SAMPLING, "angles", "size", "lora", "novel"),
    "importance": (*CHECKPOINT, *SAMPLING, "prompts"),
    "fid": (*PICTURES, "reference", "resize", "size", "statistics"),
    "clip_score": (*PICTURES, "dtype"),
    "cmmd": (*PICTURES, "dtype", "reference"),
}

SIZE = 128

FLAGS = flags.FLAGS
_TASK = flags.DEFINE_enum("task", "reconstruction", list(OWN), "the task, as described above")
_CHECKPOINT = checkpoint_flags.define("checkpoint", required=False)
_DATA = flags.DEFINE_string(
    "data",
    "shapes",
    "shapes, a folder of images, or tfds:NAME[/CONFIG][:VERSION]; for fid, clip_score and cmmd a"
    " folder, such as one that `sample` wrote",
)
_REFERENCE = flags.DEFINE_string(
    "reference", None, "a folder to compare with; for fid also a .npz file with mu and sigma"
)
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "for fid pytorch-fid's weights of Inception-v3, a .pth or .safetensors file; for clip_score and"
    " cmmd a folder of CLIP as transformers writes it: ViT-L/14, and for cmmd ViT-L/14 at 336 px",
)
_RESIZE = flags.DEFINE_enum(
    "resize",
    "bilinear",
    ["bilinear", "bicubic"],
    "how pictures are resized for Inception: as by pytorch-fid and SANA, or as by clean-fid",
)
_JPEG = flags.DEFINE_bool(
    "jpeg", False, "measure the pictures of --data as if they were stored as JPEG, as SANA's are"
)
_PROTOCOL = flags.DEFINE_enum(
    "protocol",
    None,
    ["sana", "clean"],
    "sana: --resize=bilinear --size=512 --jpeg, as SANA's figures; clean: --resize=bicubic alone;"
    " and how --checkpoint draws (sana_jax/metrics/protocol.py)",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "a folder for features, where a killed run goes on and later ones find them"
)
_STATISTICS = flags.DEFINE_string(
    "statistics", None, "a .npz file to write mu and sigma of --data to, replaced if it exists"
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "folder where shapes or TFDS data were prepared; default: TFDS' own folder, and for shapes a"
    " cache, where its test images are drawn the first time",
)
_SPLIT = flags.DEFINE_string(
    "split", None, "split of the data; default: test, or a whole folder that has no such subfolder"
)
_SIZE = flags.DEFINE_integer(
    "size",
    None,
    "side of the images in pixels; default: 128. shapes uses it only for an autoencoder without a"
    " transformer; for fid, of squares that pictures are made first, 512 in SANA's; default: none",
    16,
    2**13,
)
_COUNT = flags.DEFINE_integer(
    "count",
    None,
    "how many of the first images (default: all), or how many prompts (default: 512 for shapes, 100"
    " for importance)",
    1,
    10**6,
)
_BATCH = flags.DEFINE_integer(
    "batch_size", 16, "images at once; rounded up to a multiple of the number of devices", 1, 2**16
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "dtype that the networks compute in"
)
_LPIPS = flags.DEFINE_string(
    "lpips_weights",
    None,
    "weights of AlexNet and LPIPS' heads: a .safetensors or .pth file, or two as TOWER,HEADS",
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "a .png to write, replaced if it exists: originals above reconstructions; or the drawn"
    " pictures, framed green where every fact is right; for importance a .json",
)
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "a .txt file, one a line, or a .jsonl file as `sample` takes: prompts to measure importance on,"
    " by default held-out prompts of shapes; for fid, clip_score and cmmd those of --checkpoint",
)
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "seed of the prompts of shapes, and of the first picture; the others count up",
    0,
    2**31,
)
_STEPS = flags.DEFINE_integer(
    "num_steps", 20, "steps of sampling, 1 .. 1000; default for Sana-Sprint: 2", 1, 1000
)
_GUIDANCE = flags.DEFINE_float(
    "guidance_scale",
    2.0,
    "scale of classifier-free guidance; 1 or less: no guidance; default for Sana-Sprint, whose"
    " network reads it: 4.5",
    0,
    1000,
)
_SHIFT = flags.DEFINE_float(
    "flow_shift", None, "shift of the sampler's noise levels; default: the checkpoint's", 1e-3, 1e3
)
_ANGLES = checkpoint_flags.define_angles()
_LORA = checkpoint_flags.define_lora()
_NOVEL = flags.DEFINE_bool(
    "novel", False, "ask for a colour that shapes does not have, which make_shapes --novel teaches"
)
_VARIANT = checkpoint_flags.define("variant")
_REVISION = checkpoint_flags.define("revision")


def reconstruction() -> None:
    """Measures how near decode(encode(image)) is to the image."""
    _require("checkpoint")
    out = check_out(_OUT.value)

    from sana_jax.metrics import reconstruction_task

    options = reconstruction_task.Options(
        data=_DATA.value,
        data_dir=_DATA_DIR.value,
        split=_SPLIT.value,
        size=_SIZE.value or SIZE,
        count=_COUNT.value,
        batch_size=_BATCH.value,
        dtype=_DTYPE.value,
        lpips_weights=_LPIPS.value,
        variant=_VARIANT.value,
        revision=_REVISION.value,
    )
    found = reconstruction_task.reconstruction(_CHECKPOINT.value, options, out is not None)
    if out is not None:
        save_png(out, found.sheet)
    print(found.text)
    print(json.dumps(found.figures))


def shapes() -> None:
    """Measures how well a model of the built-in data set draws what prompts state."""
    _require("checkpoint")
    out = check_out(_OUT.value)

    from sana_jax.shapes import evaluation, novel

    options = evaluation.Options(
        count=_COUNT.value or 512,
        seed=_SEED.value,
        num_steps=given(_STEPS),
        guidance_scale=given(_GUIDANCE),
        flow_shift=_SHIFT.value,
        angles=checkpoint_flags.angles(_ANGLES),
        batch_size=_BATCH.value,
        size=_SIZE.value or SIZE,
        dtype=_DTYPE.value,
        variant=_VARIANT.value,
        revision=_REVISION.value,
        lora=_LORA.value,
    )
    quiz = evaluation.NOVEL if _NOVEL.value else evaluation.USUAL
    found, sheet = evaluation.measure(_CHECKPOINT.value, options, quiz)
    if out is not None:
        save_png(out, sheet)
    asked = f" with {novel.NAME}" if _NOVEL.value else ""
    error = found["overall_error"]
    sure = "" if error is None else f" (overall +- {100 * error:.1f}, a standard error)"
    print(f"{found['prompts']} held-out prompts{asked}, {found['pixels']} px; per cent{sure}:")
    print(evaluation.table(found))
    if found["overall"] is None:
        print(f"note: {_CHECKPOINT.value} is an autoencoder alone, which draws nothing")
    about = {"task": "shapes", "checkpoint": _CHECKPOINT.value}
    about |= {"novel": novel.NAME} if _NOVEL.value else {}
    print(json.dumps(about | found))


def importance() -> None:
    """Measures how much each block of the transformer changes its input."""
    _require("checkpoint")
    out = check_out(_OUT.value, ".json", "an importance file")

    from sana_jax.checkpoints.importance import write
    from sana_jax.metrics import importance_task

    options = importance_task.Options(
        prompts=_PROMPTS.value,
        count=_COUNT.value or importance_task.COUNT,
        seed=_SEED.value,
        num_steps=given(_STEPS),
        guidance_scale=given(_GUIDANCE),
        flow_shift=_SHIFT.value,
        batch_size=_BATCH.value,
        dtype=_DTYPE.value,
        variant=_VARIANT.value,
        revision=_REVISION.value,
    )
    found = importance_task.measure(_CHECKPOINT.value, options)
    if out is not None:
        write(out, found)
    print(f"{found['prompts']} prompts, {found['evaluations']} evaluations:")
    print(importance_task.table(found))
    del found["pictures"]
    print(json.dumps({"task": "importance"} | found))


def fid() -> None:
    """Compares pictures with a reference in Inception's features."""
    from sana_jax.metrics import fid_task

    _require("data", "weights")
    if _REFERENCE.value is None and _STATISTICS.value is None:
        raise UserError("--reference is missing; without it, --statistics=FILE.npz writes a file")
    statistics = check_out(_STATISTICS.value, ".npz", "statistics", "--statistics")
    options = fid_task.Options(
        data=_DATA.value,
        reference=_REFERENCE.value,
        weights=_WEIGHTS.value,
        count=_COUNT.value,
        batch_size=_BATCH.value,
        workdir=_WORKDIR.value,
        statistics=statistics and str(statistics),
        **_choices("resize", "size", "jpeg"),
    )
    _report(fid_task.fid(options, _drawing()), fid_task.table)


def clip_score() -> None:
    """Measures how well pictures fit their prompts in CLIP's space."""
    from sana_jax.metrics import clip_task

    _require("data", "weights")
    _report(clip_task.clip_score(_clip_options(), _drawing()), clip_task.table)


def cmmd() -> None:
    """Compares pictures with a reference in CLIP's space."""
    from sana_jax.metrics import clip_task

    _require("data", "weights", "reference")
    _report(clip_task.image_distance(_clip_options(), _drawing()), clip_task.table)


def _clip_options():
    from sana_jax.metrics import clip_task

    return clip_task.Options(
        data=_DATA.value,
        weights=_WEIGHTS.value,
        reference=_REFERENCE.value,
        count=_COUNT.value,
        batch_size=_BATCH.value,
        dtype=_DTYPE.value,
        workdir=_WORKDIR.value,
        **_choices("jpeg"),
    )


def _choices(*names: str) -> dict:
    """Returns the values of flags, which --protocol decides where it is given."""
    protocol = _protocol()
    if protocol is None:
        return {name: FLAGS[name].value for name in names}
    for name in names:
        if FLAGS[name].present:
            raise UserError(f"--{name} is decided by --protocol={_PROTOCOL.value}; leave out one")
    return {name: protocol.measuring[name] for name in names}


def _protocol():
    from sana_jax.metrics.protocol import PROTOCOLS

    return PROTOCOLS.get(_PROTOCOL.value)


def _drawing():
    """Returns what draws the pictures of --checkpoint that are not in --data; None without it."""
    if not any(flag.present for flag in (_CHECKPOINT, _PROMPTS, _VARIANT, _REVISION)):
        return None
    _require("checkpoint", "prompts")
    if _PROTOCOL.value is None:
        raise UserError(
            "--protocol is missing, which says how --checkpoint draws; or draw with sana_jax.sample"
        )
    from sana_jax.metrics import protocol

    flags_of = _CHECKPOINT, _PROMPTS, _DATA, _COUNT, _VARIANT, _REVISION
    return partial(protocol.draw, _protocol(), *(flag.value for flag in flags_of))


def _require(*names: str) -> None:
    for name in names:
        if not FLAGS[name].present or not FLAGS[name].value:
            raise UserError(f"--{name} is missing; --task={_TASK.value} needs it")


def _report(found: dict, table) -> None:
    left_out = sum(found["rejected"].values()) + sum(found.get("reference_rejected", {}).values())
    print(f"{found['count']} pictures, {left_out} left out:")
    print(table(found))
    from sana_jax.metrics.protocol import drawing
    from sana_jax.metrics.resizes import JPEG_QUALITY

    about = {"task": _TASK.value, "protocol": _PROTOCOL.value}
    about |= {"jpeg_quality": JPEG_QUALITY} if found["jpeg"] else {}
    print(json.dumps(about | drawing(_DATA.value, _protocol(), _COUNT.value) | found))


TASKS = {
    "reconstruction": reconstruction,
    "shapes": shapes,
    "importance": importance,
    "fid": fid,
    "clip_score": clip_score,
    "cmmd": cmmd,
}


def main(argv):
    del argv
    owned = {name for names in OWN.values() for name in names}
    for name in sorted(owned.difference(OWN[_TASK.value])):
        if FLAGS[name].present:
            raise UserError(f"--{name} is not of --task={_TASK.value}; leave it out")
    from sana_jax.runtime import devices

    with devices.memory_errors("a smaller --batch_size or --size"):
        TASKS[_TASK.value]()


if __name__ == "__main__":
    cli.run(main)
