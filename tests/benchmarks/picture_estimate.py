"""Estimates the cost of a whole picture on one TPU chip: text, loop and decoding.

    python -m tests.benchmarks.picture_estimate --chip=v6e --store=picture.jsonl
    python -m tests.benchmarks.picture_estimate --model=sana_1600m_1024 --num_steps=20 \
        --quantise=none --quantise=w8a8 --chip=v5e --store=picture.jsonl

For each model, number of steps and method of quantisation, the TPU compiler's cycles of each part
at 1024 px, for one picture at a time, and the pictures a second that follow. All else is bfloat16;
of text encoder and decoder a method stores the weights in int8. Text is a short prompt
with an instruction as long as the published one, which a pipeline reads once and not for each
prompt: its share is too large rather than too small. What happens between the parts, on the host,
is left out, and so is the decoder's first convolution, of a thousand pixels.

The decoder is compiled a stage at a time. The loop has every layer by itself, as sampling on a TPU
does, and compiles long. With --store, what is known is kept, and a second run goes on: start
another file when the code has changed. Needs libtpu, for the kernels' schedules. The last line is
JSON. Not a test: its figures are in sana_jax/kernels/README.md.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh

from sana_jax.kernels.image_head import image_head
from sana_jax.measure import memory, tpu_estimate
from sana_jax.measure.inputs import PARTS, Settings
from sana_jax.measure.ours import make_pipeline
from sana_jax.models.dc_ae import Stage
from sana_jax.models.dit import PRESETS
from sana_jax.pipeline.pipeline import SanaPipeline
from sana_jax.quantisation.table import METHODS
from sana_jax.runtime import cli
from sana_jax.sharding import make_mesh

SPRINT = ["sana_sprint_600m_1024", "sana_sprint_1600m_1024"]
SIZE, DTYPE = 1024, "bfloat16"
# Flux-schnell of 12B, four steps at 1024 px, as MaxDiffusion publishes it for Trillium.
PUBLISHED = 1.25  # pictures a second and v6e chip

CHIP = flags.DEFINE_enum("chip", "v6e", list(tpu_estimate.CHIPS), "chip")
MODEL = flags.DEFINE_multi_enum("model", SPRINT, list(PRESETS), "presets")
QUANTISE = flags.DEFINE_multi_enum("quantise", ["none"], ["none", *METHODS], "none: bfloat16")
STEPS = flags.DEFINE_multi_integer("num_steps", [2, 4], "steps of the loop", 1, 100)
BATCH = flags.DEFINE_integer("batch_size", 1, "pictures at a time", lower_bound=1)
TOP = flags.DEFINE_integer("top", 8, "operations to list for each piece", lower_bound=0)
STORE = flags.DEFINE_string("store", None, "a file of what is known, to go on with")

# A piece: whose context it is compiled in, its function and the arguments.
Program = tuple[SanaPipeline, Callable, tuple]


def main(argv: list[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")  # even where there is a TPU
    shape = "2x2x1" if CHIP.value == "v5p" else "2x2"
    _, devices = tpu_estimate.tpu_devices(f"{CHIP.value}:{shape}")
    mesh = make_mesh(devices=devices[:1])
    known = Store(Path(STORE.value) if STORE.value else None)
    rows = []
    for model, steps, method in itertools.product(MODEL.value, STEPS.value, QUANTISE.value):
        parts = {part: 0 for part in ("text", "loop", "decode")}
        for piece, program in pieces(mesh, model, steps, method).items():
            parts[piece.split()[0]] += known.cycles(piece, program)
        found = dict(model=model, steps=steps, quantise=method, cycles=parts) | summary(parts)
        rows.append(found)
        shown = ", ".join(f"{part} {cycles / 1e6:.1f}" for part, cycles in parts.items())
        print(
            f"{CHIP.value}, {model}, {steps} steps, quantise={method}: {found['total'] / 1e6:.1f}"
            f" M cycles ({shown}), {found['total'] / rows[0]['total']:.3f} of the first,"
            f" {found['pictures_per_second']:.2f} pictures a second; by the compiler's estimate",
            flush=True,
        )
    print(json.dumps(dict(chip=CHIP.value, batch=BATCH.value, rows=rows)))


def summary(parts: dict[str, int]) -> dict[str, float]:
    """Returns what the cycles of all parts come to."""
    total = sum(parts.values())
    rate = BATCH.value * tpu_estimate.CHIPS[CHIP.value].hertz / total
    found = dict(total=total, decode_share=parts["decode"] / total, pictures_per_second=rate)
    return found | ({"to_published": rate / PUBLISHED} if CHIP.value == "v6e" else {})


def pieces(mesh: Mesh, model: str, steps: int, method: str) -> dict[str, Callable[[], Program]]:
    """Returns what to compile; a name says the part and whatever else the program depends on."""

    @cache
    def pipeline():
        quantise = None if method == "none" else method
        settings = Settings(model, "loop", BATCH.value, SIZE, DTYPE, steps, quantise=quantise)
        return settings, make_pipeline(settings, mesh)

    def part(name):
        settings, pipe = pipeline()
        params = memory.abstract_weights(PARTS[name], pipe, DTYPE)
        return pipe, *memory.program(pipe, name, params, settings)

    def decoder():
        pipe = pipeline()[1]
        return pipe, memory.abstract_weights("vae", pipe, DTYPE)["decoder"]

    def images(stage, channels):
        side = SIZE >> stage
        return jax.ShapeDtypeStruct((BATCH.value, side, side, channels), DTYPE)

    def stage(i):
        pipe, params = decoder()
        config = pipe.vae.config
        before = min(i + 1, len(config.decoder_channels) - 1)
        network = Stage(config, "decoder", i, dtype=DTYPE, param_dtype=DTYPE)
        x = images(before, config.decoder_channels[before])
        return (
            pipe,
            lambda params, x: network.apply({"params": params}, x),
            (params[f"stage_{i}"], x),
        )

    def head():
        pipe, params = decoder()
        norm, conv = params["norm_out"], params["conv_out"]
        x = images(0, pipe.vae.config.decoder_channels[0])
        weights = norm["scale"], norm["bias"], conv["kernel"], conv["bias"]
        return pipe, image_head, (x, *weights)

    stages = {f"decode {method} stage {i}": lambda i=i: stage(i) for i in reversed(range(6))}
    text = {f"text {method}": lambda: part("text")}
    loop = {f"loop {model} {steps} steps {method}": lambda: part("loop")}
    return loop | text | stages | {f"decode {method} head": head}


class Store:
    """What is known: a line of the file is the key of a piece, and its cycles."""

    def __init__(self, path: Path | None):
        self._path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self._cycles = {tuple(key): cycles for key, cycles in map(json.loads, lines)}

    def cycles(self, piece: str, program: Callable[[], Program]) -> int:
        """Returns the cycles of a piece; compiles what is not known and prints what costs most."""
        key = jax.__version__, CHIP.value, BATCH.value, piece
        if key in self._cycles:
            return self._cycles[key]
        start = time.process_time()
        pipe, function, arguments = program()
        with pipe.context():
            found = tpu_estimate.estimate(function, *arguments, chip=CHIP.value)
        self._cycles[key] = total = found.cycles + found.kernel_cycles
        seconds = time.process_time() - start
        print(f"{piece}: {total / 1e6:.2f} M cycles, compiled in {seconds:.0f} s", file=sys.stderr)
        for cycles, name in found.operations[: TOP.value]:
            print(f"  {cycles / 1e6:8.2f}  {name[-100:]}", file=sys.stderr, flush=True)
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps([key, total]) + "\n")
        return total


if __name__ == "__main__":
    cli.run(main)
