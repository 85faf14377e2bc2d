"""Compiles for TPUs and GPUs that are not here: does a program fit, and what does it cost?

    python -m sana_jax.compile --preset=sana_600m_1024 --topology=v5e:2x2 --batch_size=16
    python -m sana_jax.compile --config=configs/sana_1600m_1024.py --topology=v5e:16x16
    python -m sana_jax.compile --preset=sana_600m_1024 --topology=h100:1 --what=sample
    python -m sana_jax.compile --config=configs/finetune.py --topology=4090:1 --memory
    python -m sana_jax.compile --preset=sana_1600m_1024 --topology=v5e:1x1 --quantise=w8a8

    forward  the transformer once, 300 rows of text
    sample   --num_steps steps with guidance (Sana-Sprint: without a second half), from noise to
             latents
    decode   latents to pixels; above 2048 x 2048 pixels one tile, times the number of tiles
    train    the training step of a config, with its optimizer, averages and frozen networks

The compilers are on PyPI, for x86-64 Linux, and need no TPU or GPU: pip install 'jax[tpu]', or
pip install -e '.[gpu-compile]' (3 GB), best into an environment of its own.

The figures are those of one chip or card. For a TPU they are the compiler's estimate
(measure/tpu_estimate.py), for a GPU a bound by its output: memory, products, and the instructions
of the kernels (measure/gpu_estimate.py). Nothing is measured. Networks that the program does not
use are not in its memory. MFU, the share of the peak, counts the work that the architecture asks
for, so recomputed activations show as slowness; a training step counts three times the forward pass
of the networks that train.

Most of the time goes into the cost of kernels. --memory leaves it out and only says whether the
program fits.

The last line is a JSON object, with sizes in bytes. A program that does not fit is an answer too:
the exit status is 0, `fits` is false, and `hbm_bytes` is what the compiler says is needed, for a
TPU at least. MFU is null where FLOPs are not counted: in phases that train a part of an
autoencoder.
"""

import json
import sys
import time

import jax
from absl import flags
from ml_collections.config_flags import config_flags

from sana_jax import sharding
from sana_jax.checkpoints import flags as checkpoint_flags
from sana_jax.checkpoints import random_weights
from sana_jax.checkpoints.flags import given
from sana_jax.kernels.dispatch import IMPLEMENTATIONS
from sana_jax.measure import tpu_estimate
from sana_jax.measure.gpu_targets import CARDS
from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

WHAT = ("forward", "train", "sample", "decode")

_CONFIG = config_flags.DEFINE_config_file("config", None, "the recipe to train, a file in configs/")
_PRESET = flags.DEFINE_string(
    "preset", None, "sizes of the networks to draw with, such as sana_600m_1024; or give --config"
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    f"TPUs, CHIP:SHAPE, such as v5e:16x16, with one of {', '.join(tpu_estimate.CHIPS)}; or GPUs,"
    f" CARD:COUNT, such as h100:8, with one of {', '.join(CARDS)}",
)
_WHAT = flags.DEFINE_enum(
    "what", None, WHAT, "the program; default: train with a config, else forward"
)
_BATCH = flags.DEFINE_integer(
    "batch_size", None, "pictures per chip or card; default: the config's batch, or 1", 1, 2**16
)
flags.DEFINE_alias("batch", "batch_size")
_SIZE = flags.DEFINE_integer(
    "size", None, "side of the picture in pixels; default: the preset's own", 1, 2**16
)
_STEPS = flags.DEFINE_integer(
    "num_steps", 20, "steps of the program sample; default for Sana-Sprint: 2", 1, 1000
)
flags.DEFINE_alias("steps", "num_steps")
_FSDP = flags.DEFINE_integer(
    "fsdp",
    1,
    "chips or cards that share a copy of a preset's weights; a config has its mesh",
    1,
    2**16,
)
_IMPLEMENTATION = flags.DEFINE_enum(
    "implementation",
    "auto",
    IMPLEMENTATIONS,
    "of a preset's transformer: pallas with kernels, xla without",
)
_QUANTISE = checkpoint_flags.define_quantise("a preset's weights, as by convert --quantise")
_PHASE = flags.DEFINE_string(
    "phase", None, "phase of an autoencoder's training; default: the first"
)
_MEMORY = flags.DEFINE_bool(
    "memory", False, "only say whether it fits, which is several times faster"
)
_TOP = flags.DEFINE_integer("top", 12, "the number of most expensive operations to list", 0, 1000)
flags.mark_flag_as_required("topology")


