"""Measures how near few steps of a sampler come to many, for the table in configs/README.md.

    python -m tests.benchmarks.sampler_curve --checkpoint=shapes

Draws latents of held-out prompts of `shapes`, each from one noise, with Flow-DPM-Solver and with
flow-Euler in several numbers of steps. The error is the distance from what Flow-DPM-Solver draws in
--reference steps, relative to the norm of that; mean ± standard error over the prompts. The last
line is JSON. Not a test: its figures are in a README.md.
"""

import json
import math
from typing import Any

import numpy as np
from absl import flags

from sana_jax.runtime import cli

STEPS = {"flow_dpm_solver": (8, 14, 20), "flow_euler": (8, 14, 20, 28, 50)}

if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", "shapes", "model to draw with")
    _COUNT = flags.DEFINE_integer("count", 64, "prompts", 1)
    _REFERENCE = flags.DEFINE_integer("reference", 200, "steps that count as exact", 1, 1000)
    _GUIDANCE = flags.DEFINE_float("guidance_scale", 2.0, "as in evaluate", 0, 1000)


def measure(pipe, prompts: list[str], reference: int, guidance_scale: float) -> list[dict]:
    """Returns a row for each sampler and number of steps."""

    def draw(sampler: str, steps: int) -> np.ndarray:
        latents = pipe(
            prompts,
            seed=list(range(len(prompts))),
            sampler=sampler,
            num_steps=steps,
            guidance_scale=guidance_scale,
            output="latent",
        )
        return np.asarray(latents, np.float64).reshape(len(prompts), -1)

    exact, rows = draw("flow_dpm_solver", reference), []
    for sampler, numbers in STEPS.items():
        for steps in numbers:
            far = np.linalg.norm(draw(sampler, steps) - exact, axis=1)
            errors = far / np.linalg.norm(exact, axis=1)
            row: dict[str, Any] = {"sampler": sampler, "steps": steps, "error": errors.mean()}
            rows.append(row | {"standard_error": errors.std() / math.sqrt(len(prompts))})
    return rows


def main(argv: list[str]) -> None:
    del argv
    from sana_jax import SanaPipeline
    from sana_jax.shapes.captions import prompts

    pipe = SanaPipeline.from_pretrained(_CHECKPOINT.value, dtype="float32")
    texts = [each.text for each in prompts(_COUNT.value, seed=0)]
    rows = measure(pipe, texts, _REFERENCE.value, _GUIDANCE.value)
    for row in rows:
        error = f"{row['error']:.4f} ± {row['standard_error']:.4f}"
        print(f"{row['sampler']:16} {row['steps']:3} steps  {error}")
    settings = {flag.name: flag.value for flag in (_CHECKPOINT, _COUNT, _REFERENCE, _GUIDANCE)}
    print(json.dumps(settings | {"rows": rows}))


if __name__ == "__main__":
    cli.run(main)
