"""The pictures of the class that the checkpoint draws before it is trained further.

They are in WORKDIR/class_pictures, as `sample` would draw them: a run that is killed meanwhile
draws the rest when it comes back. Once the training has begun they stay as they are.
"""

import gc
import itertools
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sana_jax.batch.draw import draw
from sana_jax.batch.settings import Options
from sana_jax.batch.tasks import FIELDS, Row, Task, make_tasks, read_rows
from sana_jax.data.orders import BucketOrder, Order
from sana_jax.data.prior import ClassPictures, PriorOrder, WithPrior, share_out
from sana_jax.data.records import Fingerprinted, Source
from sana_jax.runtime import hosts
from sana_jax.runtime.errors import UserError
from sana_jax.training.text_to_image.recipe import has_prior

FOLDER = "class_pictures"
IMAGES = 100  # of a class, as in DreamBooth's scripts; more where there are more prompts
Size = tuple[int, int]  # (height, width) in pixels


def class_prompts(config: ConfigDict) -> list[str]:
    """Returns the prompts of config.prior, none where there is no prior; raises UserError."""
    if not has_prior(config):
        return []
    if config.prior.prompts is None:
        return [config.prior.prompt]
    rows = read_rows(config.prior.prompts, "config.prior.prompts=")
    for where, row in rows:
        if others := sorted(FIELDS.keys() & row.keys() - {"prompt"}):
            raise UserError(f"{where}{others[0]}: of a class, lines give the prompt alone")
    return [row["prompt"] for _, row in rows]


def with_prior(
    config: ConfigDict,
    prompts: Sequence[str],
    workdir: epath.Path,
    source: Source,
    order: Order,
    sizes: Sequence[Size],
    begun: bool,
) -> tuple[WithPrior, PriorOrder]:
    """Draws the pictures of the class, and returns the data with them, and its order; collective.

    Args:
      prompts: of the class, which take turns.
      source, order: of the data, in batches of half the size.
      sizes: the table of buckets, or the only size.
      begun: whether the training has steps already, so that nothing is drawn.

    Raises UserError, and Retry where the storage does not answer.
    """
    buckets = np.zeros(len(source), int)
    if isinstance(order, BucketOrder):
        buckets = order.bucket_of_record[np.isin(order.bucket_of_record, order.buckets)]
    buckets = share_out(config.prior.images or max(IMAGES, len(prompts)), buckets)
    made = PriorOrder(order, len(source), buckets, config.recipe.batch_size, config.seed)
    tasks = _tasks(config, prompts, [sizes[bucket] for bucket in buckets])
    folder = workdir / FOLDER
    if begun:
        _check_there(folder, tasks)
    else:
        hosts.on_first_host(_draw, config, folder, tasks)
    captions = [task.prompt for task in tasks]
    drawn = ClassPictures(folder, [task.file for task in tasks], captions)
    return WithPrior(source, Fingerprinted(drawn, "\n".join(captions))), made


def _tasks(config: ConfigDict, prompts: Sequence[str], sizes: Sequence[Size]) -> list[Task]:
    common = {name: config.images[name] for name in ("num_steps", "guidance_scale")}
    rows: list[Row] = [
        ("config.prior: ", {"prompt": prompt, "height": height, "width": width})
        for prompt, (height, width) in zip(itertools.cycle(prompts), sizes, strict=False)
    ]
    return make_tasks(rows, common, config.seed, 1)


def _draw(config: ConfigDict, folder: epath.Path, tasks: list[Task]) -> None:
    options = Options(
        checkpoint=config.start,
        out=str(folder),
        dtype=config.dtype,
        no_instruction=not config.text_encoder.instruction,
        compilation_cache=jax.config.jax_compilation_cache_dir or "",
    )
    hosts.log_first_host(f"config.prior: {len(tasks)} pictures of the class, in {folder}")
    try:
        draw(tasks, options)
    except UserError as error:
        raise UserError(f"config.prior: {error}; without {folder} they are drawn anew") from None
    gc.collect()  # the networks that drew, of which the training needs the memory


def _check_there(folder: epath.Path, tasks: list[Task]) -> None:
    """Raises UserError where a picture is gone: another would not be the same to the bit."""
    gone = [task.file for task in tasks if not (folder / task.file).exists()]
    if gone:
        raise UserError(
            f"{folder / gone[0]} is gone, with which the training began: bring it back, or start"
            " anew in another --workdir"
        )
