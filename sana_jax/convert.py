"""Converts a checkpoint (diffusers, native, NVlabs .pth, or a training's) to another layout.

    python -m sana_jax.convert --source=DIR_OR_HUB_ID --out=DIR
    python -m sana_jax.convert --source=NATIVE_DIR --out=DIR --format=diffusers --dtype=bfloat16
    python -m sana_jax.convert --source=Sana_600M_1024px.pth --rest=DIR --out=DIR
    python -m sana_jax.convert --source=FINE_TUNE/transformer --rest=DIR --out=DIR
    python -m sana_jax.convert --source=WORKDIR --out=DIR --ema
    python -m sana_jax.convert --source=DIR_OR_HUB_ID --lora=FILE:0.8 --out=DIR
    python -m sana_jax.convert --source=DIR --out=DIR --grow=60
    python -m sana_jax.convert --source=DIR --out=DIR --prune=40 --importance=FILE
    python -m sana_jax.convert --source=DIR --out=DIR --quantise=w8a8

Tensors pass through one by one: memory holds the largest tensor, not the checkpoint (for a
training, the networks it trained). A .pth or .safetensors file and a fine-tune's transformer/ hold
the transformer alone; --rest names the checkpoint that provides the autoencoder, the text encoder
and the tokenizer. WORKDIR is the --workdir of `train`; its newest checkpoint that is complete and
undamaged is read. A LoRA is added to the weights, and named in the provenance. The complex human
instruction is stored with its sha256 and its origin.

--grow and --prune change the number of the transformer's blocks, as SANA-1.5 does, before a
training that starts from --out. A grown network computes what its kept blocks did, until it is
trained. FILE is the one that `evaluate --task=importance --checkpoint=DIR --out=FILE` writes.

--quantise rounds the weights to int8, with a scale for each output of each layer: about half of
bfloat16's size on disk and in memory. `w8` multiplies them with rows in float; `w8a8` rounds the
rows of the transformer's large products too, so that they are products of integers. Which layers
that concerns: quantisation/README.md. --quantise_layer changes it by whole names, first come first:
--quantise_layer='dit/blocks/ffn/.*=none' --quantise_layer='text_encoder/layers/.*=w8a8'.
--smooth=PROMPTS lessens what rows in int8 cost; --calibrate=PROMPTS gives rows fixed scales.
"""

import dataclasses
import functools
import math
import sys
from functools import partial
from pathlib import Path

from absl import flags, logging
from etils import epath

from sana_jax.checkpoints import flags as checkpoint_flags
from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import check_new, new_folder

FLAGS = flags.FLAGS
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "a folder, a hub id, a .pth or .safetensors file, or the --workdir of a training",
    required=True,
)
_OUT = flags.DEFINE_string("out", None, "folder to write, new or empty", required=True)
_FORMAT = flags.DEFINE_enum("format", "native", ["native", "diffusers"], "layout of --out")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "dtype of the weights; float16 is for the transformer alone: the other networks overflow it and"
    " become bfloat16; default: as they are",
)
_VARIANT = checkpoint_flags.define("variant")
_REVISION = checkpoint_flags.define("revision")
_INSTRUCTION = checkpoint_flags.define("instruction_file")
_REST = flags.DEFINE_string(
    "rest",
    None,
    "for a transformer alone: the checkpoint with the other networks; for a training: the same, if"
    " the names in its config do not lead to them from here",
)
_EMA = flags.DEFINE_bool("ema", False, "for a .pth or a training: take the averaged weights")
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size",
    None,
    "for a file: the side in pixels that it was trained at; default: by its name",
)
_CROSS_HEADS = flags.DEFINE_integer(
    "cross_heads",
    None,
    "for a file of an unpublished width: the number of heads of the cross-attention",
)
_LORA = checkpoint_flags.define_lora()
_CLIP = flags.DEFINE_bool(
    "clip_attention",
    None,
    "clip the attention's output to float16's range in every dtype: for weights trained in"
    " float16; native layout only; default: as --source says, else in float16 alone",
)
_GROW = flags.DEFINE_integer(
    "grow", None, "append new blocks to the transformer, up to this number; native layout only"
)
_KEEP = flags.DEFINE_integer(
    "keep",
    None,
    "for --grow: how many of the first blocks stay; default: all but the last two, as in the paper",
)
_SEED = flags.DEFINE_integer("seed", 0, "for --grow: seed of the new blocks", 0, 2**32 - 1)
_PRUNE = flags.DEFINE_integer(
    "prune", None, "keep this number of the most important blocks; native layout only"
)
_IMPORTANCE = flags.DEFINE_string(
    "importance", None, "for --prune: a file of evaluate --task=importance on the same weights"
)
_DENSE = flags.DEFINE_bool(
    "dense_time",
    False,
    "fit the transformer's timestep embedder to a scale of 0 .. 1, as the teacher of a distillation"
    " needs it; native layout only",
)
_SHARE = flags.DEFINE_string(
    "share",
    None,
    "a native checkpoint: files that --out would have too stay there, and --out only names them;"
    " keep the two side by side",
)
_QUANTISE = checkpoint_flags.define_quantise("weights, and rows, in the native layout,")
_LAYERS = flags.DEFINE_multi_string(
    "quantise_layer",
    [],
    "for --quantise: PATTERN=KIND, for the layers whose whole name the regular expression matches:"
    " none, w8 or w8a8; may be given several times",
)
_CALIBRATE = flags.DEFINE_string(
    "calibrate",
    None,
    "for --quantise=w8a8: a .txt or .jsonl file of prompts, as of sample, which --source draws:"
    " the rows of a layer then have one scale, by the largest number that was seen",
)
_SMOOTH = flags.DEFINE_string(
    "smooth",
    None,
    "for --quantise=w8a8: a file of prompts, as of --calibrate: large numbers in the rows of"
    " Mix-FFN's second product become smaller, and its weights larger, before both are rounded",
)
PROMPTS = {"smoothing": _SMOOTH, "calibration": _CALIBRATE}  # by their names in the provenance
_SHARD = flags.DEFINE_integer(
    "max_shard_mb", 5000, "largest size of a weight file, MB", lower_bound=1
)


