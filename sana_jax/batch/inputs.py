"""What tasks start from: their pictures and masks, read and checked before anything is drawn."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sana_jax.batch.image_files import ImageFile, Inputs, open_image
from sana_jax.batch.tasks import Task
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.progress import Progress


def with_inputs(tasks: Sequence[Task]) -> list[Task]:
    """Reads and checks the tasks' pictures and masks, and gives tasks the pictures' sizes.

    Raises UserError, naming the line or the flag, and the file.
    """
    due: dict[tuple[str, str], Task] = {}  # name of the field, path -> the first that has it
    for task in tasks:
        for name in "image", "mask":
            if path := getattr(task, name):
                due.setdefault((name, path), task)
    if not due:
        return list(tasks)

    def attempt(item: tuple[tuple[str, str], Task]) -> ImageFile:
        (name, path), task = item
        return open_image(path, name == "mask", f"{task.place_of(name)}{name}={path}")

    with ThreadPoolExecutor() as pool, Progress(len(due), "picture", "reading", delay=2) as bar:
        found = {}
        try:
            for key, file in zip(due, pool.map(attempt, due.items()), strict=True):
                found[key] = file
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return [_with_inputs(task, found) if task.image else task for task in tasks]


def _with_inputs(task: Task, found: dict[tuple[str, str], ImageFile]) -> Task:
    image = found["image", task.image or ""]
    mask = found["mask", task.mask] if task.mask else None
    height, width = image.shape[:2]
    size = f"{width} x {height} pixels (width x height)"
    if mask and mask.shape != (height, width):
        raise UserError(
            f"{task.place_of('mask')}mask={task.mask}: it has {mask.shape[1]} x {mask.shape[0]}"
            f" pixels, where its picture, {task.image}, is {size}"
        )
    for name, asked, own in ("height", task.height, height), ("width", task.width, width):
        if asked not in (None, own):
            raise UserError(
                f"{task.place_of(name)}{name}={asked}: the picture that is drawn has the size of"
                f" the one it starts from, {task.image}, which is {size}; resize it"
            )
    return dataclasses.replace(task, height=height, width=width, inputs=Inputs(image, mask))
