"""Draws pictures from prompts.

    python -m sana_jax.sample --checkpoint=DIR_OR_HUB_ID --prompt="a red fox in the snow" --out=DIR
    python -m sana_jax.sample --checkpoint=... --prompts=FILE.txt --out=DIR --batch_size=16
    python -m sana_jax.sample --checkpoint=... --lora=FILE:0.8 --prompt="..." --out=DIR
    python -m sana_jax.sample --checkpoint=... --prompt="a fox" --image=dog.png --out=DIR
    python -m sana_jax.sample --checkpoint=... --prompts=FILE.txt --out=DIR --candidates=16 \\
        --judge=clip --judge_weights=CLIP_FOLDER

A .txt file has one prompt per line. A .jsonl file has one object per line, such as
{"prompt": "a red fox", "seed": 7, "width": 768}, with the keys prompt, negative_prompt, seed,
height, width, num_steps, guidance_scale, image, strength and mask; these take precedence over the
flags, and null stands for a key that is absent. Its paths begin at the file's folder. Other keys
are copied into manifest.jsonl.

With an image the picture starts from that one, and has its size; with a mask it is redrawn where
the mask is white, and its pixels are kept where the mask is black.

Pictures are written as NUMBER_SEED.png, numbered in the order of the prompts. The prompt and the
settings are in the PNG header and in a line of manifest.jsonl, never in the name. Running the same
command again draws the pictures that are missing. The batch is split over all devices of this host.

With --candidates=N, N pictures of each prompt are drawn into OUT/candidates, --judge scores them,
and the best go to OUT; OUT/scores.jsonl has every score. A judge that is a command reads lines of a
picture's path, a tab and its prompt, and prints a number for each, of which more is better.
"""

import dataclasses
import os
import secrets
import sys

from absl import flags

from sana_jax.checkpoints import flags as checkpoint_flags
from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

FLAGS = flags.FLAGS
checkpoint_flags.define("checkpoint")
_PROMPT = flags.DEFINE_string(
    "prompt", None, "the prompt, or give --prompts; an empty one draws unconditionally"
)
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "a .txt or .jsonl file of prompts, or give --prompt"
)
_OUT = flags.DEFINE_string("out", None, "folder for the pictures, made if missing", required=True)
_NEGATIVE = flags.DEFINE_string("negative_prompt", "", "text to steer away from")
_HEIGHT = flags.DEFINE_integer(
    "height", None, "height in pixels, a multiple of 32 for most models; default: the native size"
)
_WIDTH = flags.DEFINE_integer(
    "width", None, "width in pixels, as for --height; default: the native size"
)
flags.DEFINE_bool(
    "use_resolution_binning", False, "sample at the nearest published size, then resize and crop"
)
flags.DEFINE_integer(
    "max_pixels", 4096 * 4096, "the largest height x width that is accepted", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
    "num_steps",
    20,
    "evaluations of the network (pairs with guidance), 1 .. 1000; default for Sana-Sprint: 2",
)
_GUIDANCE = flags.DEFINE_float(
    "guidance_scale",
    4.5,
    "scale of classifier-free guidance; 1 or less: no guidance; Sana-Sprint's network reads it",
)
_INTERVAL = flags.DEFINE_list(
    "guidance_interval",
    None,
    "LOW,HIGH in sigma (0 .. 1): guide only where LOW < sigma <= HIGH; default: everywhere",
)
flags.DEFINE_bool(
    "sequential_guidance",
    False,
    "evaluate the two halves of guidance one after the other, which takes less memory",
)
flags.DEFINE_enum(
    "unconditional_mask",
    None,
    ["negative", "prompt"],
    "the text rows that guidance's other half sees: the negative prompt's, as in diffusers, or the"
    " prompt's, as in NVlabs' code and SANA's published figures; default: the checkpoint's",
)
flags.DEFINE_string(
    "tile",
    "auto",
    "decode in tiles: SIZE,STRIDE in pixels; auto: tiles above 2048 x 2048 pixels; or none",
)
flags.DEFINE_bool(
    "clip_attention",
    None,
    "clip the attention's output to float16's range: for weights that were trained in float16 (Sana"
    " 1.0 without BF16 in its name) and run in another dtype; default: as the checkpoint says",
)
_IMAGES = flags.DEFINE_integer(
    "num_images_per_prompt", 1, "pictures for each prompt", lower_bound=1
)


_CANDIDATES = flags.DEFINE_integer(
    "candidates",
    None,
    "draw so many pictures of each prompt, and keep the best --num_images_per_prompt",
    2,
    10**6,
)
_JUDGE = flags.DEFINE_string(
    "judge", None, "of --candidates: clip, or a command that prints scores, as described above"
)
_JUDGE_WEIGHTS = flags.DEFINE_string(
    "judge_weights", None, "of --judge=clip: a folder of CLIP as transformers writes it"
)
_TOURNAMENT = flags.DEFINE_bool(
    "tournament",
    False,
    "choose as SANA-1.5 does: the command prints yes or no and the logs of both probabilities,"
    " candidates meet in pairs, and the surer answer breaks a tie",
)

_IMAGE = flags.DEFINE_string(
    "image", None, "a picture to start from; its sides are multiples as for --height"
)
_STRENGTH = flags.DEFINE_float(
    "strength",
    None,
    "share of the steps that change --image, above 0, up to 1, where nothing of it is left;"
    " default: 0.6, for Sana-Sprint 0.5",
)
_MASK = flags.DEFINE_string(
    "mask",
    None,
    "a picture of --image's size: white where that is redrawn, black where its pixels are kept",
)


