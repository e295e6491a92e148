"""What a command is, and what commands share. TensorFlow is imported when a command needs it."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from tfloop import stopping
from tfloop.config import FIELDS, GROUPS, Config
from tfloop.errors import UserError
from tfloop.settings import COUNT, LARGEST, SMALLEST, whole
from tfloop.wording import counted, without_controls

STARTED = time.perf_counter()  # when the program began, but for the imports above
FAILED, TERMINATED = 1, 143  # exit codes: a check failed; as after SIGTERM
TOPICS = ("train", "use", "look", "search", "check", "cluster")


class Command(NamedTuple):
    """A command.

    Attributes:
      function: (settings, its own options, arguments) → exit code.
      help: one line.
      topic: one of TOPICS, by which commands are listed.
      arguments: what it takes beside flags, as help shows it.
      settings: the fields of Config that it takes as flags.
      options: flags of its own: name → (default, help).
    """

    function: Callable[[Config, dict[str, Any], list[str]], int]
    help: str
    topic: str
    arguments: str = ""
    settings: Sequence[str] = tuple(FIELDS)
    options: dict[str, tuple[Any, str]] = {}  # noqa: RUF012 (never changed)


# Settings that commands take: what TensorFlow runs on; several processes; what and how it learns;
# the same for one model; which model.
WHERE = (
    "device",
    "intra_op_threads",
    "inter_op_threads",
    "memory_growth",
    "memory_limit",
    "log_device_placement",
    "tensorflow_log",
)
SEVERAL = ("strategy", "replicas", "worker_timeout")
_NOT_HOW = {*GROUPS["looking inside"], *GROUPS["what is written"], *SEVERAL}
HOW = tuple(name for name in FIELDS if name not in _NOT_HOW)
ALONE = tuple(name for name in HOW if name != "ensemble")
MODEL = tuple(name for group in ("start from", "data", "model") for name in GROUPS[group])
CODE_OPTIONS = {
    "model": ("", "FILE.py:function, where the run's own file is no longer where it was"),
    "loss": ("", "the same of its loss"),
    "metrics": ("", "the same of its metrics"),
}
RUN_CODE = {**CODE_OPTIONS, "dataset": ("", "the same of its data")}  # to train it again
BEST = (False, "the checkpoint that did best on the validation images, not the newest")


def without(settings: Sequence[str], *names: str) -> tuple[str, ...]:
    """The settings, less these."""
    return tuple(name for name in settings if name not in names)


def start(config: Config) -> tuple[Config, str]:
    """Set TensorFlow up.

    Returns:
      (the settings with what they leave to the machine decided, the device's name).
    """
    from tfloop.machine import devices

    return devices.start(config)[:2]


def warn(message: str) -> None:
    print(f"tfloop: {without_controls(message)}", file=sys.stderr)


def one_argument(arguments: list[str], name: str, what: str) -> str:
    """The only argument.

    Raises:
      UserError: there is none, or there are several.
    """
    if len(arguments) != 1:
        found = counted(len(arguments), "argument")
        raise UserError(f"expected {name}, {what}; found {found}")
    return arguments[0]


def run_folders(arguments: list[str]) -> list[str]:
    """The arguments, of which there must be one at least.

    Raises:
      UserError: there is none.
    """
    if not arguments or "" in arguments:
        raise UserError("expected RUN, one or several folders with event files; found none")
    return arguments


def whole_number(options: dict[str, Any], name: str, least: int) -> int:
    """An option's value.

    Raises:
      UserError: it is no whole number, or less than `least`.
    """
    text = options[name]
    number = whole(text)
    if number is None or number < least:
        raise UserError(
            f"--{name}={text}: expected a whole number, {least} or more, at most {COUNT[1]}"
        )
    return number


def number_of_steps(options: dict[str, Any]) -> int:
    """The value of --steps.

    Raises:
      UserError: it is no number of steps.
    """
    if number := whole(options["steps"]):
        return number
    raise UserError(
        f"--steps={options['steps']}: expected a number of steps, 1 or more, at most {COUNT[1]}"
    )


def positive_rate(options: dict[str, Any], name: str) -> float:
    """An option's value.

    Raises:
      UserError: it is no learning rate above 0.
    """
    try:
        rate = float(options[name])
    except ValueError:
        rate = math.nan
    if not SMALLEST <= rate <= LARGEST:
        range_text = f"from {SMALLEST:.2g} to {LARGEST:.2g}, as float32 has them"
        raise UserError(f"--{name}={options[name]}: expected a rate above 0, {range_text}")
    return rate


def one_of(options: dict[str, Any], name: str, choices: Sequence[str]) -> str:
    """An option's value.

    Raises:
      UserError: it is none of the choices.
    """
    value = options[name]
    if value not in choices:
        raise UserError(f"--{name}={value} is unknown; choose from {', '.join(choices)}")
    return value


def curves_only(config: Config, options: dict[str, Any]) -> Config:
    """--summaries=scalars, where nothing else was asked for: many runs write many pictures."""
    is_default = config.summaries == FIELDS["summaries"].default
    if is_default and "summaries" not in options["given"]:
        return config.replace(summaries="scalars")
    return config


@contextlib.contextmanager
def output(path: str) -> Iterator[IO[str]]:
    """The file to write to, which is there once all is written; standard output without a path.

    Raises:
      UserError: it cannot be written.
    """
    if not path:
        yield sys.stdout
        return
    is_plain = Path(path).is_file() or not Path(path).exists()  # and no pipe or device
    target = Path(os.path.realpath(path)) if is_plain else Path(path)
    partial = target.with_name(f"{target.name}.partial") if is_plain else target
    try:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            yield file
        partial.replace(target)
    except BaseException as error:
        if is_plain:
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"--out={path}: cannot be written: {error.strerror}") from None
        raise


class Stop:
    """Ctrl-C, SIGTERM or SIGHUP once asks the run to end soon, with a checkpoint.

    As long as nobody has called `asked`, no run has begun, and the signal raises StopAsked. Asking
    again ends the program; what comes at the same time, as SIGHUP with SIGTERM, is one question.
    """

    def __init__(self, listen: bool = True) -> None:
        self._signal, self._has_begun, self._is_alone = 0, False, True
        self._asked_at = 0.0
        if listen:
            self.listen()

    def listen(self, is_alone: bool = True) -> None:
        """Take the signals.

        Again where TensorFlow took them: with several workers it watches for SIGTERM.

        Args:
          is_alone: unset, other workers train along, and all end at the same place: nothing is
            broken off.
        """
        self._is_alone = is_alone
        if not self._signal:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
                    signal.signal(number, self._ask)

    def _ask(self, number: int, _: Any) -> None:
        if self._signal:
            is_again = time.monotonic() - self._asked_at > stopping.AT_ONCE
            if is_again and number != signal.SIGHUP:  # a terminal that closes may say that twice
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._signal, self._asked_at = number, time.monotonic()
        if self._is_alone and (not self._has_begun or stopping.is_interruptible()):
            stopping.break_off(number)

    def asked(self) -> bool:
        self._has_begun = True
        return bool(self._signal)

    def code(self) -> int:
        """The exit code, as shells have it: 128 and the signal's number; 0 where nobody asked."""
        return 128 + self._signal if self._signal else 0
