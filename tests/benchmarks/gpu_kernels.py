"""Compiles every kernel for GPU and says what became of it: registers and spills.

    python -m tests.benchmarks.gpu_kernels
    python -m tests.benchmarks.gpu_kernels --cards=h100 --models=1.6B --pixels=1024 --batches=1,16

Forward and backward of each operation are compiled through its public function, for each card,
model, picture size, batch and type; the result is one row a kernel, card and type, over all models,
sizes and batches. Needs no GPU but the extra gpu-compile. The default, which is all that is
published, takes hours. The last line is JSON, with a row for each kernel that was compiled. Not a
test: its figures are in sana_jax/kernels/README.md.
"""

import functools
import itertools
import json
import sys
from collections import defaultdict

import jax
from absl import flags

from sana_jax import sharding
from sana_jax.measure import gpu_machine_code, gpu_program
from sana_jax.measure.gpu_compile import Kernel, compile_program, gpu_devices
from sana_jax.measure.gpu_targets import CARDS, Card
from sana_jax.models.dit import PRESETS
from sana_jax.runtime import cli
from tests.kernels.helpers import operations

MODELS = {"0.6B": "sana_600m_1024", "1.6B": "sana_1600m_1024"}
ROWS, FACTOR = 300, 32  # of text; pixels of a latent

_CARDS = flags.DEFINE_list("cards", "a100,4090,h100", "one of each architecture")
_MODELS = flags.DEFINE_list("models", list(MODELS), "transformers")
_PIXELS = flags.DEFINE_list("pixels", "512,1024,2048,4096", "sides of the picture")
_BATCHES = flags.DEFINE_list("batches", "1,2,4,8,16,32", "pictures")
_DTYPES = flags.DEFINE_list("dtypes", "bfloat16,float16,float32", "types")
HEAD = (
    "| kernel | architecture | type | compiled | registers | spilled bytes | warps at once |\n"
    "|---|---|---|---|---|---|---|"
)


def main(argv: list[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    numbers = [list(map(int, x)) for x in (_PIXELS.value, _BATCHES.value)]
    cases = itertools.product(_CARDS.value, _DTYPES.value, _MODELS.value, *numbers)
    rows = []
    for case in cases:
        rows += compiled(*case)
        print(*case, file=sys.stderr, flush=True)
    print(table(rows))
    print(json.dumps(rows))


def compiled(card: str, dtype: str, model: str, pixels: int, batch: int) -> list[dict]:
    """Returns a row for every kernel of the operations at one size."""
    described, devices = gpu_devices(f"{card}:1")
    mesh = sharding.make_mesh(devices=devices)
    config = PRESETS[MODELS[model]]
    sizes = dict(side=pixels // FACTOR, width=config.width, heads=config.cross_heads, rows=ROWS)
    sizes |= dict(hidden=round(config.width * config.mlp_ratio), dtype=dtype, batch=batch)
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = []
    for name, (fn, operands) in operations(placed, **sizes).items():
        if (name, dtype) in without_kernels:
            continue
        row = dict(card=card, dtype=dtype, model=model, pixels=pixels, batch=batch, operation=name)
        try:
            with jax.set_mesh(mesh):
                found = compile_program(fn, *operands)
        except jax.errors.JaxRuntimeError as error:
            rows.append(row | dict(kernel=name, error=str(error)))
            continue
        launches = gpu_program.read(found.hlo).launches
        figures = [
            describe(x, found.kernels.get(x.name), described)
            for x in launches
            if (x.kind.startswith("__") and x.name in found.kernels) or "fmha" in x.kind
        ]
        if not figures:
            without_kernels.add((name, dtype))
        rows += [row | one for one in figures]
    return rows


def describe(launch: gpu_program.Launch, kernel: Kernel | None, card: Card) -> dict:
    """Returns the figures of a kernel; of cuDNN's attention, which has no PTX, only its name."""
    if kernel is None:
        return dict(kernel=launch.kind.strip("_"))
    code = assemble(kernel.ptx)
    return dict(
        kernel=launch.label.split("/")[-2],
        target=code.target,
        registers=code.registers,
        spilled=code.spilled_bytes,
        warps=code.occupancy(kernel.launch, card),
    )


without_kernels: set[tuple[str, str]] = set()  # operations that are XLA's on a GPU
assemble = functools.cache(gpu_machine_code.assemble)  # often the same for several batches


def table(rows: list[dict]) -> str:
    """Returns the table of README.md."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["kernel"], row["card"], row["dtype"]].append(row)
    lines = [HEAD]
    for (kernel, card, dtype), group in sorted(groups.items()):
        good = [row for row in group if "error" not in row]
        major, minor = CARDS[card].capability
        cells = [kernel, f"sm_{major}{minor}", dtype, f"{len(good)} of {len(group)}"]
        for key in ("registers", "spilled", "warps"):
            cells.append(span(row[key] for row in good if key in row))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def span(values) -> str:
    """Returns the least and the greatest value."""
    values = sorted(values)
    ends = dict.fromkeys(map(str, (values[0], values[-1]))) if values else ["-"]
    return " to ".join(ends)


if __name__ == "__main__":
    cli.run(main)
