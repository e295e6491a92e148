"""The command line: flags make a Config, a command runs with it, and every mistake is one line and an exit code.

Exit codes: 0 done, 1 a check failed, 2 bad input, 3 diverged, 4 a worker is lost, 130 interrupted, 143 terminated. Only this module knows
absl.
"""

import sys

from absl import flags

from tfloop import __version__
from tfloop.commands import COMMANDS, Command
from tfloop.config import FIELDS, GROUPS, PRESETS, Config, kind
from tfloop.errors import DivergenceError, UserError, WorkerLost

BAD_INPUT, DIVERGED, WORKER_LOST, INTERRUPTED = 2, 3, 4, 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _main(argv)
    except UserError as error:
        print(f"tfloop: {error}", file=sys.stderr)
        return BAD_INPUT
    except DivergenceError as error:
        print(f"tfloop: {error}", file=sys.stderr)
        return DIVERGED
    except WorkerLost as error:
        print(f"tfloop: {error}", file=sys.stderr)
        return WORKER_LOST
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader, `head` say, has seen enough
            sys.stderr.close()
            return 0
        print(f"tfloop: {error.filename or 'writing'}: {error.strerror or error}", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "ResourceExhaustedError":  # TensorFlow's
            raise
        print("tfloop: out of memory; try a smaller model or --batch_size", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("tfloop: interrupted", file=sys.stderr)
        return INTERRUPTED


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help", "--helpfull"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"tfloop {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(f"'{name}' is no command; choose from {', '.join(COMMANDS)}, or see --help")
    command = COMMANDS[name]
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in rest):
        print(_help(name, command))
        return 0
    parsed = _flags(command)
    try:
        arguments = parsed([name, *rest])[1:]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split()) + f"; see tfloop {name} --help") from None
    except UnicodeDecodeError:
        raise UserError("--flagfile: not a text file") from None
    if arguments and not command.arguments:
        raise UserError(f"{name} takes flags only, found '{arguments[0]}'; a flag begins with --")
    given = {field: parsed[field].value for field in command.settings if parsed[field].present}
    values = Config.read(parsed["config"].value) if "config" in parsed and parsed["config"].present else {}
    values = {name: value for name, value in values.items() if name in command.settings or name not in FIELDS}
    config = Config.make(**{**values, **given})
    return command.function(config, {option: parsed[option].value for option in command.options} | {"given": given}, arguments)


def _flags(command: Command) -> flags.FlagValues:
    """The command's flags, every one unset. Values stay text: Config.make checks them, wherever they come from."""
    values = flags.FlagValues()
    flags.DEFINE_string("flagfile", None, "a file of flags, one a line", flag_values=values)
    for name in command.settings:
        define = flags.DEFINE_boolean if kind(name)[0] is bool else flags.DEFINE_string
        define(name, None, FIELDS[name].metadata["help"], flag_values=values)
    if "preset" in command.settings:
        flags.DEFINE_string("config", None, "a config.json to start from", flag_values=values)
    for name, (default, help) in command.options.items():
        define = flags.DEFINE_boolean if isinstance(default, bool) else flags.DEFINE_string
        define(name, default, help, flag_values=values)
    return values


def _overview() -> str:
    lines = [f"tfloop {__version__}: a TensorFlow 2 training loop that one can read, step through, reset and measure.", "",
             "usage: tfloop COMMAND [--flag=value …]", ""]
    lines += [f"  {name:16} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(lines + ["", "tfloop COMMAND --help lists its flags. Presets: " + ", ".join(PRESETS) + "."])


def _help(name: str, command: Command) -> str:
    lines = [f"usage: tfloop {name} {command.arguments}{' ' * bool(command.arguments)}[--flag=value …]",
             f"  {command.help}"]
    for option, (default, help) in command.options.items():
        lines += ["", "this command"] if option == next(iter(command.options)) else []
        lines.append(_flag_line(option, default, help))
    for group, names in GROUPS.items():
        names = [field for field in names if field in command.settings]
        lines += ["", group] if names else []
        lines += [_flag_line(field, FIELDS[field].default, help_text(field)) for field in names]
    lines += ["", "files", _flag_line("flagfile", "", "a file of flags, one a line")]
    if "preset" in command.settings:
        lines.append(_flag_line("config", "", "start from a config.json"))
    return "\n".join(lines)


def help_text(name: str) -> str:
    """A setting's help with the values it may take."""
    metadata = FIELDS[name].metadata
    choices = ", ".join(PRESETS) if name == "preset" else ", ".join(metadata["choices"])
    return metadata["help"] + (f" ({choices})" if choices else "")


def flag(name: str, default) -> str:
    """`--name=default` as one would type it."""
    if isinstance(default, bool):
        return f"--[no]{name}"
    return f"--{name}={','.join(map(str, default)) if isinstance(default, tuple) else '' if default is None else default}"


def _flag_line(name: str, default, help: str) -> str:
    suffix = f" [{'on' if default else 'off'}]" if isinstance(default, bool) else ""
    return f"  {flag(name, default):28} {help}{suffix}"
