"""What `compile` says of a program on a TPU; gpu_report.py says the same of one on a GPU."""

import dataclasses
import importlib.metadata
from collections import Counter
from functools import partial
from typing import Any

from sana_jax.measure import tpu_estimate
from sana_jax.measure.account import heading, memory_line, misfit, short
from sana_jax.measure.programs import Program
from sana_jax.measure.tpu_estimate import tpu_devices as devices

__all__ = ["devices", "measure", "text"]


def measure(
    program: Program, chip: str, share: float, memory_only: bool
) -> tuple[tpu_estimate.Memory | None, dict[str, Any]]:
    """Compiles a program for a chip; the program's mesh has to be set.

    Returns what was found, None if it does not fit, and the figures of the JSON object. `share` is
    the part of the program that one chip computes.
    """
    compile_it = tpu_estimate.memory if memory_only else partial(tpu_estimate.estimate, chip=chip)
    result: dict[str, Any] = {
        "hbm_available": tpu_estimate.CHIPS[chip].hbm_bytes,
        "libtpu": importlib.metadata.version("libtpu"),
    }
    result |= dict.fromkeys(["cycles", "kernel_cycles", "step_seconds", "mfu", "collectives"])
    try:
        found = compile_it(program.function, *program.arguments, **program.options)
    except tpu_estimate.TooLarge as error:
        return None, result | {"hbm_bytes": error.needed, "fits": False}
    if not memory_only:
        result |= figures(found, program.calls, program.flops and program.flops * share)
    sizes = [field.name for field in dataclasses.fields(tpu_estimate.Memory)]
    result |= {name: getattr(found, name) for name in ("hbm_bytes", *sizes)}
    return found, result | {"fits": found.hbm_bytes <= result["hbm_available"]}


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
    lines = [heading(result, "chip", f"libtpu {result['libtpu']}")]
    if not result["fits"]:
        lines.append(misfit(result, "chip", known=found is not None))
    if found is None:
        return "\n".join(lines)
    lines.append(memory_line(found, "chip", result["hbm_available"]))
    if not isinstance(found, tpu_estimate.Estimate):
        return "\n".join(lines)
    cycles = found.cycles + found.kernel_cycles
    lines += ["", f"{'cycles':>15} {'share':>6}  operation"]
    for count, name in found.operations[:top]:
        lines.append(f"{count:15,} {count / max(1, cycles):6.1%}  {short(name)}")
    if found.kernels:
        bounds = ("bundles", "compute", "memory")
        lines += ["", f"{'calls':>6} " + "".join(f"{b:>12}" for b in bounds) + "  kernel, cycles"]
    alike: Counter = Counter()  # the calls of the layers' kernels, which are the same
    for name, (calls, cost) in found.kernels.items():
        alike[name.partition(".")[0], cost] += calls
    for (name, cost), calls in alike.items():
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
