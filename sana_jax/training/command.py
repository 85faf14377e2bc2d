"""What the commands that train share: their flags, and what they do with them."""

from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from ml_collections.config_flags import config_flags

from sana_jax import compilation_cache

flags.disclaim_key_flags()  # they are those of the module that calls


def training_command(make_training: Callable[..., Any]) -> Callable[[list[str]], None]:
    """Defines the flags, and returns a main: make_training(config, workdir).run()."""
    config = config_flags.DEFINE_config_file("config", None, "the recipe, a file of configs/")
    workdir = flags.DEFINE_string(
        "workdir", None, "folder of the run, made if missing; it may be big"
    )
    multihost = flags.DEFINE_bool("multihost", False, "find and join the other hosts of the job")
    cache = flags.DEFINE_string(
        "compilation_cache", None, 'folder for compiled programs, "" for none; default: the user\'s'
    )
    flags.mark_flags_as_required(["config", "workdir"])

    def main(argv: list[str]) -> None:
        del argv
        if multihost.value:
            jax.distributed.initialize()
        compilation_cache.enable(cache.value)
        make_training(config.value, workdir.value).run()

    return main
