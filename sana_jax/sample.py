"""Draws pictures from prompts.

    python -m sana_jax.sample --checkpoint=DIR_OR_HUB_ID --prompt="a red fox in the snow" --out=DIR
    python -m sana_jax.sample --checkpoint=... --prompts=FILE.txt --out=DIR --batch_size=16

Pictures are written as NUMBER_SEED.png, numbered as the prompts are; a prompt's own text is in its
picture's PNG header, never in the name. The batch is split over all devices of this host.
"""

import time
from pathlib import Path

from absl import flags, logging

from sana_jax import cli
from sana_jax.errors import UserError

FLAGS = flags.FLAGS
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "native or diffusers folder, bundled name, or hub id", required=True
)
_PROMPT = flags.DEFINE_string("prompt", None, "the prompt; an empty one draws unconditionally")
_PROMPTS = flags.DEFINE_string("prompts", None, "text file with one prompt a line")
_OUT = flags.DEFINE_string("out", None, "folder for the pictures; made if missing", required=True)
_NEGATIVE = flags.DEFINE_string("negative_prompt", "", "what to steer away from")
_HEIGHT = flags.DEFINE_integer("height", None, "pixels; default: the checkpoint's native size")
_WIDTH = flags.DEFINE_integer("width", None, "pixels; default: the checkpoint's native size")
_BINNING = flags.DEFINE_bool(
    "use_resolution_binning", False, "sample at the nearest published size, then resize and crop"
)
_STEPS = flags.DEFINE_integer("num_steps", 20, "evaluations of the network (pairs, if guided)")
_GUIDANCE = flags.DEFINE_float("guidance_scale", 4.5, "classifier-free guidance; off where <= 1")
_INTERVAL = flags.DEFINE_list(
    "guidance_interval", None, "LOW,HIGH in sigma (0 .. 1): guide only inside"
)
_IMAGES = flags.DEFINE_integer("num_images_per_prompt", 1, "pictures of each prompt", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the first picture; the others count up from it")
_SAMPLER = flags.DEFINE_string("sampler", "flow_dpm_solver", "or flow_euler")
_SHIFT = flags.DEFINE_float("flow_shift", None, "of the noise schedule; default: the checkpoint's")
_INSTRUCTION = flags.DEFINE_string(
    "instruction_file", None, "complex human instruction: a text file, or an NVlabs yaml"
)
_NO_INSTRUCTION = flags.DEFINE_bool("no_instruction", False, "encode the prompts alone")
_DTYPE = flags.DEFINE_string(
    "dtype", None, "float32, bfloat16 or float16; default: bfloat16, on a CPU float32"
)
_VARIANT = flags.DEFINE_string("variant", None, "of a diffusers folder's weights, such as bf16")
_REVISION = flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")
_BATCH = flags.DEFINE_integer("batch_size", 8, "prompts drawn at once", lower_bound=1)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace pictures that are in --out already")


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, in UTF-8; blank lines are left out. Raises UserError."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--prompts={path}: {error.strerror}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise UserError(f"--prompts={path}: line {number} is not UTF-8") from None
        if prompt:
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"--prompts={path} holds no prompt")
    return prompts


def parse_interval(values: list[str] | None) -> tuple[float, float] | None:
    if values is None:
        return None
    try:
        low, high = map(float, values)
    except ValueError:
        raise UserError(f"--guidance_interval={','.join(values)}: give LOW,HIGH") from None
    if not 0 <= low < high <= 1:
        raise UserError(f"--guidance_interval={low:g},{high:g}: 0 <= LOW < HIGH <= 1 is needed")
    return low, high


def save_png(image, path: Path, texts: dict[str, str]) -> None:
    """Writes a picture with text chunks in its header; never leaves half of one behind."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value.encode("utf-8", "replace").decode().replace("\0", ""))
    part = path.with_name(path.name + ".part")
    try:
        image.save(part, format="PNG", pnginfo=info)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def main(argv):
    del argv
    if (_PROMPT.value is None) == (_PROMPTS.value is None):
        raise UserError('give one of --prompt="..." and --prompts=FILE')
    prompts = [_PROMPT.value] if _PROMPTS.value is None else read_prompts(Path(_PROMPTS.value))
    interval = parse_interval(_INTERVAL.value)
    out, each = Path(_OUT.value), _IMAGES.value
    seeds = [_SEED.value + i for i in range(len(prompts) * each)]
    if not 0 <= seeds[0] <= seeds[-1] <= 2**32 - 1:
        raise UserError(f"--seed={_SEED.value}: seeds of all pictures must be in 0 .. 4294967295")
    paths = [out / f"{i:06d}_{seed}.png" for i, seed in enumerate(seeds)]
    there = [path for path in paths if path.exists()]
    if there and not _OVERWRITE.value:
        raise UserError(f"{there[0]} exists; use another --out, or --overwrite to replace it")

    import jax
    from tqdm import tqdm

    from sana_jax import SanaPipeline

    dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    pipe = SanaPipeline.from_pretrained(
        _CHECKPOINT.value,
        dtype=dtype,
        variant=_VARIANT.value,
        revision=_REVISION.value,
        instruction_file=_INSTRUCTION.value,
    )
    settings = dict(
        negative_prompt=_NEGATIVE.value,
        height=_HEIGHT.value,
        width=_WIDTH.value,
        use_resolution_binning=_BINNING.value,
        num_steps=_STEPS.value,
        guidance_scale=_GUIDANCE.value,
        guidance_interval=interval,
        sampler=_SAMPLER.value,
        flow_shift=_SHIFT.value,
        instruction=None if _NO_INSTRUCTION.value else "auto",
        num_images_per_prompt=each,
    )
    batch = min(_BATCH.value, len(prompts))
    start = time.monotonic()
    with tqdm(total=len(paths), unit="image", disable=None) as progress:
        for first in range(0, len(prompts), batch):
            chosen = prompts[first : first + batch]
            # The last batch is filled up: another size would be another compilation.
            filled = chosen + chosen[-1:] * (batch - len(chosen))
            images = slice(first * each, (first + len(chosen)) * each)
            used = seeds[images] + seeds[-1:] * (batch - len(chosen)) * each
            pictures = pipe(filled, seed=used, **settings)
            out.mkdir(parents=True, exist_ok=True)
            for i, path in enumerate(paths[images]):
                texts = {"prompt": chosen[i // each], "seed": str(used[i])}
                save_png(pictures[i], path, texts)
                progress.update()
    seconds = time.monotonic() - start
    logging.info("%d pictures in %.1f s, compilation included", len(paths), seconds)
    print(f"{len(paths)} picture{'s' * (len(paths) > 1)} in {out}" if len(paths) > 1 else paths[0])


if __name__ == "__main__":
    cli.run(main)
