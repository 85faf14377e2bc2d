"""Compiles for TPUs that are not here, and says whether a program fits and what it costs.

    python -m sana_jax.compile --preset=sana_600m_1024 --topology=v5e:2x2 --batch_size=16
    python -m sana_jax.compile --config=configs/sana_1600m_1024.py --topology=v5e:16x16

    forward  the transformer once, 300 rows of text
    sample   --num_steps steps with guidance, from noise to latents
    decode   latents to pixels; above 2048 x 2048 pixels one tile, times the number of tiles
    train    the training step of a config, with its optimizer, averages and frozen networks

This needs the compiler for TPUs, which pip install 'jax[tpu]' installs on x86-64 Linux, but no TPU.
The figures are those of one chip, by the estimate of measure/tpu_estimate.py, which is a model and
not a measurement. Networks that the program does not use are not in its memory. MFU, the share of
the chip's peak, counts the work that the architecture asks for, so recomputed activations show as
slowness; a training step counts three times the forward pass of the networks that train.

Most of the time goes into the schedules from which the cost of kernels is computed. --memory leaves
them out and only says whether the program fits.

The last line is a JSON object, with sizes in bytes. A program that does not fit is an answer too:
the exit status is 0, `fits` is false, and `hbm_bytes` is what the compiler says is needed at least.
`mfu` is null where FLOPs are not counted: in phases that train a part of an autoencoder.
"""

import dataclasses
import importlib.metadata
import json
import re
import sys
import time
from functools import partial
from typing import Any

import jax
from absl import flags
from ml_collections.config_flags import config_flags

from sana_jax import sharding
from sana_jax.checkpoints import random_weights
from sana_jax.kernels.dispatch import IMPLEMENTATIONS
from sana_jax.measure import tpu_estimate
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
    f"the TPUs, CHIP:SHAPE, such as v5e:16x16; chips: {', '.join(tpu_estimate.CHIPS)}",
)
_WHAT = flags.DEFINE_enum(
    "what", None, WHAT, "the program; default: train with a config, else forward"
)
_BATCH = flags.DEFINE_integer(
    "batch_size", None, "pictures per chip; default: the config's batch, or 1", 1, 2**16
)
flags.DEFINE_alias("batch", "batch_size")
_SIZE = flags.DEFINE_integer(
    "size", None, "side of the picture in pixels; default: the preset's own", 1, 2**16
)
_STEPS = flags.DEFINE_integer("num_steps", 20, "steps of the program sample", 1, 1000)
flags.DEFINE_alias("steps", "num_steps")
_FSDP = flags.DEFINE_integer(
    "fsdp", 1, "chips that share a copy of a preset's weights; a config has its mesh", 1, 2**16
)
_IMPLEMENTATION = flags.DEFINE_enum(
    "implementation",
    "auto",
    IMPLEMENTATIONS,
    "of a preset's transformer: pallas with kernels, xla without",
)
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
    jax.config.update("jax_platforms", "cpu")  # even where there is a TPU
    if _MEMORY.value:
        tpu_estimate.write_no_schedules()  # before the TPU compiler is loaded
    chip, devices = tpu_estimate.tpu_devices(_TOPOLOGY.value)
    mesh, program = _program(what, devices)
    limit, chips = tpu_estimate.CHIPS[chip].hbm_bytes, mesh.size
    share, rest = divmod(program.batch, chips)
    result = {
        "topology": _TOPOLOGY.value,
        "what": what,
        "batch": program.batch / chips if rest else share,
        "config": flags.FLAGS["config"].config_filename if what == "train" else None,
        "preset": _PRESET.value,
        "size": program.size,
        "mesh": dict(mesh.shape),
        "calls": program.calls,
        "hbm_available": limit,
        "libtpu": importlib.metadata.version("libtpu"),
    }
    print(f"compiling {what} for {_TOPOLOGY.value}", file=sys.stderr, flush=True)
    start = time.monotonic()
    measure = tpu_estimate.memory if _MEMORY.value else partial(tpu_estimate.estimate, chip=chip)
    costs = dict.fromkeys(["cycles", "kernel_cycles", "step_seconds", "mfu", "collectives"])
    try:
        with jax.set_mesh(mesh):
            found = measure(program.function, *program.arguments, **program.options)
        if not _MEMORY.value:
            costs = figures(found, program.calls, program.flops and program.flops / chips)
        sizes = [field.name for field in dataclasses.fields(tpu_estimate.Memory)]
        result |= {name: getattr(found, name) for name in ("hbm_bytes", *sizes)}
    except tpu_estimate.TooLarge as error:
        found, result["hbm_bytes"] = None, error.needed
    result |= costs
    result["fits"] = found is not None and result["hbm_bytes"] <= limit
    result["compile_seconds"] = round(time.monotonic() - start, 1)
    print(text(result, found, _TOP.value))
    print(json.dumps(result))


