"""Prompt -> tokens -> the window of rows that the transformer attends to.

SANA (arXiv 2410.10629, section 2.4) puts a long instruction before the prompt, the "complex human
instruction", so that Gemma thinks about pictures. Gemma reads both; the transformer sees the first
row and the last `rows` - 1 of a sequence of fixed length, which are those of the prompt. The tokens
of the instruction stand apart here: what Gemma makes of them is the same for every prompt.

Everything here runs on the host, except `gather_window`. Nothing downloads.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import logging as standard_logging
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import yaml
from absl import logging
from etils import epath
from jaxtyping import Array, Bool, Float, Int32

from sana_jax.errors import UserError
from sana_jax.files import UNREACHABLE, reason_of

SHORTEST = 16  # lengths are rounded up to this times a power of two, so that few are compiled


@dataclasses.dataclass(frozen=True)
class Instruction:
    """The complex human instruction of a checkpoint, and where it was found."""

    text: str
    source: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class TokenizedPrompts:
    """What the text encoder reads, and which of its rows the transformer then sees.

    After a prefix the first row of the window is that of the prefix.
    """

    prefix: tuple[int, ...]  # the tokens before those of every prompt
    tokens: Int32[np.ndarray, "B L"]
    window: Int32[np.ndarray, " rows"]  # positions in 0 .. L - 1
    mask: Bool[np.ndarray, "B rows"]  # False: a row to ignore


def import_transformers():
    """The transformers package, without its advice that PyTorch is missing. Takes a second."""

    def is_other(record):
        return "PyTorch was not found" not in record.getMessage()

    logger = standard_logging.getLogger("transformers")
    logger.addFilter(is_other)
    try:
        import transformers
    finally:
        logger.removeFilter(is_other)
    return transformers


def load_tokenizer(folder: str | Path):
    """The tokenizer in a folder that transformers wrote. Raises UserError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: it should hold the tokenizer")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder} has no tokenizer.json")
    transformers = import_transformers()
    # transformers raises all kinds, bare Exception among them.
    try:
        config = folder / "tokenizer_config.json"
        name = json.loads(config.read_text()).get("tokenizer_class") if config.is_file() else None
        # By its name, because AutoTokenizer imports torch where that is installed.
        known = getattr(transformers, str(name), None) if "Token" in str(name) else None
        kind = known or transformers.AutoTokenizer
        tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{folder} holds no tokenizer that transformers reads: {reason}") from error
    tokenizer.padding_side = "right"
    return tokenizer


def clean_prompt(prompt: str) -> str:
    """Lower case, without the white space around it: what the released models are prompted with."""
    return prompt.lower().strip()


def tokenize(
    tokenizer,
    prompts: list[str],
    rows: int,
    instruction: str | None,
    fixed_width: bool = False,
) -> TokenizedPrompts:
    """The tokens of `prompts` and their window, as diffusers' SanaPipeline has them.

    With an instruction of n tokens the sequence ends at n + rows - 2: its first token stands apart,
    and the space that ends it merges into the first word of the prompt. What is longer is cut.

    `fixed_width`: as wide as the longest prompt needs, so that one program reads all batches; what
    is cut goes unsaid.
    """
    before = mend(instruction or "")
    texts = [before + clean_prompt(mend(prompt)) for prompt in prompts]
    told = tokenizer.encode(before) if before else []
    limit = len(told) + rows - 2 if before else rows
    sequences = tokenizer(texts, max_length=limit, truncation=True, padding=False)["input_ids"]
    lengths = np.array([len(sequence) for sequence in sequences])
    if not fixed_width:
        _warn_of_cuts(tokenizer, texts, lengths, limit, rows)

    # The last one may merge with the prompt; a strange prompt reaches further.
    prefix = told[: min(len(told), limit) - 1]
    if any(sequence[: len(prefix)] != prefix for sequence in sequences):
        prefix = []
    start = len(prefix)
    width = limit - start
    if not fixed_width:  # causal attention never looks at the padding: compute what is needed
        shorter = SHORTEST
        while start + shorter < lengths.max():
            shorter *= 2
        width = min(width, shorter)
    tokens = np.full((len(texts), width), tokenizer.pad_token_id or 0, np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence) - start] = sequence[start:]
    window = np.arange(limit - rows, limit, dtype=np.int32)
    window[0] = 0
    mask = window[None] < lengths[:, None]
    window = np.clip(window - start, 0, width - 1)
    return TokenizedPrompts(tuple(prefix), tokens, window, mask)