def open_source():
    """Opens the Checkpoint that --source names, without reading its weights. Raises UserError."""
    from sana_jax.checkpoints import nvlabs, transformer
    from sana_jax.checkpoints.load import open_checkpoint

    options = dict(instruction_file=_INSTRUCTION.value)
    source = Path(_SOURCE.value)
    weights = epath.Path(_SOURCE.value) / "checkpoints"
    if found := sorted(weights.glob("*.pth")):
        raise UserError(f"--source={source} is a folder of NVlabs': give its {found[0]}")
    if weights.is_dir():
        from sana_jax.training.text_to_image.result import open_workdir

        for flag in (_IMAGE_SIZE, _CROSS_HEADS, _VARIANT, _REVISION, _INSTRUCTION):
            if flag.value:
                raise UserError(f"--{flag.name} is not for a training; --source={source} is one")
        return open_workdir(_SOURCE.value, _EMA.value, _REST.value)
    if _REST.value is None and source.suffix not in transformer.FILES:
        for flag in (_EMA, _IMAGE_SIZE, _CROSS_HEADS):
            if flag.value:
                also = " or a training, which has checkpoints/" if flag is _EMA else ""
                raise UserError(f"--{flag.name} is for a .pth file{also}; {source} is none")
        return open_checkpoint(_SOURCE.value, _VARIANT.value, _REVISION.value, **options)
    if _REST.value is None:
        raise UserError(f"{source} holds the transformer alone: name the others with --rest=DIR")
    # A file has neither variants nor revisions: there they are the other networks'.
    which = {flag.name: flag.value for flag in (_VARIANT, _REVISION)}
    is_file = source.suffix in transformer.FILES
    found = transformer.open_transformer(
        _SOURCE.value,
        use_ema=_EMA.value,
        image_size=_IMAGE_SIZE.value,
        cross_heads=_CROSS_HEADS.value,
        **({} if is_file else which),
    )
    rest = open_checkpoint(_REST.value, **(which if is_file else {}), **options)
    theirs = found.provenance["layout"] == "nvlabs"
    return dataclasses.replace(
        rest,
        dit=found.config,
        params={**rest.params, "dit": found.params},
        flow_shift=nvlabs.flow_shift(found.config) if theirs else rest.flow_shift,
        provenance={**found.provenance, "rest": rest.provenance},
    )


def warn_of_scale(checkpoint) -> None:
    """Logs a warning where the scaling factor does not look like that of these weights."""
    from sana_jax.checkpoints.scale import TOLERANCE, latent_scale

    found = latent_scale(checkpoint)
    if abs(found - 1) > TOLERANCE:
        logging.warning(
            "the latents of a test picture have a root mean square of %.2f, not 1: is the"
            " autoencoder's scaling_factor %g that of its weights?",
            found,
            checkpoint.vae.scaling_factor,
        )


