"""What `compile` says of a program on a GPU; tpu_report.py says the same of one on a TPU."""

import dataclasses
import importlib.metadata
from collections import Counter
from typing import Any

from sana_jax.measure import gpu_estimate
from sana_jax.measure.account import Memory, heading, memory_line, misfit, short
from sana_jax.measure.gpu_compile import compile_program
from sana_jax.measure.gpu_compile import gpu_devices as devices
from sana_jax.measure.gpu_estimate import Bound, Estimate
from sana_jax.measure.gpu_targets import Card
from sana_jax.measure.programs import Program

__all__ = ["devices", "measure", "text"]

PREALLOCATED = 0.75  # the share of a card's memory that JAX takes by default

UNKNOWN = """\
Not known without a card: times; the kernels that cuBLASLt and cuDNN choose, and their scratch
memory; where a card's autotuner would take a fused product of XLA's own instead of cuBLASLt."""


def measure(
    program: Program, card: Card, share: float, memory_only: bool
) -> tuple[Memory, dict[str, Any]]:
    """Compiles a program for a card; the program's mesh has to be set.

    Returns what was found, and the figures of the JSON object. `share` is the part of the program
    that one card computes.
    """
    call = program.function, *program.arguments
    if memory_only:
        found = compile_program(*call, **program.options).memory
    else:
        found = gpu_estimate.estimate(*call, card=card, **program.options)
    sizes = [field.name for field in dataclasses.fields(Memory)]
    result: dict[str, Any] = {
        "card": card.kind,
        "jax_cuda13_plugin": importlib.metadata.version("jax_cuda13_plugin"),
        "hbm_available": card.memory_bytes,
        **{name: getattr(found, name) for name in ("hbm_bytes", *sizes)},
        "fits": found.hbm_bytes <= card.memory_bytes,
        "fits_preallocated": found.hbm_bytes <= PREALLOCATED * card.memory_bytes,
    }
    result |= dict.fromkeys(["launches", "bound_seconds", "roofline_seconds", "mfu_at_most"])
    if isinstance(found, Estimate):
        result |= figures(found, program.calls, program.flops and program.flops * share)
    return found, result


def figures(found: Estimate, calls: int, model_flops: float | None) -> dict[str, Any]:
    """Returns the cost of `calls` calls of a program, with `model_flops` per call and card."""
    peak = found.card.half_flops
    return {
        "launches": calls * found.launches,
        "moved_bytes": calls * found.total(lambda bound: bound.bytes),
        "flops": calls * found.total(lambda bound: bound.launch.flops),
        "product_seconds": calls * found.total(lambda b: b.seconds if b.launch.flops else 0.0),
        "roofline_seconds": calls * found.total(lambda bound: bound.roofline),
        "bound_seconds": calls * found.seconds,
        "model_flops": model_flops and calls * model_flops,
        "mfu_at_most": model_flops and model_flops / (peak * found.seconds),
        "collectives": {
            kind: {"executions": calls * count, "bytes": calls * size}
            for kind, (count, size) in found.collectives.items()
        },
        "operations": [_row(bound, calls) for bound in found.bounds],
    }


def _row(bound: Bound, calls: int) -> dict[str, Any]:
    launch, code = bound.launch, bound.code
    row: dict[str, Any] = {
        "name": launch.name,
        "operation": launch.label,
        "kind": launch.kind,
        "calls": calls * launch.calls,
        "memory_seconds": bound.memory,
        "compute_seconds": bound.compute,
        "instruction_seconds": bound.instructions,
    }
    if code and bound.kernel:
        row |= vars(code) | {"blocks": bound.kernel.launch.blocks}
        row |= {"threads": bound.kernel.launch.threads}
    return row


