"""The command line: flags make a Config, a command runs with it, a mistake is one line.

Exit codes: 0 done, 1 a check failed, 2 bad input, 3 diverged, 4 a worker is lost, 130 interrupted,
143 terminated. Only this module knows absl.
"""

import contextlib
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from absl import flags

from tfloop import plain_files, streams
from tfloop.commands import COMMANDS, Command
from tfloop.config import FIELDS, GROUPS, PRESETS, Config, check_given, users_of
from tfloop.errors import DivergenceError, UserError, WorkerLost
from tfloop.stopping import StopAsked, surfacing
from tfloop.training import code
from tfloop.version import __version__
from tfloop.wording import systems_reason, value_text, without_controls

BAD_INPUT, DIVERGED, WORKER_LOST, INTERRUPTED = 2, 3, 4, 130
_CODES = {UserError: BAD_INPUT, DivergenceError: DIVERGED, WorkerLost: WORKER_LOST}
_HELP = ("--help", "-h", "-help", "--helpfull")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    streams.prepare()
    with streams.kept():
        return _ended(argv)


def _ended(argv: list[str]) -> int:
    """The exit code, and one line for what went wrong."""
    try:
        with surfacing(), _ctrl_c(argv[:1] != ["debug"]):  # there it leads to the prompt
            return _main(argv)
    except (UserError, DivergenceError, WorkerLost) as error:
        _say(error.as_flags)
        return next(code for kind, code in _CODES.items() if isinstance(error, kind))
    except StopAsked as error:
        number = error.signal or signal.SIGTERM
        _say("interrupted" if number == signal.SIGINT else "terminated")
        return 128 + number
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        streams.drop(sys.stdout)
        return 0
    except OSError as error:
        _say(f"{error.filename or 'writing'}: {error.strerror or error}")
        return BAD_INPUT
    except Exception as error:
        is_tensorflows = type(error).__module__.startswith("tensorflow.")
        if reason := systems_reason(str(error)) if is_tensorflows else "":
            _say(f"writing: {reason}")
        elif _is_out_of_memory(error):
            _say("out of memory; try a smaller model or --batch_size")
        else:
            raise
        return BAD_INPUT
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED


@contextlib.contextmanager
def _ctrl_c(listen: bool) -> Iterator[None]:
    """In this block Ctrl-C raises KeyboardInterrupt, and so does any error that becomes of it.

    As of a signal in `stopping.surfacing`; but where it is caught, as by TensorBoard, it is over.
    """
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    is_ours = listen and threading.current_thread() is threading.main_thread()
    if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if noted:
            raise KeyboardInterrupt from error
        raise
    finally:
        if is_ours and signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _say(message: str) -> None:
    print(f"tfloop: {without_controls(message)}", file=sys.stderr)