def prepare(checkpoint, dtype: str | None, progress):
    """Returns the checkpoint with weights that are cast, and counted by `progress`, when read."""
    import jax
    import numpy as np

    from sana_jax.checkpoints.components import component_dtype
    from sana_jax.checkpoints.tensors import numpy_dtype
    from sana_jax.kernels.int8 import is_quantised

    def watched(lazy, wanted):
        nbytes = math.prod(lazy.shape) * wanted.itemsize

        def load(dtype: np.dtype):
            array = lazy.load(dtype)
            progress.update(nbytes)
            return array

        progress.total = (progress.total or 0) + nbytes
        return dataclasses.replace(lazy, dtype=wanted, load=load)

    params = {}
    for name, tree in checkpoint.params.items():
        wanted = dtype and numpy_dtype(component_dtype(name, dtype))

        def prepared(leaf, wanted=wanted):
            if is_quantised(leaf):
                return jax.tree.map(lambda x: watched(x, x.dtype), leaf)
            return watched(leaf, wanted or leaf.dtype)

        params[name] = jax.tree.map(prepared, tree, is_leaf=is_quantised)
    return dataclasses.replace(checkpoint, params=params)


def check_depth_flags() -> None:
    """Checks the flags of growth and pruning against one another. Raises UserError."""
    for flag, of in ((_KEEP, _GROW), (_SEED, _GROW), (_IMPORTANCE, _PRUNE)):
        if FLAGS[flag.name].present and of.value is None:
            raise UserError(f"--{flag.name} is for --{of.name}, which is not given")
    changed = [flag for flag in (_GROW, _PRUNE) if flag.value is not None]
    if len(changed) == 2:
        raise UserError("--grow and --prune are two steps: convert twice")
    if changed and _FORMAT.value != "native":
        raise UserError(
            f"--{changed[0].name} writes the native layout, which says what was done: convert its"
            f" --out once more for --format={_FORMAT.value}"
        )
    if _PRUNE.value is not None and _IMPORTANCE.value is None:
        raise UserError(
            "--prune needs --importance=FILE: evaluate --task=importance --out=FILE makes it"
        )


def change_depth(checkpoint):
    """Returns the checkpoint grown or pruned, if a flag says so. Raises UserError."""
    if _GROW.value is None and _PRUNE.value is None:
        return checkpoint
    from sana_jax.checkpoints import depth, importance
    from sana_jax.metrics.importance_task import transformer_sha256

    sha256 = functools.cache(lambda: transformer_sha256(checkpoint))

    def about():
        return {"source": Path(_SOURCE.value).name, "sha256": sha256()}

    if _GROW.value is not None:
        return depth.grow(checkpoint, _GROW.value, _KEEP.value, _SEED.value, about)
    numbers = partial(importance.read, _IMPORTANCE.value, sha256)
    return depth.prune(checkpoint, _PRUNE.value, numbers, about)


def with_dense_time(checkpoint):
    """Returns the checkpoint with timesteps of 0 .. 1, if the flag says so. Raises UserError."""
    if not _DENSE.value:
        return checkpoint
    import jax

    from sana_jax.training.distillation.dense_time import densify
    from sana_jax.training.text_to_image.result import lazy

    if _FORMAT.value != "native":
        raise UserError("--dense_time is for the native layout")
    if checkpoint.dit is None or checkpoint.dit.is_sprint or checkpoint.dit.timestep_scale != 1:
        raise UserError("--dense_time is for a transformer with timesteps of 0 .. 1000")
    if checkpoint.dit.quantised:
        raise UserError("--dense_time: the transformer is quantised: fit what it was made from")
    dit, params, error = densify(checkpoint.dit, checkpoint.params["dit"])
    print(f"the embedder is fitted to {100 * error:.1f} % of its spread", file=sys.stderr)
    made = checkpoint.provenance | {"dense_time": error}
    params = {**checkpoint.params, "dit": jax.tree_util.tree_map_with_path(lazy, params)}
    return dataclasses.replace(checkpoint, dit=dit, params=params, provenance=made)


def quantise_rules() -> list[tuple[str, str]]:
    """Returns the rules of --quantise_layer. Raises UserError for flags that do not fit."""
    if _LAYERS.value and _QUANTISE.value is None:
        raise UserError("--quantise_layer is for --quantise, which is not given")
    for flag in PROMPTS.values():
        if flag.value is not None and _QUANTISE.value != "w8a8":
            raise UserError(f"--{flag.name} is for --quantise=w8a8, which is not given")
    if _QUANTISE.value is not None and _FORMAT.value != "native":
        raise UserError(
            f"--quantise writes the native layout; --format={_FORMAT.value} has no int8"
        )
    rules = []
    for text in _LAYERS.value:
        pattern, equals, kind = text.rpartition("=")
        if not equals:
            raise UserError(f"--quantise_layer={text}: give PATTERN=KIND, such as dit/.*=w8")
        rules.append((pattern, kind))
    return rules


