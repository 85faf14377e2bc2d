"""A look at the first records of a source, before a training starts on them.

A large data set has bad records, which the loader replaces and counts; among five pictures that
were chosen by hand a bad one is a mistake that its user would like to hear of.
"""

import numpy as np

from sana_jax.data.caption_template import WAYS
from sana_jax.data.images import BadImage
from sana_jax.data.loader import attempt_record
from sana_jax.data.records import Source, thread_pool
from sana_jax.data.rejections import Rejection
from sana_jax.data.transforms import Transform
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.progress import Progress

# Reason of a rejection -> the remedy; for all others it is the file that is at fault.
REMEDIES = {
    "bad_caption": WAYS,
    "too_small": "give larger pictures, or config.data.upscale=True to enlarge them",
    "too_many_pixels": "make it smaller, or raise config.data.max_pixels",
}


def check_first(
    source: Source, transform: Transform, count: int, threads: int | None = None
) -> None:
    """Makes rows of the first `count` records. Raises UserError for those that cannot be used."""

    def look(index: int) -> Rejection | None:
        rng = np.random.default_rng((0, index))
        made = attempt_record(source, index, transform, rng)
        progress.update()
        return made if isinstance(made, Rejection) else None

    count = min(count, len(source))
    with thread_pool(threads) as pool, Progress(count, "picture", "looking at") as progress:
        bad = [found for found in pool.map(look, range(count)) if found]
    if bad:
        more = f"; and {len(bad) - 1} more of {count}" if bad[1:] else ""
        remedy = REMEDIES.get(bad[0].reason, "repair it, or take it away")
        raise UserError(f"{bad[0].key} cannot be used: {bad[0].detail}{more}; {remedy}")


def first_captions(source: Source, count: int, records: int = 100) -> tuple[str, ...]:
    """Returns up to `count` captions, all different, of the first records that have one."""
    found: dict[str, None] = {}
    for index in range(min(records, len(source))):
        try:
            found |= dict.fromkeys(source[index]["captions"][:1])
        except BadImage:
            continue
        if len(found) == count:
            break
    return tuple(found)
