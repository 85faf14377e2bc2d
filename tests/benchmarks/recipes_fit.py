"""Says what the step of each full-size recipe needs of a TPU chip's memory, as a README.md's table.

    python -m tests.benchmarks.recipes_fit
    python -m tests.benchmarks.recipes_fit --recipes=sana_1600m_4096

Every step is compiled as the config says, with its own batch, mesh, optimizer, average and frozen
networks, by `sana_jax.compile --memory`. Needs libtpu, no TPU, and minutes of a core for each; a
row is printed as soon as it is known. Not a test: its figures are in configs/README.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
POD = "v5e:16x16"
RECIPES = {  # row -> config, slice and phase
    "sana_600m_512": ("sana_600m_512", POD, None),
    "sana_600m_1024": ("sana_600m_1024", POD, None),
    "sana_1600m_512": ("sana_1600m_512", POD, None),
    "sana_1600m_1024": ("sana_1600m_1024", POD, None),
    "sana_1600m_2048": ("sana_1600m_2048", POD, None),
    "sana_1600m_4096": ("sana_1600m_4096", POD, None),
    "sana1.5_1600m_1024": ("sana1.5_1600m_1024", POD, None),
    "sana1.5_4800m_1024": ("sana1.5_4800m_1024", POD, None),
    **{
        f"sprint_{size}_1024 {phase}": (f"sprint_{size}_1024", POD, phase)
        for size in ("600m", "1600m")
        for phase in ("student", "discriminator")
    },
    "dc_ae_f32c32 phase 1": ("dc_ae_f32c32", "v5e:4x4", "low_resolution"),
    "dc_ae_f32c32 phase 2": ("dc_ae_f32c32", "v5e:4x4", "latent_adaptation"),
    "dc_ae_f32c32 phase 3": ("dc_ae_f32c32", "v5e:4x4", "local_refinement"),
}
HEAD = "| config | mesh | pictures a chip | GiB a chip |\n|---|---|---|---|"

_RECIPES = flags.DEFINE_list("recipes", list(RECIPES), "rows to make; default: all")


def main(argv: list[str]) -> None:
    del argv
    if unknown := set(_RECIPES.value) - set(RECIPES):
        raise UserError(f"--recipes={min(unknown)} is not one of {', '.join(RECIPES)}")
    print(HEAD, flush=True)
    for label in _RECIPES.value:
        print(row(label, compiled(label)), flush=True)


def compiled(label: str) -> dict[str, Any]:
    """Returns what compile says of a recipe. Raises RuntimeError with its last words."""
    config, topology, phase = RECIPES[label]
    command = [sys.executable, "-m", "sana_jax.compile", "--memory", f"--topology={topology}"]
    command += [f"--config=configs/{config}.py", *([f"--phase={phase}"] if phase else [])]
    # Compiling takes much longer by the default of the level.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_OPTIMIZATION_LEVEL": "O1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{label}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(label: str, found: dict[str, Any]) -> str:
    """Returns the row of configs/README.md, its last cell "needed of available"."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    gib = [found[key] / 2**30 for key in ("hbm_bytes", "hbm_available")]
    fits = "" if found["fits"] else "DOES NOT FIT: "
    cells = label, f"{found['topology']}, {mesh}", f"{found['batch']:g} of {found['size']} px"
    return f"| {' | '.join(cells)} | {fits}{gib[0]:.1f} of {gib[1]:.2f} |"


if __name__ == "__main__":
    cli.run(main)
