"""Times the parts of drawing a picture, alone or beside diffusers, on one device.

    python -m sana_jax.benchmark --preset=sana_600m_1024
    python -m sana_jax.benchmark --preset=sana_600m_512 --against=diffusers --parts=trunk,decode

The weights are random, of the preset's true size, made in memory, and the same for both sides. Each
side runs each part in a process of its own; repetitions alternate (ours, theirs, ours, ...), and
medians are shown. The first call, which compiles, is reported separately. The two sides must give
the same numbers, or the exit status is 1.

    text    short prompts after a long instruction, from the second call on
    trunk   the transformer once, 300 rows of text, on a batch doubled for guidance (not for Sprint)
    loop    --num_steps steps with guidance (Sana-Sprint: without a second half), from noise to
            latents; each side starts from the rows of the text encoder and does the captions' work
            as it does in use: ours once, diffusers in every step
    decode  latents to pixels
    encode  pixels to latents
    memory  runs nothing: this platform's compiler says how much memory all parts take on one
            device; for a TPU that is not here, see sana_jax.compile

FLOP/s are those of our side, with two for a multiply-add. They count the work that a part's
definition asks for, even where a clever form of it does less, but not the work that an earlier call
or step has done: the instruction's keys and values, and in the loop the captions'. The device's
peak is that of the best large matrix product in the same process, so a share of it is work that was
done. With --loop_steps fewer steps run, and the captions' work is scaled up with them, to our
disadvantage.

The last line is a JSON object, with times in seconds and sizes in bytes.
"""

import contextlib
import importlib.util
import json
import math
import statistics
import sys
from typing import Any

import numpy as np
from absl import flags

from sana_jax.checkpoints import flags as checkpoint_flags
from sana_jax.checkpoints.flags import given
from sana_jax.checkpoints.random_weights import KNOWN
from sana_jax.kernels.dispatch import IMPLEMENTATIONS
from sana_jax.measure import report
from sana_jax.measure.inputs import PARTS, Settings
from sana_jax.measure.worker import Worker
from sana_jax.runtime import checks, cli
from sana_jax.runtime.errors import UserError

CHOICES = [*PARTS, "memory"]
AGAINST = ["none", "diffusers", "diffusers-compiled"]
# Relative differences above these are not rounding. In bfloat16 each side is off by 0.015 after the
# 28 layers of 0.6B, and the two differ by 0.021. Guidance, 4.5 c - 3.5 u, multiplies that by 5.7 at
# most, which is the loop's bar; over 20 steps most of it averages out (0.019 per side). A toy Gemma
# with random weights is off by 0.16. Float32 stays below 1e-5.
BARS = {
    "float32": dict.fromkeys(PARTS, 1e-4),
    "bfloat16": {"text": 0.4, "trunk": 0.05, "loop": 0.12, "decode": 0.1, "encode": 0.1},
}
BESIDE_WEIGHTS = 6 * 10**9  # bytes of memory that both sides may need besides

_PRESET = flags.DEFINE_string("preset", "sana_600m_1024", f"the networks' sizes: {KNOWN}")
_BATCH = flags.DEFINE_integer("batch_size", 1, "pictures at once", 1, 2**16)
flags.DEFINE_alias("batch", "batch_size")
_SIZE = flags.DEFINE_integer(
    "size", None, "side of the picture in pixels; default: the preset's own", 1, 2**16
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(BARS), "dtype of weights and activations")
_PARTS = flags.DEFINE_list("parts", list(PARTS), f"the parts to time, some of {', '.join(CHOICES)}")
_AGAINST = flags.DEFINE_enum("against", "none", AGAINST, "the library to time beside ours")
_IMPLEMENTATION = flags.DEFINE_enum(
    "implementation",
    "auto",
    IMPLEMENTATIONS,
    "kernels of our transformer: auto (on TPU only), pallas (always) or xla (never)",
)
_QUANTISE = checkpoint_flags.define_quantise("the networks' weights, as by convert --quantise")
_STEPS = flags.DEFINE_integer(
    "num_steps", 20, "steps of the loop; default for Sana-Sprint: 2", 1, 1000
)
flags.DEFINE_alias("steps", "num_steps")
_LOOP_STEPS = flags.DEFINE_integer(
    "loop_steps",
    None,
    "run this many steps of the loop and scale their time up; default: all",
    1,
    1000,
)
_REPEAT = flags.DEFINE_integer("repeat", 5, "repetitions; their median counts", 1, 1000)


def main(argv):
    del argv
    against, steps = _AGAINST.value, given(_STEPS) or _usual_steps(_PRESET.value)
    timed_steps = _LOOP_STEPS.value or steps
    common = dict(
        preset=_PRESET.value,
        batch=_BATCH.value,
        size=_check_size(_PRESET.value, _SIZE.value),
        dtype=_DTYPE.value,
        steps=timed_steps,
        compiled=against == "diffusers-compiled",
        implementation=_IMPLEMENTATION.value,
        quantise=_QUANTISE.value,
    )
    if _QUANTISE.value and against != "none":
        raise UserError(
            f"--quantise={_QUANTISE.value} rounds, and the two sides would differ: leave --against"
            " out"
        )
    _check_parts(_PARTS.value)
    _check_installed(against)

    rows, facts, memory = {}, {}, None
    for part in dict.fromkeys(_PARTS.value):
        settings = Settings(part=part, **common)
        if part == "memory":
            _say("memory: compiling")
            with Worker("memory", settings) as worker:
                memory = worker.ask("analyse")
            continue
        scale = steps / timed_steps if part == "loop" else 1
        rows[part], found = measure(settings, against != "none", _REPEAT.value, scale)
        facts |= found

    shown = ("preset", "batch", "size", "dtype", "implementation")
    result = {name: common[name] for name in shown} | dict(steps=steps, against=against)
    if _QUANTISE.value:
        result["quantise"] = _QUANTISE.value
    if timed_steps != steps:
        result["timed_steps"] = timed_steps
    result |= facts | dict(parts=rows, memory=memory)
    print(report.text(result))
    print(json.dumps(result))
    if wrong := [part for part, row in rows.items() if row.get("agrees") is False]:
        line = f"error: the two sides differ in {', '.join(wrong)}: their times mean nothing"
        print(line, file=sys.stderr)
        return 1
    return 0


