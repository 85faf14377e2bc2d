"""The memory of a program on one device, by its compiler's account, and the lines that say so."""

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int  # of outputs in the place of donated arguments

    @classmethod
    def of(cls, compiled: Any) -> "Memory":
        """Reads what jax.stages.Compiled says of itself."""
        found = compiled.memory_analysis()
        parts = "argument", "output", "temp", "alias"
        return cls(**{f"{part}_bytes": getattr(found, f"{part}_size_in_bytes") for part in parts})

    @property
    def hbm_bytes(self) -> int:
        """The bytes that must fit at once; donated arguments count once."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.alias_bytes


def heading(result: dict[str, Any], device: str, compiler: str) -> str:
    """Returns the first line of a report: the program, and what it was compiled for and by."""
    of = result["config"] or result["preset"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
    return (
        f"{result['what']} of {of}, {result['batch']:g} pictures of {result['size']} px a {device},"
        f" on {result['topology']} ({mesh or f'one {device}'}), {compiler}"
    )


def memory_line(found: Memory, device: str, available: int) -> str:
    """Returns the line of a report that adds up the memory of a device."""
    return (
        f"memory, GiB a {device}: arguments {gib(found.argument_bytes)},"
        f" temporaries {gib(found.temp_bytes)}, outputs {gib(found.output_bytes)},"
        f" aliased {gib(-found.alias_bytes)}; in all {gib(found.hbm_bytes)} of {gib(available)}"
    )


def misfit(result: dict[str, Any], device: str, known: bool = True) -> str:
    """Returns the line about a program that does not fit; its need may be known at least."""
    needed, limit = result["hbm_bytes"], result["hbm_available"]
    return (
        f"DOES NOT FIT: {'' if known else 'at least '}{gib(needed)} GiB a {device} of {gib(limit)},"
        f" {gib(needed - limit)} too many"
    )


def gib(size: int) -> str:
    """Returns bytes as GiB with two digits."""
    return f"{size / 2**30:.2f}"


def short(name: str) -> str:
    """Returns the end of an operation's name."""
    name = re.sub(r"jit\([^)]*\)/", "", name)
    return name if len(name) <= 80 else "..." + name[-77:]
