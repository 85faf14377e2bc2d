"""The flags and the main function that the commands for training share."""

import ast
import ctypes
import os
import signal
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from sana_jax.runtime import devices, hosts
from sana_jax.runtime.cli import EXIT_RETRY
from sana_jax.runtime.devices import enable_compilation_cache
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.training.checkpoints.manager import check_name

JOIN_SECONDS = 1800  # a preempted host may come back minutes after the others
SMALLER = "a smaller batch_size in the config, more microbatches, or remat"

flags.disclaim_key_flags()  # the flags are those of the module that calls


class _AnyValue(flags.ArgumentParser):
    """Reads a value of Python, such as 1.0 or None; anything else is a text."""

    def parse(self, argument: str) -> Any:
        try:
            return ast.literal_eval({"true": "True", "false": "False"}.get(argument, argument))
        except (SyntaxError, ValueError):
            return argument


# Without this, no flag could change a field that is None in the config's file.
config_flags.register_flag_parser_for_type(type(None), _AnyValue())


def training_command(make_training: Callable[..., Any]) -> Callable[[list[str]], None]:
    """Defines the flags, and returns a main that calls make_training(config, workdir).run()."""
    config = config_flags.DEFINE_config_file(
        "config", None, "the recipe, a file in configs/; --config.FIELD=VALUE changes a field"
    )
    workdir = flags.DEFINE_string(
        "workdir",
        None,
        "folder of the run, made if missing, mounted by all hosts; it may become large",
    )
    multihost = flags.DEFINE_bool(
        "multihost", False, "join the other hosts of the job; leave it out on one host"
    )
    cache = flags.DEFINE_string(
        "compilation_cache",
        None,
        'folder for compiled programs, "" for none; default: ~/.cache/sana_jax',
    )
    flags.mark_flags_as_required(["config", "workdir"])

    def main(argv: list[str]) -> None:
        del argv
        if multihost.value:
            join_hosts()
        open_devices(multihost.value)
        enable_compilation_cache(cache.value)
        run(make_training, config.value, workdir.value)

    return main


def run(make_training: Callable[..., Any], config: ConfigDict, workdir: str) -> None:
    """Calls make_training(config, workdir).run().

    Raises Retry where another host is lost.
    """
    try:
        with devices.memory_errors(SMALLER):
            check_name(workdir)  # before anything is written, or opened for minutes
            training = make_training(config, workdir)
            hosts.log_first_host(f"training on {devices.describe()}")
            training.run()
    except Exception as error:
        if not hosts.is_loss(error):
            raise
        raise Retry(f"another host may be lost: {str(error).strip().splitlines()[0]}") from error


def open_devices(multihost: bool) -> None:
    """Raises UserError if there are no devices, and Retry in a job of several hosts.

    In such a job a process that has just been killed may not have given its chips back.
    """
    try:
        devices.find(all_hosts=True)
    except UserError as error:
        if multihost:
            raise Retry(f"{error}") from error
        raise


def join_hosts() -> None:
    """Waits for the other hosts of the job. Raises Retry if they do not come."""
    try:
        jax.distributed.initialize(initialization_timeout=JOIN_SECONDS)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise UserError(f"--multihost: {reason}; leave it out where there is one host") from error
    except RuntimeError as error:
        raise Retry(f"the other hosts did not come: {str(error).splitlines()[0]}") from error
    # JAX has replaced the handler of SIGTERM below Python's, for a service that is not used here.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    retry_after_abort()


def retry_after_abort() -> None:
    """Lets an abort end this process with status 75, after its own message.

    JAX aborts where it hears that another host is lost, from a thread of its own; the call back
    that it offers instead cannot be a function of Python (jaxlib 0.10.2).
    """
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, _end)  # Python's own handlers run too late


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end(number: int) -> None:
    os.write(2, b"error: another host is lost, as is said above; the same command goes on\n")
    os._exit(EXIT_RETRY)
