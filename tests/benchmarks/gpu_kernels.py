"""Compiles every kernel for GPU and says what became of it: registers and spills.

    python -m tests.benchmarks.gpu_kernels --store=kernels.jsonl
    python -m tests.benchmarks.gpu_kernels --cards=h100 --models=1.6B --pixels=1024 --batches=1,16

Forward and backward of each operation are lowered through its public function for every type,
model, picture size and batch, and what is new is compiled for each card. Most batches give the same
kernels, told by their Triton IR after constants are folded; the compiler takes nothing else but
the warps and stages. Needs no GPU but the extra gpu-compile, and an hour of a core.

With --store, what is known is kept, and a second run goes on; one with another version of JAX adds
to it, and --cards= only prints what is there. The table has a row for each kernel, type and
version. Not a test: its figures are in sana_jax/kernels/README.md.
"""

import hashlib
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.interpreters import mlir
from jaxlib.mlir import ir, passmanager
from jaxlib.triton import dialect

from sana_jax import sharding
from sana_jax.kernels.glumbconv import api as glumbconv
from sana_jax.measure import gpu_machine_code, gpu_program
from sana_jax.measure.gpu_compile import compile_program, gpu_devices
from sana_jax.measure.gpu_targets import CARDS
from sana_jax.measure.programs import TEXT_ROWS
from sana_jax.models.dit import PRESETS
from sana_jax.runtime import cli
from tests.kernels.helpers import loss, operations, spec

# Sana-1.5's 4.8B has more of the blocks of 1.6B: the same kernels.
MODELS = {"0.6B": "sana_600m_1024", "1.6B": "sana_1600m_1024"}
OPERATIONS = "linear_attention", "glumbconv", "cross_attention"
FACTOR = 32  # pixels of a latent
ARCHITECTURES = "a100", "4090", "h100"  # the cards of the table's columns
CUDNN = "attention to text (cuDNN)"

_CARDS = flags.DEFINE_list("cards", list(ARCHITECTURES), "one of each architecture")
_MODELS = flags.DEFINE_list("models", list(MODELS), "transformers")
_PIXELS = flags.DEFINE_list("pixels", "512,1024,2048,4096", "sides of the picture")
_BATCHES = flags.DEFINE_list("batches", "1,32,2,4,8,16,64", "pictures; with guidance one is two")
_DTYPES = flags.DEFINE_list("dtypes", "bfloat16,float32,float16", "types")
_STORE = flags.DEFINE_string("store", None, "a file of what is known, to go on with")
HEAD = (
    "| kernel | type | jax | compiled | registers: sm_80 | sm_89 | sm_90 | spilled bytes |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main(argv: list[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    store = Store(Path(_STORE.value) if _STORE.value else None)
    numbers = [list(map(int, x)) for x in (_BATCHES.value, _PIXELS.value)]
    for case in itertools.product(_DTYPES.value, *numbers, _MODELS.value, OPERATIONS):
        visit(store, (jax.__version__, *case))
        print(*case, file=sys.stderr, flush=True)
    print(table(store))


class Store:
    """What is known: the kernels of a case, and the figures of a kernel on a card.

    A line of the file is a case with the digests of its kernels, or the figures of a digest.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self.cases: dict[tuple, dict[str, str]] = {}
        self.figures: dict[tuple[str, str, str], dict[str, Any]] = {}  # of JAX, card and digest
        if path and path.exists():
            for line in path.read_text().splitlines():
                self._take(*json.loads(line))

    def _take(self, key: list, value: dict[str, Any]) -> None:
        (self.figures if len(key) == 3 else self.cases)[tuple(key)] = value

    def add(self, key: tuple, value: dict[str, Any]) -> None:
        """Keeps it, in the file as well."""
        self._take(list(key), value)
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps([key, value]) + "\n")


def visit(store: Store, case: tuple) -> None:
    """Compiles the kernels of a case for all cards that have not compiled them yet."""
    for card in _CARDS.value:
        if case not in store.cases:
            store.add(case, lowered(card, case))
        known = {made for version, of, made in store.figures if (version, of) == (case[0], card)}
        if known.issuperset(store.cases[case].values()):
            continue
        figures = compiled(card, case)
        for kernel, made in lowered(card, case).items():  # as it is for this card
            store.add((case[0], card, made), figures[kernel])


def program(card: str, case: tuple):
    """Returns the mesh of a card, a function and its operands."""
    _, dtype, batch, pixels, model, operation = case
    mesh = sharding.make_mesh(devices=gpu_devices(f"{card}:1")[1])
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    config, side = PRESETS[MODELS[model]], pixels // FACTOR
    hidden = round(config.width * config.mlp_ratio)
    sizes = dict(
        side=side, width=config.width, hidden=hidden, heads=config.cross_heads, rows=TEXT_ROWS
    )
    fn, operands = operations(placed, dtype=dtype, batch=batch, **sizes)[operation]
    if operation == "glumbconv":  # value and gate are one array on a GPU
        wide = spec(batch, side, side, 2 * hidden, dtype=dtype, sharding=placed)
        fn, operands = loss(middle), (wide, *operands[2:])
    return mesh, fn, operands


def middle(wide, *arrays):
    """glumbconv as a GPU runs it."""
    *weights, projection, scale = arrays
    return glumbconv.projected_glumbconv(True, (wide,), tuple(weights), projection, scale)


def lowered(card: str, case: tuple) -> dict[str, str]:
    """Returns the digests of a case's kernels, by their names."""
    mesh, fn, operands = program(card, case)
    with jax.set_mesh(mesh):
        module = jax.jit(fn).lower(*operands).compiler_ir()
    found: dict[str, str] = {}
    for call in custom_calls(module.operation):
        target = ir.StringAttr(call.attributes["call_target_name"]).value
        if target.startswith("__cudnn$fmha"):  # compiled inside cuDNN, each size by itself
            found[CUDNN] = " ".join(map(str, case))
        elif target == "__gpu$xla.gpu.triton":
            config = call.attributes["mhlo.backend_config"]
            name, made = ir.StringAttr(config["name"]).value, digest(config)
            assert found.setdefault(name, made) == made, f"two kernels are named {name}"
    return found


def custom_calls(operation: ir.Operation) -> Iterator[ir.Operation]:
    """Yields the custom calls inside an operation."""
    for region in operation.regions:
        for inner in itertools.chain.from_iterable(region):
            if inner.operation.name == "stablehlo.custom_call":
                yield inner.operation
            yield from custom_calls(inner.operation)


def digest(config: ir.DictAttr) -> str:
    """Returns what tells a kernel of Triton from others: its program, warps and stages."""
    context = mlir.make_ir_context()
    dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context:
        module = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)
        passmanager.PassManager.parse("builtin.module(canonicalize,cse)").run(module.operation)
        program = f"{module}{config['num_warps']}{config['num_stages']}"
    return hashlib.sha256(program.encode()).hexdigest()[:16]


