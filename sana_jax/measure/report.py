"""Formats the figures of a measurement as a table."""

from typing import Any

COLUMNS = {
    "part": "part",
    "seconds": "ours s",
    "reference_seconds": "theirs s",
    "ratio": "ours/theirs",
    "images_per_second": "images/s",
    "flops_per_second": "TFLOP/s",
    "share_of_peak": "of peak",
    "compile_seconds": "compile s",
    "peak_bytes": "GB",
    "reference_peak_bytes": "theirs GB",
    "relative_error": "differs by",
}


def text(result: dict[str, Any]) -> str:
    """Returns all results as text, except the single repetitions."""
    lines = []
    if result["parts"]:
        lines += [_heading(result), table(result["parts"])]
    if "timed_steps" in result and "loop" in result["parts"]:
        timed, steps = result["timed_steps"], result["steps"]
        lines.append(f"loop: {timed} steps were run, times are those times {steps / timed:g}")
    for part, row in result["parts"].items():
        if row.get("interleaved") is False:
            lines.append(f"{part}: ours first, theirs after: memory does not hold both at once")
        if row.get("agrees") is False:
            lines.append(f"{part}: THE RESULTS DIFFER")
    if result["memory"]:
        lines.append(memory(result["memory"]))
    return "\n".join(lines)


def _heading(result: dict[str, Any]) -> str:
    device, side = result["device"], result["size"]
    if result["platform"] == "cpu":
        device = f"{device}, {result['cores']} cores"
    rate = max(row["peak_flops"] for row in result["parts"].values()) / 1e12
    what = f"{result['preset']}, {result['batch']} x {side} x {side} px, {result['dtype']}"
    what += f", {result['quantise']}" if "quantise" in result else ""
    lines = f"{what}, on {device} (matrix products {rate:.3g} TFLOP/s)"
    if result["against"] != "none":
        lines += f"\ntheirs: {result['against']}, diffusers {result['diffusers']}"
        lines += f", torch {result['torch']}"
    return lines


def table(parts: dict[str, dict[str, Any]]) -> str:
    """Returns a table with one line for each part; columns that no part fills are left out."""
    rows = [{"part": part, **row} for part, row in parts.items()]
    used = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    cells = [[COLUMNS[name] for name in used]]
    cells += [[_show(name, row.get(name)) for name in used] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def memory(found: dict[str, Any]) -> str:
    """Returns the results of measure.memory as text."""

    def list_of(some):
        return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in some.items())

    return (
        f"memory by XLA's compiler for {found['platform']}, {found['dtype']}, GB:"
        f" all parts {found['peak'] / 1e9:.2f},"
        f" text encoder dropped {found['peak_without_text_encoder'] / 1e9:.2f}\n"
        f"  weights: {list_of(found['weights'])}\n"
        f"  beside them: {list_of(found['working'])}"
    )


def _show(name: str, value) -> str:
    if value is None:
        return "-"
    if name == "part":
        return value
    if name == "share_of_peak":
        return f"{100 * value:.0f} %"
    if name == "relative_error":
        return f"{value:.1e}"
    if name.endswith("bytes"):
        return f"{value / 1e9:.2f}"
    return f"{value / 1e12 if name == 'flops_per_second' else value:.3g}"