class _SeedParser(flags.IntegerParser):
    """Takes "random" too, for a seed that no other run has."""

    drawn: int | None = None

    def parse(self, argument):
        if argument != "random":
            return super().parse(argument)
        self.drawn = secrets.randbits(32)
        return self.drawn


_SEEDS = _SeedParser()
_SEED = flags.DEFINE(
    _SEEDS,
    "seed",
    0,
    "seed of the first picture, 0 .. 18446744073709551615; the others count up from it; random:"
    " another one for every run, which is told, and is in the pictures' names and manifest.jsonl",
)
_SAMPLER = flags.DEFINE_enum(
    "sampler",
    "flow_dpm_solver",
    ["flow_dpm_solver", "flow_euler", "scm"],
    "the solver: flow_dpm_solver (second order, SANA's) or flow_euler; for Sana-Sprint scm",
)
_ANGLES = checkpoint_flags.define_angles()
flags.DEFINE_float("flow_shift", None, "shift of the noise schedule; default: the checkpoint's")
checkpoint_flags.define_lora()
checkpoint_flags.define("instruction_file")
flags.DEFINE_bool("no_instruction", False, "encode the prompts without an instruction")
flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "dtype of weights and activations; default: bfloat16, or float32 on a CPU",
)
checkpoint_flags.define("variant")
checkpoint_flags.define("revision")
flags.DEFINE_integer(
    "batch_size", 8, "images drawn at once; rounded up to the number of devices", lower_bound=1
)
flags.DEFINE_bool(
    "overwrite", False, "replace pictures in --out that other settings drew under the same names"
)
flags.DEFINE_bool(
    "grid", False, "also write grid.png, which shows the first 64 pictures, or --candidates"
)
flags.DEFINE_string(
    "compilation_cache",
    None,
    'folder for compiled programs, "" for none; default: ~/.cache/sana_jax',
)


def parse_interval(values: list[str] | None) -> tuple[float, float] | None:
    """Returns LOW and HIGH of --guidance_interval as numbers. Raises UserError."""
    if values is None:
        return None
    try:
        low, high = map(float, values)
    except ValueError:
        raise UserError(f"--guidance_interval={','.join(values)}: give LOW,HIGH") from None
    if not 0 <= low < high <= 1:
        raise UserError(f"--guidance_interval={low:g},{high:g}: 0 <= LOW < HIGH <= 1 is needed")
    return low, high


def parse_tile(text: str) -> tuple[int, int] | str | None:
    """Returns the value of --tile: (SIZE, STRIDE), "auto", or None for none. Raises UserError."""
    if text in ("auto", "none"):
        return text if text == "auto" else None
    try:
        size, stride = map(int, text.split(","))
    except ValueError:
        raise UserError(f"--tile={text}: give SIZE,STRIDE in pixels, auto or none") from None
    return size, stride


def _choice():
    """Returns how the best of --candidates are chosen, None without. Raises UserError."""
    if _CANDIDATES.value is None:
        for name in "judge", "judge_weights", "tournament":
            if FLAGS[name].value:
                raise UserError(f"--{name} is of no use without --candidates=N")
        return None
    if not _JUDGE.value:
        raise UserError("--judge is missing; --candidates needs it: clip, or a command")
    from sana_jax.judges.best_of import Choice

    judge = _JUDGE.value, _JUDGE_WEIGHTS.value, _TOURNAMENT.value
    return Choice(_CANDIDATES.value, _IMAGES.value, *judge, FLAGS.batch_size)


def main(argv):
    del argv
    if (_PROMPT.value is None) == (_PROMPTS.value is None):
        raise UserError('give one of --prompt="..." and --prompts=FILE')
    if FLAGS.no_instruction and FLAGS.instruction_file:
        raise UserError("--no_instruction and --instruction_file contradict each other; give one")
    interval = parse_interval(_INTERVAL.value)

    from sana_jax.batch.tasks import make_tasks, read_rows

    common = {
        "negative_prompt": _NEGATIVE.value,
        "height": _HEIGHT.value,
        "width": _WIDTH.value,
        "num_steps": checkpoint_flags.given(_STEPS),
        "guidance_scale": _GUIDANCE.value,
        "image": _IMAGE.value,
        "strength": _STRENGTH.value,
        "mask": _MASK.value,
    }
    common = {name: value for name, value in common.items() if value is not None}
    rows = [("--", {"prompt": _PROMPT.value})]
    if _PROMPTS.value is not None:
        rows = read_rows(_PROMPTS.value)
    choice = _choice()
    each = choice.candidates if choice else _IMAGES.value
    tasks = make_tasks(rows, common, _SEED.value, each)
    from sana_jax.judges.best_of import CANDIDATES, check_out, choose

    if choice:
        choice.check()
        check_out(choice, _OUT.value, FLAGS.overwrite)

    from sana_jax.batch.draw import draw  # jax: errors above need not wait for it
    from sana_jax.batch.settings import Options

    names = [field.name for field in dataclasses.fields(Options)]
    values = {name: FLAGS[name].value for name in names} | {
        "guidance_interval": interval,
        "sampler": checkpoint_flags.given(_SAMPLER),
        "angles": checkpoint_flags.angles(_ANGLES),
        "tile": parse_tile(FLAGS.tile),
    }
    out = _OUT.value
    if choice:
        values["out"] = os.path.join(out, CANDIDATES)
    draw(tasks, Options(**values))
    files = [task.file for task in tasks]
    if choice:
        files = choose(choice, tasks, out, FLAGS.overwrite)
    if _SEEDS.drawn is not None:
        print(
            f"--seed={_SEEDS.drawn} was drawn: with it, the same command goes on", file=sys.stderr
        )
    print(f"{len(files)} pictures in {out}" if files[1:] else os.path.join(out, files[0]))


if __name__ == "__main__":
    cli.run(main)
