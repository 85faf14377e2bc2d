"""The pictures of the class that the checkpoint draws before it is trained further.

They are in WORKDIR/class_pictures, as `sample` would draw them: a run that is killed meanwhile
draws the rest when it comes back. Once the training has begun they stay as they are.
"""

import gc

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sana_jax.batch.draw import draw
from sana_jax.batch.settings import Options
from sana_jax.batch.tasks import Task, make_tasks
from sana_jax.data.orders import BucketOrder, Order
from sana_jax.data.prior import ClassPictures, PriorOrder, WithPrior, share_out
from sana_jax.data.records import Fingerprinted, Source
from sana_jax.runtime import hosts
from sana_jax.runtime.errors import UserError

FOLDER = "class_pictures"
Sizes = tuple[tuple[int, int], ...]  # (height, width) in pixels


def with_prior(
    config: ConfigDict, workdir: epath.Path, source: Source, order: Order, sizes: Sizes, begun: bool
) -> tuple[WithPrior, PriorOrder]:
    """Draws the pictures of the class, and returns the data with them, and its order; collective.

    Args:
      source, order: of the data, in batches of half the size.
      sizes: the table of buckets, or the only size.
      begun: whether the training has steps already, so that nothing is drawn.

    Raises UserError, and Retry where the storage does not answer.
    """
    buckets = np.zeros(len(source), int)
    if isinstance(order, BucketOrder):
        buckets = order.bucket_of_record[np.isin(order.bucket_of_record, order.buckets)]
    buckets = share_out(config.prior.images, buckets)
    made = PriorOrder(order, len(source), buckets, config.recipe.batch_size, config.seed)
    tasks, folder = _tasks(config, [sizes[bucket] for bucket in buckets]), workdir / FOLDER
    if begun:
        _check_there(folder, tasks)
    else:
        hosts.on_first_host(_draw, config, folder, tasks)
    drawn = ClassPictures(folder, [task.file for task in tasks], config.prior.prompt)
    return WithPrior(source, Fingerprinted(drawn, config.prior.prompt)), made


def _tasks(config: ConfigDict, sizes: list[tuple[int, int]]) -> list[Task]:
    common = {name: config.images[name] for name in ("num_steps", "guidance_scale")}
    given = {"prompt": config.prior.prompt}
    rows = [("config.prior: ", given | {"height": h, "width": w}) for h, w in sizes]
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
