"""The complex human instruction that SANA reads before every prompt, and where it is found."""

import ast
import dataclasses
import hashlib
import importlib.util
from pathlib import Path

import yaml
from etils import epath

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import UNREACHABLE, check_is_file, check_itself, named, reason_of

MAX_BYTES = 2**18  # of an instruction file; SANA's has 2**11, and NVlabs' yaml 2**13

STRING = "tag:yaml.org,2002:str"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A complex human instruction, and where it was found."""

    text: str
    source: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def find_instruction(instruction_file: str | Path | None = None) -> Instruction | None:
    """Returns the instruction in a file, else that of the installed diffusers, else None.

    The file is a plain text, or one of NVlabs' .yaml files with a list `text_encoder.chi_prompt`.
    diffusers is read as a file and not imported. Raises UserError if the file cannot be used.
    """
    if instruction_file is None:
        return _diffusers_instruction()
    path = epath.Path(named(instruction_file))
    try:
        check_is_file(path, f"instruction file {path}")
        check_itself(path)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"instruction file {path} has more than {MAX_BYTES} bytes")
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UNREACHABLE as error:
        raise UserError(f"instruction file {path} cannot be read: {reason_of(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"instruction file {path} is not UTF-8 text") from error
    if "\0" in text:  # as of UTF-16, or of a power cut
        raise UserError(f"instruction file {path} is not UTF-8 text")
    if not text.strip():
        raise UserError(f"instruction file {path} is empty; without it there is no instruction")
    if path.suffix.lower() not in (".yaml", ".yml"):
        return Instruction(text.removesuffix("\n"), path.name)
    try:
        lines = _strings(yaml.compose(text, yaml.SafeLoader), "text_encoder", "chi_prompt")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"instruction file {path} has no list of strings text_encoder.chi_prompt: {reason}"
        ) from None
    return Instruction("\n".join(lines), path.name)


def _strings(node: yaml.Node | None, *keys: str) -> list[str]:
    """Returns the list of strings at a path of keys. Raises ValueError.

    Only these nodes are looked at and nothing is constructed: whatever stands beside them, and
    however often the document refers to itself, takes no memory.
    """
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for name, value in reversed(pairs) if name.value == key), None)
    if not isinstance(node, yaml.SequenceNode):
        raise ValueError("it is another document")
    lines = node.value
    if not all(isinstance(x, yaml.ScalarNode) and x.tag == STRING for x in lines):
        raise ValueError("what it lists are other values")
    if sum(len(line.value) for line in lines) > MAX_BYTES:
        raise ValueError(f"the strings have more than {MAX_BYTES} letters")
    "".join(line.value for line in lines).encode()  # raises for half surrogates, a ValueError
    return [line.value for line in lines]


def _diffusers_instruction() -> Instruction | None:
    """Reads the default of `complex_human_instruction` in diffusers' SanaPipeline.__call__."""
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
