"""Estimates the cost of a whole picture of Sana-Sprint on one TPU chip: text, loop and decoding.

    python -m tests.benchmarks.picture_estimate --chip=v6e

For each model and number of steps, the TPU compiler's cycles of each part at 1024 px in bfloat16,
for one picture at a time, and the pictures a second that follow. Text is a short prompt with an
instruction as long as the published one, which a pipeline reads once and not for each prompt: its
share is too large rather than too small. What happens between the parts, on the host, is left out.
Needs libtpu and some minutes, for the kernels' schedules. The last line is JSON. Not a test.
"""

import json

import jax
from absl import flags

from sana_jax.measure import memory, tpu_estimate
from sana_jax.measure.inputs import PARTS, Settings
from sana_jax.measure.ours import make_pipeline
from sana_jax.runtime import cli
from sana_jax.sharding import make_mesh

MODELS = {"0.6B": "sana_sprint_600m_1024", "1.6B": "sana_sprint_1600m_1024"}
# Flux-schnell of 12B, four steps at 1024 px, as MaxDiffusion publishes it for Trillium.
PUBLISHED = 1.25  # pictures a second and v6e chip

CHIP = flags.DEFINE_enum("chip", "v6e", list(tpu_estimate.CHIPS), "chip")
MODEL = flags.DEFINE_multi_enum("model", list(MODELS), list(MODELS), "transformers")
STEPS = flags.DEFINE_multi_integer("num_steps", [2, 4], "steps of the loop", 1, 100)
BATCH = flags.DEFINE_integer("batch_size", 1, "pictures at a time", lower_bound=1)
TOP = flags.DEFINE_integer("top", 8, "operations to list for each part", lower_bound=0)


def main(argv: list[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")  # even where there is a TPU
    shape = "2x2x1" if CHIP.value == "v5p" else "2x2"
    _, devices = tpu_estimate.tpu_devices(f"{CHIP.value}:{shape}")
    mesh = make_mesh(devices=devices[:1])
    rows, same = [], {}
    for model in MODEL.value:
        for steps in STEPS.value:
            settings = Settings(MODELS[model], "loop", BATCH.value, 1024, "bfloat16", steps)
            for part in ("decode", "text"):  # the same for all
                same[part] = same.get(part) or _cycles(mesh, part, settings)
            parts = same | {"loop": _cycles(mesh, "loop", settings)}
            total = sum(parts.values())
            hertz = tpu_estimate.CHIPS[CHIP.value].hertz
            row = dict(model=model, steps=steps, cycles=parts, total=total)
            row |= dict(decode_share=parts["decode"] / total)
            row |= dict(pictures_per_second=BATCH.value * hertz / total)
            if CHIP.value == "v6e":
                row["to_published"] = row["pictures_per_second"] / PUBLISHED
            rows.append(row)
            shown = ", ".join(f"{part} {cycles / 1e6:.1f}" for part, cycles in parts.items())
            print(
                f"{CHIP.value}, {model}, {steps} steps: {total / 1e6:.1f} M cycles ({shown}),"
                f" {row['pictures_per_second']:.2f} pictures a second; by the compiler's estimate",
                flush=True,
            )
    print(json.dumps(dict(chip=CHIP.value, batch=BATCH.value, rows=rows)))


def _cycles(mesh, part: str, settings: Settings) -> int:
    """Returns the cycles of a part, and prints its largest operations."""
    pipe = make_pipeline(settings, mesh)
    params = memory.abstract_weights(PARTS[part], pipe, settings.dtype)
    function, arguments = memory.program(pipe, part, params, settings)
    with pipe.context():
        found = tpu_estimate.estimate(function, *arguments, chip=CHIP.value)
    total = found.cycles + found.kernel_cycles
    print(f"{part}: {total / 1e6:.1f} M cycles", flush=True)
    for cycles, name in found.operations[: TOP.value]:
        print(f"  {cycles / 1e6:8.2f}  {name[-100:]}", flush=True)
    return total


if __name__ == "__main__":
    cli.run(main)
