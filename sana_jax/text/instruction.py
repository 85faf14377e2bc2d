"""The complex human instruction that SANA reads before every prompt, and where it is found."""

import ast
import dataclasses
import hashlib
import importlib.util
from pathlib import Path

import yaml
from etils import epath

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import UNREACHABLE, check_itself, reason_of


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
    path = epath.Path(instruction_file)
    try:
        check_itself(path)
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
