"""The steps of a picture: which sampler takes them, how many, and at which levels of noise.

Sana is drawn by Flow-DPM-Solver or Euler on a shifted grid, Sana-Sprint by SCM at a few angles.
What is for the one is refused for the other, by name.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from sana_jax.diffusion import scm
from sana_jax.diffusion.dpm_solver import SAMPLERS, Schedule
from sana_jax.diffusion.flow import SHIFTS
from sana_jax.pipeline.facts import Facts
from sana_jax.runtime.checks import MAX_STEPS, BadArgument, choice, integer, listed, number

SCM = "scm"  # Sprint's only sampler
Angles = str | Sequence[float] | None  # a name of scm.NAMES, or the angles


@dataclasses.dataclass(frozen=True)
class Steps:
    """All steps from noise to a picture."""

    sampler: str
    num_steps: int
    flow_shift: float | None = None  # None: SCM has angles
    angles: tuple[float, ...] | None = None  # of SCM, num_steps + 1, falling to 0
    is_named: bool = True  # a known schedule, which starts from noise alone

    @classmethod
    def of(
        cls, facts: Facts, num_steps: Any, sampler: Any, flow_shift: Any, angles: Any
    ) -> "Steps":
        """Checks SanaPipeline's arguments. Raises UserError, naming the one that is wrong."""
        if sampler is not None:
            choice("sampler", sampler, (*SAMPLERS, SCM))
        if facts.is_sprint:
            if sampler not in (None, SCM):
                raise BadArgument("sampler", f"{sampler} is not for Sana-Sprint, which has {SCM}")
            if flow_shift is not None:
                raise BadArgument("flow_shift", "is not for Sana-Sprint, which has angles")
            return cls._of_angles(num_steps, angles)
        if sampler == SCM:
            raise BadArgument("sampler", f"{SCM} is for Sana-Sprint, which this checkpoint is not")
        if angles is not None:
            wrong = "are for Sana-Sprint, which this checkpoint is not: give flow_shift"
            raise BadArgument("angles", wrong)
        return cls(
            sampler=sampler or next(iter(SAMPLERS)),
            num_steps=_count(facts.num_steps if num_steps is None else num_steps),
            flow_shift=number(
                "flow_shift", facts.flow_shift if flow_shift is None else flow_shift, *SHIFTS
            ),
        )

    @classmethod
    def _of_angles(cls, num_steps: Any, angles: Any) -> "Steps":
        values = listed(angles)
        try:
            if values is None:
                if angles is not None:
                    choice("angles", angles, scm.NAMES)
                count = _count(scm.NUM_STEPS if num_steps is None else num_steps)
                return cls(SCM, count, angles=scm.named_angles(angles, count))
            values = [number("angles", value, 0, scm.MAX_ANGLE) for value in values]
            scm.check_angles(values)
        except scm.BadAngles as error:
            raise BadArgument("angles", f"{angles}: {error}") from None
        count = _count(count_of(values))
        if num_steps is not None and _count(num_steps) != count:
            raise BadArgument("num_steps", f"{num_steps}: the angles are those of {count} steps")
        return cls(SCM, count, angles=tuple(values), is_named=False)

    @property
    def schedule(self) -> Schedule:
        if self.angles is not None:
            return scm.scm(self.angles)
        return SAMPLERS[self.sampler](self.num_steps, self.flow_shift)


def _count(num_steps: Any) -> int:
    return integer("num_steps", num_steps, 1, MAX_STEPS)


def count_of(angles: Angles) -> int | None:
    """Returns the number of steps that a list of angles has; None: it is no list."""
    values = listed(angles)
    return None if values is None else len(values) - 1


def refuse_second_half(**arguments: Any) -> None:
    """Raises BadArgument for the first argument that is given, which Sana-Sprint has no use for."""
    for name, value in arguments.items():
        if value:
            raise BadArgument(
                name, "is of no use to Sana-Sprint, which evaluates its network once a step"
            )