def gather_window(
    hidden: Float[Array, "B L C"],
    window: Int32[Array, " rows"],
    mask: Bool[Array, "B rows"],
    first: Float[Array, "1 C"] | None = None,
) -> Float[Array, "B rows C"]:
    """The rows that the transformer sees, in float32; those that the mask hides are zeros.

    `first`: the first of them, where it is not among `hidden`.
    """
    rows = jnp.take(hidden, window, axis=1)
    if first is not None:
        rows = rows.at[:, 0].set(first)
    return jnp.where(mask[..., None], rows.astype(jnp.float32), 0.0)


def find_instruction(instruction_file: str | Path | None = None) -> Instruction | None:
    """The complex human instruction: of a file, or of the installed diffusers; None without either.

    The file is a plain text, or a .yaml of NVlabs' with a list `text_encoder.chi_prompt`. diffusers
    is read as a file and not imported. Raises UserError where the file cannot be used.
    """
    if instruction_file is None:
        return _diffusers_instruction()
    path = epath.Path(instruction_file)
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UNREACHABLE as error:
        raise UserError(f"instruction file {path} cannot be read: {reason_of(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"instruction file {path} is not UTF-8 text") from error
    if path.suffix not in (".yaml", ".yml"):
        return Instruction(text.removesuffix("\n"), path.name)
    try:
        lines = yaml.safe_load(text)["text_encoder"]["chi_prompt"]
        if isinstance(lines, list):
            return Instruction("\n".join(lines), path.name)
    except (yaml.YAMLError, KeyError, TypeError):
        pass
    raise UserError(f"instruction file {path} has no list of strings text_encoder.chi_prompt")


def _diffusers_instruction() -> Instruction | None:
    """The default of `complex_human_instruction` in SanaPipeline.__call__."""
    package = importlib.util.find_spec("diffusers")
    if package is None or package.origin is None:
        return None
    source = "pipelines/sana/pipeline_sana.py"
    try:
        tree = ast.parse((Path(package.origin).parent / source).read_text(encoding="utf-8"))
        classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
        (pipeline,) = (node for node in classes if node.name == "SanaPipeline")
        methods = (node for node in pipeline.body if isinstance(node, ast.FunctionDef))
        (call,) = (node for node in methods if node.name == "__call__")
        names = [argument.arg for argument in call.args.args]
        # Defaults belong to the last arguments.
        defaults = dict(zip(reversed(names), reversed(call.args.defaults), strict=False))
        lines = ast.literal_eval(defaults["complex_human_instruction"])
        return Instruction("\n".join(lines), f"diffusers/{source}")
    except (OSError, SyntaxError, ValueError, TypeError, KeyError):
        return None  # not the diffusers that we know


def mend(text: str) -> str:
    """Half surrogates, which no tokenizer takes, become U+FFFD; pairs become their character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _warn_of_cuts(tokenizer, texts: list[str], lengths: np.ndarray, limit: int, rows: int) -> None:
    """Says in one line how many tokens of the prompts of a batch are kept, of how many given."""
    full = (len(tokenizer.encode(t)) for t, n in zip(texts, lengths, strict=True) if n == limit)
    cuts = [f"{rows}/{n - limit + rows}" for n in full if n > limit]
    if cuts:
        logging.warning("prompts were cut, tokens kept/given: %s", ", ".join(cuts))
