"""Runs a command: its flags, `--help`, and exit statuses that a script can rely on.

    if __name__ == "__main__":
        cli.run(main)  # main(argv) as in absl's app.run; argv holds only the program's name

0 done; 1 a bug, with its traceback; 2 the user's input (`UserError`); 75 retry me (`Retry`);
76 do not retry (`DoNotRetry`); 130 Ctrl-C; 143 SIGTERM, and 75 for both in a training. From 2 on,
stderr gets one line. Ctrl-C and SIGTERM unwind `main`, so `finally` blocks run; a second one kills
at once.
"""

import difflib
import functools
import itertools
import math
import os
import re
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator

from absl import app, flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from sana_jax.runtime import output, signals
from sana_jax.runtime.errors import (
    EXIT_DO_NOT_RETRY,
    EXIT_RETRY,
    EXIT_USER_ERROR,
    DoNotRetry,
    Retry,
    Stopped,
    UserError,
)

FLAGS = flags.FLAGS
GRACE_SECONDS = 5.0  # for threads that read, once the status is known
MAY_BE_EMPTY = {"prompt", "negative_prompt", "compilation_cache"}

# Complaints of absl that leave the remedy out, and what to say instead.
_REMEDIES = {
    r"Flag (--\S+) must have a value other than None": r"\1 is missing; --help says what it takes",
    r"Missing value for flag (--\S+)": r"\1 has no value; write \1=VALUE",
    r"Found ([^\s=]+).* in argv before a value for (--\S+)": r"\1 needs \2=FILE before it",
    r"flag (--.* should be one of .*)": r"\1",
    r"flag (--\S+): \('Non-boolean": r"\1: it takes true or false",
    r"Type <class '(\w+)'> of field (\S+)": r"--\2 is a \1; change it in the config's file",
}


def run(
    main: Callable[[list[str]], int | None],
    resumes: bool = False,
    operands: str = "",
) -> None:
    """Parses the flags, calls main(argv) and exits; `main` returns None or a status.

    Args:
      main: the command.
      resumes: the same command, run again, goes on where a signal ended it.
      operands: the name of what stands on the command line without a flag, which `main` gets after
        the program's name: "DIR" for one, "RUN ..." for one or more, "" for none.
    """
    signals.start(resumes)
    output.guard()
    if any(re.match("--?(no)?jax_", argument) for argument in sys.argv[1:]):
        import jax  # takes seconds, which a command without such flags may not need

        jax.config.config_with_absl()
    try:
        status, line = _call(main, operands)
    except BaseException:
        signals.finish(1)
        raise
    signals.finish(status)
    if line:
        print(" ".join(line.split()), file=sys.stderr)
        # Python waits for threads too, one of which may read from a disk that never answers.
        timer = threading.Timer(GRACE_SECONDS, os._exit, [status])
        timer.daemon = True
        timer.start()
    sys.exit(status)


def _call(main: Callable[[list[str]], int | None], operands: str) -> tuple[int, str]:
    """Returns the status of main, and what to print for it; raises what is a bug."""
    try:
        try:
            if {"--help", "-help", "--helpshort", "--helpfull", "-h", "-?"} & set(sys.argv[1:]):
                sys.exit(print(_help()))
            parse = functools.partial(_parse, operands)
            app.run(functools.partial(signals.unwound, main), flags_parser=parse)
        finally:
            sys.stdout.flush()  # it may fail
    except SystemExit as error:
        if isinstance(error.code, str):
            raise
        return error.code or 0, ""
    except UserError as error:
        return EXIT_USER_ERROR, f"error: {error}"
    except Stopped as error:
        return EXIT_RETRY, f"{error}"
    except Retry as error:
        return EXIT_RETRY, f"error: {error}"
    except DoNotRetry as error:
        return EXIT_DO_NOT_RETRY, f"error: {error}"
    raise AssertionError("app.run exits")