def _program(what: str, devices: list[jax.Device]):
    """Returns the mesh and the program that the flags ask for. Raises UserError."""
    from sana_jax.measure import programs  # takes seconds

    if what == "train":
        mesh = sharding.make_mesh(**_CONFIG.value.mesh, devices=devices)
        batch = _BATCH.value and _BATCH.value * mesh.size
        return mesh, programs.training(_CONFIG.value, mesh, batch, _PHASE.value)
    mesh = sharding.make_mesh(fsdp=_FSDP.value, devices=devices)
    dit, vae, _ = random_weights.configs(_PRESET.value)
    batch = (_BATCH.value or 1) * mesh.size
    size, steps, implementation = _SIZE.value, _STEPS.value, _IMPLEMENTATION.value
    return mesh, programs.drawing(what, dit, vae, mesh, batch, size, steps, implementation)


def figures(found: tpu_estimate.Estimate, calls: int, model_flops: float | None) -> dict[str, Any]:
    """Returns the cost of `calls` calls of a program, with `model_flops` per call and chip."""
    return {
        "cycles": calls * found.cycles,
        "kernel_cycles": calls * found.kernel_cycles,
        "step_seconds": calls * found.seconds,
        "model_flops": model_flops and calls * model_flops,
        "mfu": model_flops and found.utilisation(model_flops),
        "collectives": {
            kind: {"executions": calls * count, "bytes": calls * size}
            for kind, (count, size) in found.collectives.items()
        },
        "kernels": {
            name: {"calls": calls * count, "cycles": cost.cycles, **vars(cost)}
            for name, (count, cost) in found.kernels.items()
        },
    }


def text(result: dict[str, Any], found: tpu_estimate.Memory | None, top: int) -> str:
    """Returns the result as text for people; `found` is None if the program does not fit."""
    of = result["config"] or result["preset"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
    lines = [
        f"{result['what']} of {of}, {result['batch']:g} pictures of {result['size']} px a chip,"
        f" on {result['topology']} ({mesh or 'one chip'}), libtpu {result['libtpu']}"
    ]
    limit = result["hbm_available"]
    if not result["fits"]:
        least = "at least " if found is None else ""
        over = result["hbm_bytes"] - limit
        lines.append(
            f"DOES NOT FIT: {least}{_gib(result['hbm_bytes'])} GiB a chip of {_gib(limit)},"
            f" {_gib(over)} too many"
        )
    if found is None:
        return "\n".join(lines)
    lines.append(
        f"memory, GiB a chip: arguments {_gib(found.argument_bytes)},"
        f" temporaries {_gib(found.temp_bytes)}, outputs {_gib(found.output_bytes)},"
        f" aliased {_gib(-found.alias_bytes)}; in all {_gib(found.hbm_bytes)} of {_gib(limit)}"
    )
    if not isinstance(found, tpu_estimate.Estimate):
        return "\n".join(lines)
    cycles = found.cycles + found.kernel_cycles
    lines += ["", f"{'cycles':>15} {'share':>6}  operation"]
    for count, name in found.operations[:top]:
        lines.append(f"{count:15,} {count / max(1, cycles):6.1%}  {_short(name)}")
    if found.kernels:
        bounds = ("bundles", "compute", "memory")
        lines += ["", f"{'calls':>6} " + "".join(f"{b:>12}" for b in bounds) + "  kernel, cycles"]
    for name, (calls, cost) in found.kernels.items():
        each = "".join(f"{getattr(cost, bound):12,}" for bound in bounds)
        lines.append(f"{calls:6} {each}  {name}")
    if found.collectives:
        lines += ["", f"{'executions':>10} {'GB':>8}  collective"]
    for kind, (count, size) in found.collectives.items():
        lines.append(f"{count:10} {size / 1e9:8.3f}  {kind}")
    lines += ["", "Collectives have no cycles: they are not in the step time."]
    mfu = "not counted" if result["mfu"] is None else f"{result['mfu']:.1%}"
    calls = f" in {result['calls']} calls" if result["calls"] > 1 else ""
    lines.append(
        f"{result['cycles'] / 1e6:,.1f} M cycles and {result['kernel_cycles'] / 1e6:,.1f} M of"
        f" kernels{calls}: {result['step_seconds']:.4g} s, MFU {mfu}; by the compiler's estimate"
    )
    return "\n".join(lines)


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
    if config and _IMPLEMENTATION.value != "auto":
        raise UserError("--implementation goes with --preset; give --config.network.implementation")
    if preset and _PHASE.value is not None:
        raise UserError("--phase goes with --config")
    return what


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _short(name: str) -> str:
    name = re.sub(r"jit\([^)]*\)/", "", name)
    return name if len(name) <= 80 else "..." + name[-77:]


if __name__ == "__main__":
    cli.run(main)
