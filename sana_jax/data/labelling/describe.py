"""Describes pictures by vision-language models: several models, several captions each.

A picture's captions are asked for one after the other, those of `concurrency` pictures at once.
Every answer is appended to answers.jsonl as it comes and is not asked for again, however often the
run is killed; once all of a block are there, its lines are written (labels.py) in their order.
"""

import base64
import contextlib
import dataclasses
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sana_jax.data.images import BadImage, decoded
from sana_jax.data.labelling.endpoint import Answer, Endpoint, Refused
from sana_jax.data.labelling.labels import LabelWriter, line_of, with_styles
from sana_jax.data.loader import attempt_record
from sana_jax.data.records import Record, Source
from sana_jax.data.rejections import Rejection
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.progress import Progress
from sana_jax.text.prompts import mend

ANSWERS = "answers.jsonl"
QUALITY = 90  # of the JPEG that is sent
ALL_REFUSED = 20  # refusals without one answer: it is not about the pictures


@dataclasses.dataclass(frozen=True)
class Questions:
    """What is asked about every picture.

    Attributes:
      captions: from each of `models`; caption i is asked for with the seed `seed` + i.
      side: the longer one's pixels at most of the picture that is sent.
      extra: fields of the question that replace these, or leave them out where they are None.
      keep: the captions that a picture has already come first.
    """

    models: tuple[str, ...]
    instruction: str
    captions: int = 1
    temperature: float = 0.7
    max_tokens: int = 300
    side: int = 1024
    seed: int = 0
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep: bool = True

    def __post_init__(self):
        if len(set(self.models)) < len(self.models) or not all(self.models):
            raise UserError(f"--model={','.join(self.models)}: name each model once")
        if self.captions > 1 and not self.temperature:
            raise UserError(
                f"--captions={self.captions}: at --temperature=0 they would be the same"
            )

    @property
    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"models": list(self.models), "quality": QUALITY}

    def wanted(self) -> list[tuple[str, int]]:
        """Returns the models and the numbers of their captions, in order."""
        return [(model, i) for model in self.models for i in range(self.captions)]

    def question(self, model: str, number: int, picture: str) -> dict[str, Any]:
        """Returns what is sent; `picture` is an address that holds its data."""
        parts = [
            {"type": "text", "text": self.instruction},
            {"type": "image_url", "image_url": {"url": picture}},
        ]
        fields = {
            "model": model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed + number,
        } | self.extra
        return {name: value for name, value in fields.items() if value is not None}