def text(result: dict[str, Any], found: Memory, top: int) -> str:
    """Returns the result as text for people."""
    lines = [heading(result, "card", f"jax_cuda13_plugin {result['jax_cuda13_plugin']}")]
    if not result["fits"]:
        lines.append(misfit(result, "card"))
    lines.append(memory_line(found, "card", result["hbm_available"]))
    if result["fits"] and not result["fits_preallocated"]:
        lines.append(
            f"it fits with XLA_PYTHON_CLIENT_MEM_FRACTION=.95: JAX takes {PREALLOCATED:.0%} of a"
            " card's memory by default"
        )
    if isinstance(found, Estimate):
        lines += ["", *_operations(found, top), "", *_kernels(found), "", *_kinds(found)]
        if found.collectives:
            lines += ["", f"{'executions':>10} {'GB':>8}  collective, not in the bounds"]
        for kind, (count, size) in found.collectives.items():
            lines.append(f"{count:10} {size / 1e9:8.3f}  {kind}")
        lines += ["", UNKNOWN, _summary(result)]
    return "\n".join(lines)


def _operations(found: Estimate, top: int) -> list[str]:
    heads = "memory", "products", "instructions"
    lines = [f"{'ms':>9} {'share':>6} {'calls':>7}" + "".join(f"{h:>13}" for h in heads)]
    lines[0] += "  us a call, operation"
    alike: Counter = Counter()  # the calls of the layers' launches, which are the same
    for bound in found.bounds:
        each = bound.memory, bound.compute, bound.instructions
        alike[short(bound.launch.label), bound.seconds, each] += bound.launch.calls
    rows = sorted(alike.items(), key=lambda row: -row[1] * row[0][1])
    for (label, seconds, each), calls in rows[:top]:
        took = calls * seconds
        lines.append(
            f"{1e3 * took:9.3f} {took / max(found.seconds, 1e-12):6.1%} {calls:7,}"
            + "".join(f"{1e6 * bound:13.1f}" for bound in each)
            + f"  {label}"
        )
    return lines


def _kernels(found: Estimate) -> list[str]:
    """Returns the table of Pallas' kernels, and of those of XLA that spill registers."""
    lines = [
        f"{'registers':>9} {'spilled B':>9} {'warps':>7} {'instructions':>12} {'loops?':>6}  kernel"
        " of Pallas, or that spills"
    ]
    for bound in found.bounds:
        code, kernel, launch = bound.code, bound.kernel, bound.launch
        if code and kernel and (bound.is_pallas or code.spilled_bytes):
            warps = f"{code.occupancy(kernel.launch, found.card)}/{found.card.warps}"
            lines.append(
                f"{code.registers:9} {code.spilled_bytes:9} {warps:>7} {code.instructions:12,}"
                f" {code.unknown_loops:6}  {short(launch.label)}"
            )
    return list(dict.fromkeys(lines))  # layers have the same


def _kinds(found: Estimate) -> list[str]:
    rows: dict[str, list[float]] = {}
    for bound in found.bounds:
        row = rows.setdefault(bound.launch.kind, [0, 0.0, 0.0])
        row[0] += bound.launch.calls
        row[1] += bound.launch.calls * bound.bytes
        row[2] += bound.launch.calls * bound.seconds
    lines = [f"{'calls':>9} {'GB':>9} {'ms':>9}  kind of launch"]
    for kind, (calls, moved, took) in sorted(rows.items(), key=lambda row: -row[1][2]):
        lines.append(f"{calls:9,} {moved / 1e9:9.3f} {1e3 * took:9.3f}  {kind.strip('_')}")
    return lines


def _summary(result: dict[str, Any]) -> str:
    calls = f" in {result['calls']} calls" if result["calls"] > 1 else ""
    steps = result.get("steps")
    each = f" ({result['launches'] / steps:,.0f} a step)" if steps else ""
    mfu = result["mfu_at_most"]
    return (
        f"{result['launches']:,} launches{each}, {result['moved_bytes'] / 1e9:,.1f} GB,"
        f" {result['flops'] / 1e12:,.1f} TFLOP{calls}: at least {result['roofline_seconds']:.4g} s"
        f" by memory and products, {result['bound_seconds']:.4g} s with instructions; MFU"
        f" {'not counted' if mfu is None else f'at most {mfu:.1%}'}; bounds by the compiler's"
        " output, nothing was timed"
    )