def _is_out_of_memory(error: Exception) -> bool:
    is_tensorflows = type(error).__name__ == "ResourceExhaustedError"
    return is_tensorflows or isinstance(error, MemoryError)


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in (*_HELP, "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"tfloop {__version__}")
        return 0
    for argument in argv:
        if any("\udc80" <= character <= "\udcff" for character in argument):
            raise UserError(f"{argument}: holds bytes that are no UTF-8; rename it")
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise UserError(f"'{name}' is no command; choose from {known}, or see --help")
    command = COMMANDS[name]
    if name != "debug":  # which talks with its reader
        streams.go_on_without_readers()
    if any(argument in _HELP for argument in rest):
        print(_help(name, command))
        return 0
    _check_flagfiles(rest, [])
    parsed = _flags(command)
    try:
        arguments = parsed([name, *rest])[1:]
    except flags.Error as error:
        said = " ".join(str(error).split()).replace(" ?", "?")
        if switch := re.match(r"flag --(\w+)=(.*): .*Non-boolean argument", said):
            said = f"--{switch[1]}={switch[2]}: expected true or false"
        raise UserError(f"{said.rstrip('.')}; see tfloop {name} --help") from None
    except UnicodeDecodeError:
        raise UserError("--flagfile: not a text file") from None
    if arguments and not command.arguments:
        raise UserError(f"{name} takes flags only, found '{arguments[0]}'; a flag begins with --")
    given = {field: parsed[field].value for field in command.settings if parsed[field].present}
    values = _config_file(command, parsed)
    config = _settings(given, values, parsed)
    if values:
        config = code.check_config_file(parsed["config"].value, config, given)
    check_given(config, given)
    options = {option: parsed[option].value for option in command.options}
    return command.function(config, options | {"given": given}, arguments)


MOST_FLAGFILES = 100


def _check_flagfiles(arguments: list[str], read: list[str]) -> None:
    """Raises UserError where a --flagfile, or one named in it, cannot be read or has no end."""
    for argument, after in itertools.pairwise([*arguments, ""]):
        found = re.fullmatch(r"--?flagfile(?:=(.*))?", argument.strip())
        if not found:
            continue
        path = os.path.expanduser(found[1] if found[1] is not None else after)
        read.append(path)
        if len(read) > MOST_FLAGFILES:
            raise UserError(
                f"--flagfile={read[0]}: leads to more than {MOST_FLAGFILES} files; does one name "
                "itself?"
            )
        try:
            if not path.startswith("/dev/fd/"):  # the shell's own, as of <(command)
                _check_flagfiles(plain_files.read_text(path).splitlines(), read)
        except OSError as error:
            raise UserError(f"--flagfile={path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError("--flagfile: not a text file") from None


def _config_file(command: Command, parsed: flags.FlagValues) -> dict[str, Any]:
    """What --config holds, less the settings that the command has no flags for."""
    if "config" not in parsed or not parsed["config"].present:
        return {}
    values = Config.read(parsed["config"].value)
    return {
        name: value
        for name, value in values.items()
        if name in command.settings or name not in FIELDS
    }


def _settings(given: dict[str, Any], values: dict[str, Any], parsed: flags.FlagValues) -> Config:
    """The settings of the flags and of --config, which is named where the mistake is in it."""
    try:
        return Config.make(**{**values, **given})
    except UserError as error:
        if not values:
            raise
        Config.make(**given)  # a mistake of the flags alone is raised as such
        raise UserError(f"--config={parsed['config'].value}: {error.as_flags}") from None


def _flags(command: Command) -> flags.FlagValues:
    """The command's flags, every one unset.

    Values stay text: Config.make checks them, wherever they come from.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("flagfile", None, "a file of flags, one a line", flag_values=values)
    for name in command.settings:
        is_switch = FIELDS[name].element is bool
        define = flags.DEFINE_boolean if is_switch else flags.DEFINE_string
        define(name, None, FIELDS[name].help, flag_values=values)
    if "preset" in command.settings:
        flags.DEFINE_string("config", None, "a config.json to start from", flag_values=values)
    for name, (default, help) in command.options.items():
        define = flags.DEFINE_boolean if isinstance(default, bool) else flags.DEFINE_string
        define(name, default, help, flag_values=values)
    return values


def _overview() -> str:
    lines = [
        f"tfloop {__version__}: a TensorFlow 2 training loop that one can read, step through, "
        "reset and measure.",
        "",
        "usage: tfloop COMMAND [--flag=value …]",
        "",
    ]
    lines += [f"  {name:16} {command.help}" for name, command in COMMANDS.items()]
    presets = ", ".join(PRESETS)
    return "\n".join([*lines, "", f"tfloop COMMAND --help lists its flags. Presets: {presets}."])


def _help(name: str, command: Command) -> str:
    arguments = f"{command.arguments} " if command.arguments else ""
    lines = [f"usage: tfloop {name} {arguments}[--flag=value …]", f"  {command.help}"]
    if command.options:
        lines += ["", "this command"]
        for option, (default, help) in command.options.items():
            lines.append(_flag_line(option, default, help))
    for group, names in GROUPS.items():
        if names := [field for field in names if field in command.settings]:
            lines += ["", group]
            lines += [_flag_line(field, FIELDS[field].default, help_text(field)) for field in names]
    lines += ["", "files", _flag_line("flagfile", "", "a file of flags, one a line")]
    if "preset" in command.settings:
        lines.append(_flag_line("config", "", "start from a config.json"))
    return "\n".join(lines)


def help_text(name: str) -> str:
    """A setting's help with the values it may take, and the rules that it belongs to."""
    choices = ", ".join(PRESETS if name == "preset" else FIELDS[name].choices)
    text = f"{FIELDS[name].help} ({choices})" if choices else FIELDS[name].help
    users = [] if name == "learning_rate" else users_of(name)  # every schedule takes that
    return f"{', '.join(users)}: {text}" if users else text


def flag(name: str, default: Any) -> str:
    """`--name=default` as one would type it."""
    return f"--[no]{name}" if isinstance(default, bool) else f"--{name}={value_text(default)}"


def _flag_line(name: str, default: Any, help: str) -> str:
    suffix = ""
    if isinstance(default, bool):
        suffix = " [on]" if default else " [off]"
    return f"  {flag(name, default):28} {help}{suffix}"