def as_address(data: bytes, side: int) -> str:
    """Returns a picture, shrunk to `side` pixels, as a data address. Raises BadImage."""
    with decoded(data) as pixels:
        image = Image.fromarray(pixels)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        image.save(content, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


class Answers:
    """The answers of the block that is worked on, in memory and in a file; threads add to it."""

    def __init__(self, path: Path, begin: int):
        self._lock, self._file = threading.Lock(), path.open("ab+")
        self._found: dict[tuple[int, str, int], Answer] = {}
        self.read = self.written = 0  # tokens of all of them
        self._file.seek(0)
        end = 0
        for line in self._file:
            try:
                record, model, number, *answer = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not line.endswith(b"\n"):  # a kill may come in the middle of one
                break
            end += len(line)
            if record >= begin:  # others are of a block that was finished
                self._keep(record, model, number, Answer(*answer))
        self._file.truncate(end)

    def get(self, record: int, model: str, number: int) -> Answer | None:
        return self._found.get((record, model, number))

    def add(self, record: int, model: str, number: int, answer: Answer) -> None:
        line = json.dumps([record, model, number, *dataclasses.astuple(answer)]) + "\n"
        with self._lock:
            self._file.write(line.encode())
            self._file.flush()
            self._keep(record, model, number, answer)

    def _keep(self, record: int, model: str, number: int, answer: Answer) -> None:
        self._found[record, model, number] = answer
        self.read += answer.read
        self.written += answer.written

    def clear(self) -> None:
        with self._lock:
            self._file.truncate(0)
            self._found.clear()
            self.read = self.written = 0

    def __len__(self) -> int:
        return len(self._found)


@dataclasses.dataclass(frozen=True)
class Price:
    """Dollars for a million tokens that a model reads, and for a million that it writes."""

    read: float
    written: float

    def of(self, read: int, written: int) -> float:
        return (read * self.read + written * self.written) / 1e6


class Describer:
    """Describes the records of a source block by block into a folder of labels."""

    def __init__(
        self, source: Source, questions: Questions, endpoint: Endpoint, price: Price | None = None
    ):
        self._source, self._questions, self._price = source, questions, price
        self._endpoint = endpoint
        self._refused, self._lock = 0, threading.Lock()

    def run(self, folder: Path, settings: dict[str, Any], concurrency: int) -> dict[str, Any]:
        """Describes what is missing, and returns the index.

        Raises UserError if the endpoint cannot be used as it is given, or refuses all pictures,
        Retry if it does not answer, and OSError.
        """
        writer = LabelWriter(folder, settings | {"questions": self._questions.settings})
        pool = ThreadPoolExecutor(concurrency, "describe")
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(Progress(len(self._source), "picture", initial=writer.begin))
            # In-flight questions are lost, and no thread waits for the next try.
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            stack.callback(self._endpoint.close)
            if writer.index is None:
                self._answers = Answers(folder / ANSWERS, writer.begin)
            while writer.begin < len(self._source):
                block = range(writer.begin, min(writer.begin + writer.block, len(self._source)))
                self._add(writer, list(self._described(block, pool, writer, bar)))
                self._answers.clear()
        index = writer.finish()
        (folder / ANSWERS).unlink(missing_ok=True)
        return index

    def _described(self, block: range, pool, writer: LabelWriter, bar: Progress) -> Iterator:
        """Yields for each record of a block its line, or its rejection, once all are there."""
        before = writer.total("prompt_tokens"), writer.total("completion_tokens")
        futures = [pool.submit(self._attempt, number) for number in block]
        for future in as_completed(futures):
            future.result()
            bar.tell(self._cost_so_far(*before))
            bar.update()
        yield from (future.result() for future in futures)

    def _attempt(self, number: int):
        describe, no_rng = partial(self._describe, number), np.random.default_rng(0)
        return attempt_record(self._source, number, describe, no_rng)

    def _describe(self, number: int, record: Record, rng: Any) -> bytes:
        """Returns the line of a record. Raises BadImage."""
        questions, picture, answers, refusals = self._questions, None, {}, []
        for model, i in questions.wanted():
            if (answer := self._answers.get(number, model, i)) is None:
                picture = picture or as_address(record["image"], questions.side)
                try:
                    answer = self._endpoint.ask(questions.question(model, i, picture))
                except Refused as error:
                    refusals.append(f"{model}: {error}")
                    self._count_refusal(refusals[-1])
                    continue
                self._answers.add(number, model, i, answer)
            answers[model, i] = answer
        if not answers:
            raise BadImage("not_described", "; ".join(dict.fromkeys(refusals)))
        own = record["captions"] if questions.keep else []
        captions = [mend(text) for text in (*own, *(answer.text for answer in answers.values()))]
        truth = with_styles(record["truth"], len(own), [model for model, _ in answers])
        return line_of(number, mend(record["key"]), captions, [], mend(truth))

    def _count_refusal(self, why: str) -> None:
        with self._lock:
            self._refused += 1
            all_refused = self._refused >= ALL_REFUSED and not len(self._answers)
        if all_refused:
            raise UserError(f"{self._endpoint} refuses every picture, such as by {why}")

    def _add(self, writer: LabelWriter, found: list[bytes | Rejection]) -> None:
        lines = [line for line in found if isinstance(line, bytes)]
        writer.add(
            lines,
            [each for each in found if isinstance(each, Rejection)],
            new_captions=len(self._answers),
            prompt_tokens=self._answers.read,
            completion_tokens=self._answers.written,
        )

    def _cost_so_far(self, read: int, written: int) -> str:
        """Returns the cost in words; `read` and `written` are the tokens of earlier blocks."""
        read, written = read + self._answers.read, written + self._answers.written
        cost = f"${self._price.of(read, written):.2f}, " if self._price else ""
        again = f", {self._endpoint.retries} tries again" if self._endpoint.retries else ""
        return f"{cost}{read} tokens read, {written} written{again}"
