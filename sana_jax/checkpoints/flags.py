"""The flags that name a checkpoint, with one text of help each for all commands."""

from typing import Any

from absl import flags

from sana_jax.runtime.errors import UserError

HELP = {
    "checkpoint": "a native or diffusers folder, a bundled name, or a hub id",
    "variant": "variant of the weights in a diffusers folder, such as bf16",
    "revision": "branch, tag or commit of a hub id",
    "instruction_file": "complex human instruction, a text file or an NVlabs yaml;"
    " default: the checkpoint's, else for a diffusers folder that of an installed diffusers",
}

ANGLES_HELP = (
    "of Sana-Sprint: falling from pi/2 at most to 0, such as 1.57,1.1,0; or paper (1, 2 or 4 steps)"
    " or diffusers; default: the paper's where it has that many steps, else diffusers'"
)

LORA_HELP = (
    "a LoRA and its weight, FILE:0.8, or FILE for a weight of 1: a .safetensors file, a folder with"
    " pytorch_lora_weights.safetensors, or a hub id; may be given several times"
)

flags.disclaim_key_flags()  # the flags are those of the module that calls


def define(name: str, required: bool | None = None) -> flags.FlagHolder:
    """Defines the flag `name`, a key of HELP; by default only --checkpoint is required."""
    required = name == "checkpoint" if required is None else required
    return flags.DEFINE_string(name, None, HELP[name], required=required)


def given(flag: flags.FlagHolder) -> Any:
    """Returns a flag's value, or None where the user leaves it to the checkpoint."""
    return flag.value if flags.FLAGS[flag.name].present else None


def define_quantise(what: str) -> flags.FlagHolder:
    """Defines --quantise, a method of quantisation/table.py's METHODS, for `what`."""
    return flags.DEFINE_enum("quantise", None, ["w8", "w8a8"], f"round {what} to int8")


def define_lora() -> flags.FlagHolder:
    """Defines --lora, whose values checkpoints/loras.py opens."""
    return flags.DEFINE_multi_string("lora", [], LORA_HELP)


def define_angles() -> flags.FlagHolder:
    """Defines --angles, which `angles` reads."""
    return flags.DEFINE_string("angles", None, ANGLES_HELP)


def angles(flag: flags.FlagHolder) -> list[float] | str | None:
    """Returns the angles of --angles, or their name as it is. Raises UserError."""
    text = flag.value
    if text is None or "," not in text:
        return text
    try:
        return [float(angle) for angle in text.split(",")]
    except ValueError:
        raise UserError(f"--angles={text}: give angles with commas between them") from None