def measure(
    settings: Settings, beside: bool, repeat: int, scale: float = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times a part, `beside` the reference or alone.

    Args:
      settings: the part.
      beside: also time diffusers.
      repeat: repetitions on each side.
      scale: the length of the whole part, divided by that of the run.

    Returns:
      The figures of the part, seconds and bytes, and facts about the machine. Raises UserError.
    """
    part, seconds = settings.part, {"ours": [], "diffusers": []}
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Worker("ours", settings))
        facts = ours.ask("describe")
        flops = facts.pop("flops") * scale
        both = [ours, stack.enter_context(Worker("diffusers", settings))] if beside else [ours]
        if beside:
            facts |= both[1].ask("describe")
            _check_platforms(facts["platform"], facts["reference_platform"])
        weights = facts.pop("weight_bytes")
        together = not beside or facts["platform"] != "cpu" or _fits_twice(weights)
        first, peaks = {}, {}
        # Where memory does not hold both, one comes after the other.
        for sides in [both] if together else [[side] for side in both]:
            _say(f"{part}: making the weights of {' and '.join(side.kind for side in sides)}")
            for side in sides:
                side.send("load")
            for side in sides:
                side.receive()
            if ours in sides:
                peak_flops = ours.ask("peak_flops")
            for side in sides:
                first[side.kind] = side.ask("first")
                _say(f"{part}: {side.kind}, first call {first[side.kind][0]:.2f} s")
            for i in range(repeat):
                for side in sides:
                    seconds[side.kind].append(scale * side.ask("run"))
                times = ", ".join(f"{side.kind} {seconds[side.kind][-1]:.4g} s" for side in sides)
                _say(f"{part}: {i + 1} of {repeat}: {times}")
            for side in sides:
                peaks[side.kind] = side.ask("peak_bytes")
                side.close()

    median = statistics.median(seconds["ours"])
    row = dict(
        seconds=median,
        repetitions=seconds["ours"],
        compile_seconds=max(0.0, first["ours"][0] - median / scale),
        images_per_second=settings.batch / median,
        flops=flops,
        flops_per_second=flops / median,
        share_of_peak=flops / median / peak_flops,
        peak_flops=peak_flops,
        peak_bytes=peaks["ours"],
    )
    if beside:
        theirs = statistics.median(seconds["diffusers"])
        error = _relative_error(first["ours"][1], first["diffusers"][1])
        row |= dict(
            reference_seconds=theirs,
            reference_repetitions=seconds["diffusers"],
            reference_compile_seconds=max(0.0, first["diffusers"][0] - theirs / scale),
            ratio=median / theirs,
            reference_peak_bytes=peaks["diffusers"],
            relative_error=error if math.isfinite(error) else None,  # JSON has no NaN
            agrees=error <= BARS[settings.dtype][part],
            interleaved=together,
        )
    return row, facts


def _relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns ||ours - theirs|| / ||theirs||, or NaN, which passes no bar, if one is not finite."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _fits_twice(weight_bytes: int) -> bool:
    """Returns True if this host has enough free memory for both sides at once."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return 2 * weight_bytes + BESIDE_WEIGHTS < 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return True  # not Linux


def _check_parts(parts: list[str]) -> None:
    if not parts:
        raise UserError(f"--parts is empty; give some of {', '.join(CHOICES)}")
    for part in parts:
        if part not in CHOICES:
            raise UserError(f"--parts: {part!r} is not one of {', '.join(CHOICES)}")


def _check_installed(against: str) -> None:
    for package in ("torch", "diffusers") if against != "none" else ():
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--against={against} needs {package}, which is not installed:"
                " pip install torch diffusers, or leave --against out"
            )


def _check_platforms(ours: str, theirs: str) -> None:
    if ours != theirs:
        missing = f"jax for the {theirs}" if ours == "cpu" else f"torch for the {ours}"
        raise UserError(
            f"we run on the {ours}, torch on the {theirs}: install {missing}, or put both on the"
            " cpu with JAX_PLATFORMS=cpu and CUDA_VISIBLE_DEVICES="
        )


def _check_size(preset: str, size: int | None) -> int:
    """Returns the side in pixels. Raises UserError for a wrong side and for an unknown preset."""
    from sana_jax.checkpoints import random_weights

    dit, vae, _ = random_weights.configs(preset)
    size = size or dit.sample_size * vae.factor
    checks.multiple(f"--size={size}", size, vae.factor * dit.patch_size)
    return size


def _usual_steps(preset: str) -> int:
    """Returns the steps of a picture. Raises UserError for an unknown preset."""
    from sana_jax.checkpoints import random_weights
    from sana_jax.pipeline.facts import usual_steps

    return usual_steps(random_weights.configs(preset)[0].is_sprint)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