def compiled(card: str, case: tuple) -> dict[str, dict[str, Any]]:
    """Returns the figures of a case's kernels, by their names; of all names if it fails."""
    mesh, fn, operands = program(card, case)
    try:
        with jax.set_mesh(mesh):
            made = compile_program(fn, *operands)
    except jax.errors.JaxRuntimeError as error:
        why = str(error)
        return defaultdict(lambda: dict(error=why))
    found = {}
    for launch in gpu_program.read(made.hlo).launches:
        kernel = made.kernels.get(launch.name)
        if launch.kind.startswith("__cudnn$fmha"):
            found[CUDNN] = {}
        elif kernel and launch.kind.startswith("__"):
            used = gpu_machine_code.resources(kernel.ptx)
            figures = dict(registers=used.registers, spilled=used.spilled_bytes)
            warps = used.occupancy(kernel.launch, CARDS[card])
            found[launch.label.split("/")[-2]] = figures | dict(warps=warps)
    return found


def table(store: Store) -> str:
    """Returns the table of README.md."""
    groups = defaultdict(lambda: defaultdict(list))  # of a row, the figures by card
    for (version, dtype, *_), kernels in store.cases.items():
        for kernel, made in kernels.items():
            for (of, card, known), figures in store.figures.items():
                if (of, known) == (version, made):
                    groups[kernel, dtype, version][card].append(figures)
    lines = [HEAD]
    for row, cards in sorted(groups.items()):
        every = list(itertools.chain.from_iterable(cards.values()))
        good = [figures for figures in every if "error" not in figures]
        registers = (
            span(x["registers"] for x in cards[card] if "registers" in x) for card in ARCHITECTURES
        )
        spilled = span(x["spilled"] for x in good if "spilled" in x)
        cells = *row, f"{len(good)} of {len(every)}", *registers, spilled
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def span(values) -> str:
    """Returns the least and the greatest value."""
    values = sorted(values)
    ends = dict.fromkeys(map(str, (values[0], values[-1]))) if values else ["-"]
    return " to ".join(ends)


if __name__ == "__main__":
    cli.run(main)