def read_calls() -> dict[str, list]:
    """Returns the arguments of a pipeline's calls for each file of prompts that a flag names.

    Raises UserError.
    """
    from sana_jax.batch.tasks import make_tasks, read_rows
    from sana_jax.pipeline.request import GUIDANCE_SCALE

    names = ("prompt", "seed", "negative_prompt", "height", "width", "num_steps", "guidance_scale")
    calls = {}
    for key, flag in PROMPTS.items():
        if flag.value is None:
            continue
        rows = read_rows(flag.value, f"--{flag.name}=")
        tasks = make_tasks(rows, {"guidance_scale": GUIDANCE_SCALE}, 0, 1)
        if with_image := [task for task in tasks if task.image]:
            place = with_image[0].place_of("image")
            raise UserError(f"{place}image: --{flag.name} draws from noise alone")
        calls[key] = [{name: getattr(task, name) for name in names} for task in tasks]
    return calls


def quantised(checkpoint, rules, calls):
    """Returns the checkpoint as --quantise, --smooth and --calibrate say. Raises UserError."""
    from sana_jax.checkpoints.quantised import quantise

    made = quantise(checkpoint, _QUANTISE.value, rules)
    if not calls:
        return made
    from sana_jax.checkpoints.smoothed import products, smooth
    from sana_jax.pipeline.calibrate import row_ranges

    layers = [n for n, kind in made.dit.quantised if kind == "w8a8"] if made.dit else []
    if not layers:
        raise UserError(f"--{PROMPTS[next(iter(calls))].name}: no layer of a transformer is w8a8")
    if prompts := calls.get("smoothing"):
        found = row_ranges(checkpoint, products(checkpoint.dit, layers), prompts)
        checkpoint = smooth(checkpoint, found)
    prompts = calls.get("calibration")
    ranges = row_ranges(checkpoint, layers, prompts) if prompts else None
    made = quantise(checkpoint, _QUANTISE.value, rules, ranges)
    made.provenance["quantised"] |= {key: {"prompts": len(x)} for key, x in calls.items()}
    return made


def main(argv):
    del argv
    check_depth_flags()
    rules = quantise_rules()
    if _SHARE.value is not None and _FORMAT.value != "native":
        raise UserError("--share is for the native layout")
    out = check_new(_OUT.value)
    if out.resolve().is_relative_to(Path(_SOURCE.value).resolve()):
        raise UserError(f"--out={out} lies inside --source={_SOURCE.value}: write it elsewhere")
    calls = read_calls()  # before the weights, which may take minutes
    import jax

    from sana_jax.checkpoints.components import check_fit
    from sana_jax.checkpoints.find import find
    from sana_jax.checkpoints.load import warn_of_float16
    from sana_jax.checkpoints.loras import merge_into, open_all

    jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use, or be too small
    share = _SHARE.value and find(_SHARE.value)
    checkpoint = open_source()
    check_fit(checkpoint)
    checkpoint = merge_into(checkpoint, open_all(_LORA.value, checkpoint))
    checkpoint = with_dense_time(change_depth(checkpoint))
    if checkpoint.provenance.get("trained"):  # of random weights there is nothing to expect
        warn_of_scale(checkpoint)
    if _CLIP.value is not None:
        if _FORMAT.value != "native" or checkpoint.dit is None:
            raise UserError("--clip_attention is stored in the native layout, with a transformer")
        dit = dataclasses.replace(checkpoint.dit, clip_attention=_CLIP.value)
        checkpoint = dataclasses.replace(checkpoint, dit=dit)
    if _QUANTISE.value is not None:
        checkpoint = quantised(checkpoint, rules, calls)
    if _DTYPE.value != "float16":
        warn_of_float16(checkpoint, _SOURCE.value)

    from tqdm import tqdm

    from sana_jax.checkpoints import diffusers, native

    save = {"native": native.save, "diffusers": diffusers.save}[_FORMAT.value]
    if share is not None:
        save = partial(native.save, share=share)
    with (
        new_folder(out),
        tqdm(unit="B", unit_scale=True, unit_divisor=1000, disable=None) as progress,
    ):
        prepared = prepare(checkpoint, _DTYPE.value, progress)
        save(prepared, out, max_shard_bytes=_SHARD.value * 10**6)
    found = checkpoint.instruction
    told = f"instruction {found.sha256} from {found.source}" if found else "no instruction"
    print(f"{out}: {_FORMAT.value} layout, {told}")


if __name__ == "__main__":
    cli.run(main)