def _parse(operands: str, argv: list[str]) -> list[str]:
    """Parses the flags as absl does, and turns every complaint into a UserError."""
    # Shells leave the ~ of --out=~/pictures alone; a folder of that name would be made.
    home = re.compile(r"(--?(?!(?:negative_)?prompt=)[\w.]+=)(~(?:/.*)?)", re.DOTALL)
    argv = [f"{m[1]}{os.path.expanduser(m[2])}" if (m := home.fullmatch(a)) else a for a in argv]
    for i, (name, value) in enumerate(itertools.pairwise(argv), 1):  # --out "~/a b"
        if home.fullmatch(f"{name}={value}"):
            argv[i] = os.path.expanduser(value)
    _check_forms(argv)
    try:
        rest = FLAGS(argv)
        for flag in _config_flags():
            if not isinstance(flag.value, ConfigDict | None):
                raise TypeError(f"--{flag.name} is no ConfigDict")
            _check_tuples(flag)
    except flags.UnrecognizedFlagError as error:
        name, config = error.flagname, error.flagname.partition(".")[0]
        hint = f"give --{config}=FILE before it" if config in FLAGS else _closest(name, FLAGS)
        raise UserError(f"unknown flag --{name}; {hint or '--help lists the flags'}") from error
    except (Exception, SystemExit) as error:
        for flag in _config_flags():
            _check_keys(flag, argv, _load(flag, argv))
        if isinstance(error, flags.Error):
            raise UserError(_explain(str(error))) from error
        raise
    _check_values()
    name, _, several = operands.partition(" ")
    if name and not all(rest[1:] or [""]):
        raise UserError(f"{name} is missing; --help shows how to give it")
    if (more := rest[1 + bool(name) :]) and not several:
        raise UserError(f"unexpected {more[0]!r}; write --flag=VALUE and quote values with spaces")
    if FLAGS["verbosity"].using_default_value:
        FLAGS.verbosity = -1  # warnings; app.run would show every library's notes
    return rest


def _check_forms(argv: list[str]) -> None:
    """Refuses `--out --seed=3`, which absl takes for a folder named --seed=3."""
    for argument, value in itertools.pairwise(argv[1:]):
        name = argument.lstrip("-")
        if argument[:1] == "-" and name in FLAGS and value[:2] == "--" and not FLAGS[name].boolean:
            raise UserError(f"--{name} has no value; write --{name}=VALUE")


def _check_values() -> None:
    """Refuses values that only look like some: NaN, and what an unset variable leaves."""
    for flag in (FLAGS[name] for name in FLAGS if FLAGS[name].present and "." not in name):
        if flag.value == "" != flag.default and flag.name not in MAY_BE_EMPTY:
            raise UserError(f"--{flag.name}= is empty; give it a value")
        if isinstance(flag.value, float) and math.isnan(flag.value):  # it passes all bounds
            raise UserError(f"--{flag.name}={flag.value}: give a number")


def _explain(message: str) -> str:
    for pattern, remedy in _REMEDIES.items():
        if found := re.search(pattern, message):
            return found.expand(remedy)
    name = message.removeprefix("flag --").partition("=")[0]
    takes = FLAGS[name].flag_type() if name in FLAGS else ""
    return f"{message.removeprefix('flag ')}; " + (f"it takes {takes}" if takes else "see --help")


def _closest(name: str, names) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean --{_name_now(FLAGS[close[0]])}?" if close else ""


def _name_now(flag: flags.Flag) -> str:
    """Returns the flag's name, or for one of flags.DEFINE_alias the name that it stands for."""
    found = re.fullmatch(r"Alias for --(\S+)\.", flag.help or "")
    return found[1] if found else flag.name


def _config_flags() -> list[flags.Flag]:
    return [FLAGS[name] for name in FLAGS if config_flags.is_config_flag(FLAGS[name])]


