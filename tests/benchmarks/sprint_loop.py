"""Times two steps of Sana-Sprint beside twenty guided steps of the same size, on this device.

    python -m tests.benchmarks.sprint_loop --model=600m --size=512

The loops alone, from the rows of the text encoder to latents, with random weights of true size, in
turns: a few milliseconds of checks before a loop, the text and the decoding are not in them. Beside
the seconds there is the processor time of this process, which other programs on a machine change
less. The last line is JSON. Not a test: its figures are in sana_jax/pipeline/README.md.
"""

import json
import statistics
import time

import jax
from absl import flags

from sana_jax.measure.inputs import Settings
from sana_jax.measure.ours import Ours
from sana_jax.runtime import cli

MODEL = flags.DEFINE_enum("model", "600m", ["600m", "1600m"], "transformer")
SIZE = flags.DEFINE_integer("size", 512, "side of the picture in pixels")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and activations")
REPEAT = flags.DEFINE_integer("repeat", 3, "repetitions; their medians count", lower_bound=1)
LOOPS = {"guided": ("sana_{}_1024", 20), "sprint": ("sana_sprint_{}_1024", 2)}


def main(argv: list[str]) -> None:
    del argv
    sides = {}
    for kind, (preset, steps) in LOOPS.items():
        named = dict(preset=preset.format(MODEL.value), part="loop", steps=steps)
        sides[kind] = Ours(Settings(**named, batch=1, size=SIZE.value, dtype=DTYPE.value))
        sides[kind].load()
        sides[kind].run(0)  # compiles
    wall, busy = ({kind: [] for kind in sides} for _ in range(2))
    for call in range(1, REPEAT.value + 1):
        for kind, side in sides.items():
            start = time.perf_counter(), time.process_time()
            side.run(call)
            wall[kind].append(time.perf_counter() - start[0])
            busy[kind].append(time.process_time() - start[1])
        print({kind: f"{wall[kind][-1]:.1f} s" for kind in sides}, flush=True)
    result = dict(model=MODEL.value, size=SIZE.value, dtype=DTYPE.value, jax=jax.__version__)
    for name, seconds in ("wall", wall), ("processor", busy):
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        ratio = medians["guided"] / medians["sprint"]
        result[f"{name}_seconds"], result[f"{name}_ratio"] = medians, ratio
        print(f"{name}: {medians['guided']:.2f} s / {medians['sprint']:.2f} s = {ratio:.1f}")
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
