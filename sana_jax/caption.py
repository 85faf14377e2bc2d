"""Describes the pictures of a data set by vision-language models.

    export OPENAI_API_KEY=...
    python -m sana_jax.caption PHOTOS --out=CAPTIONS --endpoint=https://api.openai.com/v1 \\
        --model=gpt-4o-mini --price=0.15,0.60
    python -m sana_jax.caption PHOTOS --out=CAPTIONS --endpoint=http://localhost:8000/v1 \\
        --model=InternVL2-26B,VILA1.5-13B --captions=2 --concurrency=64

PHOTOS is any data set with pictures by its name (sana_jax/data/README.md), such as webdataset:TARS.
The endpoint is any that takes OpenAI's chat questions with pictures, such as one of vLLM. Every
model gives --captions captions of every picture. CAPTIONS is then a data set by the name
captioned:CAPTIONS, the same pictures with the captions that they had and the new ones: for
`train`, `precompute` and `clip_score`. CAPTIONS/metadata.jsonl may also be moved into a folder of
pictures that has no other captions.

Questions are put again where the endpoint is busy, fails or is cut off, after pauses that double,
or that it asks for by Retry-After. An answer is kept as it comes: the same command continues where
it was stopped, pays for no answer twice, and ends with the same captions. Pictures that cannot be
read, or that every model refuses, are left out, counted by reason in CAPTIONS/index.json, and named
in the log. The key is read from the environment and is in no file and no message.

The last line is a JSON object: pictures read, used and rejected, the new captions, and the tokens.
"""

import json
import os
import re

from absl import flags

from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

INSTRUCTION = "Describe this picture in one paragraph: what is in it, where, and in which style."
OPERANDS = "PHOTOS"
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "folder where shapes or TFDS data were prepared; needed for shapes"
)
_SPLIT = flags.DEFINE_string("split", "train", "split of the data")
_OUT = flags.DEFINE_string("out", None, "folder to write, made if missing", required=True)
_ENDPOINT = flags.DEFINE_string(
    "endpoint", None, "address of the interface, such as http://localhost:8000/v1", required=True
)
_MODEL = flags.DEFINE_list("model", None, "models by their names there, NAME[,NAME]", required=True)
_CAPTIONS = flags.DEFINE_integer("captions", 1, "captions of a picture by each model", 1, 100)
_INSTRUCTION = flags.DEFINE_string("instruction", INSTRUCTION, "what the models are asked")
_KEEP = flags.DEFINE_bool("keep", True, "keep the captions that a picture has, before the new ones")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "of the models' choice of words", 0.0, 2.0)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 300, "of an answer; a longer one is cut there, and not used", 1, 2**20
)
_SIDE = flags.DEFINE_integer(
    "side", 1024, "pixels of the longer side that is sent at most, as a JPEG", 16, 8192
)
_SEED = flags.DEFINE_integer("seed", 0, "caption i of a model is asked for with seed + i", 0, 2**31)
_EXTRA = flags.DEFINE_string(
    "extra", "{}", "JSON: more fields of the questions; one of null is left out"
)
_KEY = flags.DEFINE_string(
    "key_env", "OPENAI_API_KEY", "the variable of the environment that holds the key, if it is set"
)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "questions at once", 1, 1024)
_RATE = flags.DEFINE_float("per_minute", None, "questions a minute at most", 0.1)
_TIMEOUT = flags.DEFINE_float("timeout", 120.0, "seconds to wait for an endpoint's next byte", 0.1)
_ATTEMPTS = flags.DEFINE_integer("attempts", 10, "tries for one question", 1, 1000)
_PRICE = flags.DEFINE_list(
    "price", None, "READ,WRITTEN: dollars for a million tokens, to show what it costs so far"
)


def key_of() -> str | None:
    """Returns the key in the variable that --key_env names; None without. Raises UserError."""
    if not re.fullmatch(r"[A-Za-z_]\w*", _KEY.value):  # not quoted: it may be the key itself
        raise UserError("--key_env is no name of a variable: put the key into the environment")
    key = os.environ.get(_KEY.value, "").strip()
    if not key and flags.FLAGS["key_env"].present:
        raise UserError(f"--key_env={_KEY.value}: that variable of the environment is not set")
    return key or None


def price_of(given: list[str] | None):
    """Returns the prices that --price names; None without. Raises UserError."""
    from sana_jax.data.labelling.describe import Price

    if given is None:
        return None
    try:
        read, written = map(float, given)
    except ValueError:
        read = written = -1.0
    if not all(0 <= price < float("inf") for price in (read, written)):  # NaN is neither
        raise UserError(f"--price={','.join(given)}: give two numbers, such as 0.15,0.60")
    return Price(read, written)


def extra_of(given: str) -> dict:
    """Returns the fields that --extra names. Raises UserError."""
    from sana_jax.runtime.files import parse_json

    try:
        extra = parse_json(given)
        json.dumps(extra, allow_nan=False, ensure_ascii=False).encode()  # as it is sent
    except ValueError:
        extra = None
    if not isinstance(extra, dict) or {"messages", "model", "stream", "n"} & extra.keys():
        raise UserError(
            f'--extra={given:.80}: give a JSON object such as {{"top_p": 0.9}}, without model,'
            " messages, stream and n"
        )
    return extra


def main(argv):
    _, data = argv
    from sana_jax.data.begun import SETTINGS
    from sana_jax.data.labelling.describe import Describer, Questions
    from sana_jax.data.labelling.endpoint import Endpoint
    from sana_jax.data.labelling.labels import source_settings
    from sana_jax.data.sources import is_stored, open_source
    from sana_jax.runtime.files import local, reason_of, storage
    from sana_jax.runtime.lock import locked
    from sana_jax.text.prompts import mend

    folder = local(_OUT.value)
    questions = Questions(
        tuple(name.strip() for name in _MODEL.value),
        mend(_INSTRUCTION.value),
        _CAPTIONS.value,
        _TEMPERATURE.value,
        _MAX_TOKENS.value,
        _SIDE.value,
        _SEED.value,
        extra_of(_EXTRA.value),
        _KEEP.value,
    )
    price = price_of(_PRICE.value)
    endpoint = Endpoint(
        _ENDPOINT.value,
        key_of(),
        key_name=f"${_KEY.value}",
        per_minute=_RATE.value,
        timeout=_TIMEOUT.value,
        attempts=_ATTEMPTS.value,
    )
    given = data, _SPLIT.value, _DATA_DIR.value, 128
    if is_stored(data):
        raise UserError(f"{data}: these are latents; give the pictures they are of")
    source = open_source(*given, resumes=(folder / SETTINGS).exists())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder), storage(folder):  # from here on the same command continues
            describer = Describer(source, questions, endpoint, price)
            index = describer.run(folder, source_settings(source, *given), _CONCURRENCY.value)
    except OSError as error:
        raise UserError(f"--out={folder}: {reason_of(error)}") from None
    counts, names = index["counts"], ("new_captions", "prompt_tokens", "completion_tokens")
    rejected = {reason: count for reason, count in counts["rejected"].items() if count}
    told = {"read": counts["read"], "used": counts["used"], "rejected": rejected}
    told |= {name: index[name] for name in names}
    if price:
        told["dollars"] = price.of(told["prompt_tokens"], told["completion_tokens"])
    print(f"{folder}: read it by the name captioned:{folder}")
    print(json.dumps(told))


if __name__ == "__main__":
    cli.run(main, operands=OPERANDS)
