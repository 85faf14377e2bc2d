"""Protocols: every choice between a checkpoint and a published figure, in one word.

    sana   SANA's (arXiv 2410.10629; NVlabs' scripts/bash_run_inference_metric*.sh): pictures are
           drawn in 20 steps of Flow-DPM-Solver at guidance 4.5, the half without the prompt through
           the prompt's mask, and stored as JPEG; for FID both sides are then 512 px.
    clean  the same steps and guidance, the mask that the checkpoint asks for, nothing between
           the picture and clean-fid's resize.

NVlabs' noise is torch's, from one generator of seed 0 for each GPU, so that it depends on their
number; here each picture has its own seed, counting up from 0. No script of NVlabs' can draw these
pictures to the bit.
"""

import dataclasses
import hashlib
from typing import Any

from etils import epath

from sana_jax.batch.manifest import Line, Manifest
from sana_jax.batch.tasks import make_tasks, read_rows
from sana_jax.runtime.errors import UserError

BATCH = 50  # pictures at once, as NVlabs' script; it decides rounding alone
# Settings of a manifest that differ from picture to picture, or say nothing of how it was drawn.
OWN = "file", "sha256", "key", "prompt", "seed", "checkpoint", "step_by_step", "image", "mask"
UNUSUAL = "loras", "image_sha256"  # which no protocol has


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The choices of a measurement and of the pictures before it."""

    measuring: dict[str, Any]  # flags of evaluate
    unconditional_mask: str | None  # None: the checkpoint's
    sampling: dict[str, Any] = dataclasses.field(  # names as in manifest.jsonl
        default_factory=lambda: {
            "sampler": "flow_dpm_solver",
            "num_steps": 20,
            "guidance_scale": 4.5,
            "guidance_interval": None,
            "negative_prompt": "",
            "use_resolution_binning": False,
        }
    )
    seed: int = 0  # of the first picture; the others count up


PROTOCOLS = {
    "sana": Protocol({"resize": "bilinear", "size": 512, "jpeg": True}, "prompt"),
    "clean": Protocol({"resize": "bicubic", "size": None, "jpeg": False}, None),
}


def draw(
    protocol: Protocol,
    checkpoint: str,
    prompts: str,
    out: str,
    count: int | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> None:
    """Draws the pictures of the first `count` prompts that are not in the folder `out` yet.

    Raises UserError, if possible before anything is drawn.
    """
    sampling = dict(protocol.sampling)
    common = {
        name: sampling.pop(name) for name in ("negative_prompt", "num_steps", "guidance_scale")
    }
    rows = read_rows(prompts)[:count]
    for where, row in rows:
        if given := sorted(row.keys() & {*common, "seed", "image", "mask", "strength"}):
            raise UserError(f"{where}{given[0]} is decided by --protocol; leave it out")
    tasks = make_tasks(rows, common, protocol.seed, 1)

    from sana_jax.batch import draw as batch  # flags are checked before jax is read
    from sana_jax.batch.settings import Options

    batch.draw(
        tasks,
        Options(
            checkpoint,
            out,
            variant=variant,
            revision=revision,
            unconditional_mask=protocol.unconditional_mask,
            batch_size=BATCH,
            **sampling,
        ),
    )


def drawing(data: str, protocol: Protocol | None, count: int | None = None) -> dict[str, Any]:
    """Returns how the first `count` pictures of a batch run were drawn, for JSON.

    It is empty for other folders. None: all pictures.

    `drawing` has the settings that all of them share, `seeds` the first and the last seed, and
    `prompts_sha256` the hash of their prompts in order, with line ends between them. With a
    protocol, `deviations` names what it would have chosen otherwise.
    """
    path = epath.Path(data) / "manifest.jsonl"
    if not path.exists():
        return {}
    found = Manifest(path).lines
    lines = [found[name] for name in sorted(found)][:count]
    if not lines:
        return {}
    names = dict.fromkeys(name for line in lines for name in line if name not in OWN)
    shared = {}
    for name in names:
        values = [line.get(name) for line in lines]
        shared[name] = values[0] if values.count(values[0]) == len(values) else "varies"
    told = "\n".join(str(line.get("prompt")) for line in lines)
    about = {"drawing": shared, "seeds": [lines[0].get("seed"), lines[-1].get("seed")]}
    about["prompts_sha256"] = hashlib.sha256(told.encode("utf-8", "replace")).hexdigest()
    if protocol is not None:
        about["deviations"] = _deviations(protocol, lines, shared)
    return about


def _deviations(protocol: Protocol, lines: list[Line], shared: dict[str, Any]) -> list[str]:
    wanted = dict(protocol.sampling)
    if protocol.unconditional_mask is not None:
        wanted["unconditional_mask"] = protocol.unconditional_mask
        shared = {"unconditional_mask": "negative"} | shared  # which a manifest leaves out
    found = [
        f"{name} {shared.get(name)!r}, not {value!r}"
        for name, value in wanted.items()
        if shared.get(name) != value
    ]
    found += [name for name in UNUSUAL if name in shared]
    seeds = [line.get("seed") for line in lines]
    if seeds != [*range(protocol.seed, protocol.seed + len(lines))]:
        found.append(f"seeds do not count up from {protocol.seed}")
    return found