def _load(flag: flags.Flag, argv: list[str]) -> ConfigDict:
    """Returns the config that the command line names, an empty one without. Raises UserError."""
    files = re.findall(rf"^--?{flag.name}[=\n](.*)$", "\n".join(argv), re.M)
    if not files:
        return ConfigDict()
    path, _, argument = files[-1].partition(":")
    try:
        config = flag.parser.parse(files[-1])
        getattr(config, "items", None)  # raises the OSError of a file that did not load
    except OSError as error:
        reason = str(error).splitlines()[-1].strip().rpartition(" load: ")[2]
        raise UserError(f"--{flag.name}: {reason}; give it a file of configs/") from error
    except SyntaxError as error:
        where = f"{error.filename} line {error.lineno}" if error.filename else path
        raise UserError(f"--{flag.name}: {where} is not Python: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"--{flag.name}: {_why(error, path, argument)}") from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"--{flag.name}: get_config() of {path} returns a {kind}, no ConfigDict")
    return config


def _why(error: BaseException, path: str, argument: str) -> str:
    """Returns why a config could not be made, and where."""
    if isinstance(error, AttributeError) and error.name == "get_config":
        return f"{path} has no get_config(); give it a file of configs/"
    # ml_collections raises some errors anew, with the traceback as their text.
    origin = error.__context__ if "Traceback" in str(error) and error.__context__ else error
    lines = [at.lineno for at in traceback.extract_tb(origin.__traceback__) if at.filename == path]
    where = f"{path} line {lines[-1]}" if lines else path
    reason = str(origin).strip() or type(origin).__name__
    if not isinstance(origin, ValueError | TypeError | SystemExit):
        reason = f"{type(origin).__name__}: {reason}"
    refused = bool(argument) or isinstance(origin, TypeError)
    return f"{reason}; correct {where}" + refused * ", or the argument after its colon"


def _check_keys(flag: flags.Flag, argv: list[str], config: ConfigDict) -> None:
    """Names the first override on the command line that the config has no key for."""
    keys = list(_keys(config))
    for key in re.findall(rf"^--?(?:no)?{flag.name}\.([^=\n]+)", "\n".join(argv), re.M):
        if re.sub(r"\[-?\d+\]", "", key) not in keys:
            parts = key.split(".")
            near = _nearest(config, parts)
            has = _keys_near(config, parts, f"--{flag.name}")
            hint = f"did you mean --{flag.name}.{near}?" if near else has
            raise UserError(f"unknown key --{flag.name}.{key}; {hint}")


def _keys_near(config: ConfigDict, parts: list[str], name: str) -> str:
    """Says which keys the deepest group has that the parts of a key lead to."""
    first, *rest = parts
    if isinstance(config.get(first), ConfigDict) and rest:
        return _keys_near(config[first], rest, f"{name}.{first}")
    return f"{name} has {', '.join(config)}"


def _keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")


def _nearest(config: ConfigDict, parts: list[str], prefix: str = "") -> str | None:
    """Returns the known key nearest to a misspelt one: level by level, or else by its last name."""
    first, *rest = parts
    close = [first] if first in config else difflib.get_close_matches(first, config, n=1)
    if not close:  # a level too few, or one of another name
        keys = sorted(_keys(config, prefix), key=lambda key: key.count("."), reverse=True)
        by_name = {key.rpartition(".")[2]: key for key in keys}  # the one nearest the top
        close = difflib.get_close_matches(parts[-1], by_name, n=1)
        return by_name[close[0]] if close else None
    key, below = prefix + close[0], config[close[0]]
    if rest and isinstance(below, ConfigDict):
        return _nearest(below, rest, f"{key}.")
    return key


def _check_tuples(flag: flags.Flag) -> None:
    """Checks that a tuple's elements have the type of the default's: ml_collections takes any."""
    for key, value in flag.override_values.items() if flag.value is not None else ():
        default = FLAGS[f"{flag.name}.{key}"].default
        kinds = {type(element) for element in default} if isinstance(value, tuple) else set()
        if len(kinds) == 1 and any(type(element) not in kinds | {int} for element in value):
            raise UserError(f"--{flag.name}.{key}={value}: give it elements as in {default}")


def _help() -> str:
    """Returns the command's docstring and flags. JAX's and absl's own flags are not listed."""
    lines = [(sys.modules["__main__"].__doc__ or "").strip()]
    package = __name__.partition(".")[0] + "."
    for module, group in FLAGS.flags_by_module_dict().items():
        if module == sys.argv[0] or module.startswith(package):
            lines += ["", "flags:" if module == sys.argv[0] else f"flags of {module}:"]
            for flag in group:
                if _name_now(flag) != flag.name:
                    lines.append(f"  --{flag.name}: old name of --{_name_now(flag)}")
                    continue
                required = any("other than None" in check.message for check in flag.validators)
                if required:
                    note = " (required)"
                elif flag.default is not None:
                    note = f" (default {flag.default_as_str})"
                else:  # the text may say what happens then
                    note = "" if "default" in flag.help else " (default none)"
                text = f"--{flag.name}: {flag.help}{note}"
                lines.append(textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines)