def main(argv: list[str]) -> None:
    del argv
    what = _check_flags()
    jax.config.update("jax_platforms", "cpu")  # even where there is a TPU or a GPU
    if _MEMORY.value:
        tpu_estimate.write_no_schedules()  # before the TPU compiler is loaded
    report = _report(_TOPOLOGY.value)
    chip, devices = report.devices(_TOPOLOGY.value)
    mesh, program = _program(what, devices)
    share, rest = divmod(program.batch, mesh.size)
    result = {
        "topology": _TOPOLOGY.value,
        "what": what,
        "batch": program.batch / mesh.size if rest else share,
        "config": flags.FLAGS["config"].config_filename if what == "train" else None,
        "preset": _PRESET.value,
        **({"quantise": _QUANTISE.value} if _QUANTISE.value else {}),
        "size": program.size,
        "mesh": dict(mesh.shape),
        "calls": program.calls,
        "steps": program.steps,
    }
    print(f"compiling {what} for {_TOPOLOGY.value}", file=sys.stderr, flush=True)
    start = time.monotonic()
    with jax.set_mesh(mesh):
        found, figures = report.measure(program, chip, 1 / mesh.size, _MEMORY.value)
    result |= figures | {"compile_seconds": round(time.monotonic() - start, 1)}
    print(report.text(result, found, _TOP.value))
    print(json.dumps(result))


def _report(topology: str):
    """Returns the module that compiles for a topology. Raises UserError for an unknown one."""
    from sana_jax.measure import gpu_report, tpu_report  # take seconds

    name = topology.partition(":")[0]
    if name not in tpu_estimate.CHIPS and name not in CARDS:
        raise UserError(
            f"topology {topology!r} is neither CHIP:SHAPE of TPUs, such as v5e:16x16, with one of"
            f" {', '.join(tpu_estimate.CHIPS)}, nor CARD:COUNT of GPUs, such as h100:8, with one of"
            f" {', '.join(CARDS)}"
        )
    return gpu_report if name in CARDS else tpu_report


def _program(what: str, devices: list[jax.Device]):
    """Returns the mesh and the program that the flags ask for. Raises UserError."""
    from sana_jax.checkpoints.quantised import quantised_configs  # these take seconds
    from sana_jax.measure import programs
    from sana_jax.pipeline.facts import usual_steps

    if what == "train":
        mesh = sharding.make_mesh(**_CONFIG.value.mesh, devices=devices)
        batch = _BATCH.value and _BATCH.value * mesh.size
        return mesh, programs.training(_CONFIG.value, mesh, batch, _PHASE.value)
    mesh = sharding.make_mesh(fsdp=_FSDP.value, devices=devices)
    dit, vae, _ = random_weights.configs(_PRESET.value)
    if _QUANTISE.value:
        networks, _ = quantised_configs({"dit": dit, "vae": vae}, _QUANTISE.value)
        dit, vae = networks["dit"], networks["vae"]
    batch = (_BATCH.value or 1) * mesh.size
    size, implementation = _SIZE.value, _IMPLEMENTATION.value
    steps = given(_STEPS) or usual_steps(dit.is_sprint)
    return mesh, programs.drawing(what, dit, vae, mesh, batch, size, steps, implementation)


def _check_flags() -> str:
    """Returns the program to compile. Raises UserError for flags that do not go together."""
    config, preset = _CONFIG.value is not None, _PRESET.value is not None
    what = _WHAT.value or ("train" if config else "forward")
    if what == "train" and not config:
        raise UserError("--what=train needs --config=FILE, a recipe of configs/")
    if what != "train" and not preset:
        raise UserError(f"--what={what} needs --preset, such as sana_600m_1024")
    if config and preset:
        raise UserError("--config trains, --preset draws: give one of them")
    if config and _SIZE.value is not None:
        raise UserError("--size goes with --preset; a config has keys of its own for it")
    if config and _FSDP.value != 1:
        raise UserError("--fsdp goes with --preset; for a config give --config.mesh.fsdp")
    if config and _QUANTISE.value is not None:
        raise UserError("--quantise goes with --preset; int8 weights do not train")
    if config and _IMPLEMENTATION.value != "auto":
        raise UserError("--implementation goes with --preset; give --config.network.implementation")
    if preset and _PHASE.value is not None:
        raise UserError("--phase goes with --config")
    return what


if __name__ == "__main__":
    cli.run(main)
