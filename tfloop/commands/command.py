"""What a command is, and what commands share. TensorFlow is imported when a command needs it."""

import time

STARTED = time.perf_counter()

import signal  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import NamedTuple  # noqa: E402

from tfloop.config import FIELDS, GROUPS, Config  # noqa: E402
from tfloop.errors import UserError  # noqa: E402

FAILED, TERMINATED = 1, 143  # exit codes: a check failed; as after SIGTERM


class Command(NamedTuple):
    function: Callable[[Config, dict, list[str]], int]
    help: str
    arguments: str = ""
    settings: tuple[str, ...] = tuple(FIELDS)  # the fields of Config that it takes as flags
    options: dict[str, tuple] = {}  # flags of its own: name → (default, help)


WHERE = ("device", "intra_op_threads", "inter_op_threads", "memory_growth", "memory_limit", "log_device_placement",
         "tensorflow_log")
MANY = ("strategy", "replicas", "worker_timeout")
HOW = tuple(name for name in FIELDS  # and how it learns
            if name not in (*GROUPS["looking inside"], *GROUPS["what is written"], *MANY))
ALONE = tuple(name for name in HOW if name != "ensemble")
MODEL = tuple(name for group in ("start from", "data", "model") for name in GROUPS[group])
BEST = "the checkpoint that did best on the validation images, not the newest"


def start(config: Config) -> tuple[Config, str]:
    """(the settings with what they leave to the machine decided, the device's name), and TensorFlow set up for them."""
    from tfloop import devices

    return devices.start(config)[:2]


def warn(message: str) -> None:
    print(f"tfloop: {message}", file=sys.stderr)


def one(arguments: list[str], name: str, what: str) -> str:
    if len(arguments) != 1:
        raise UserError(f"expected {name}, {what}; found {len(arguments)} argument{'s' * (len(arguments) != 1)}")
    return arguments[0]


def some(arguments: list[str]) -> list[str]:
    if not arguments or "" in arguments:
        raise UserError("expected RUN, one or several folders with event files; found none")
    return arguments


def output(path: str):
    import contextlib

    if not path:
        return contextlib.nullcontext(sys.stdout)
    try:
        return open(path, "w", encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"--out={path}: cannot be written: {error.strerror}") from None


class Stop:
    """Ctrl-C or SIGTERM once asks the run to end after its current call, with a checkpoint; twice ends the program."""

    def __init__(self, listen: bool = True):
        self._signal = 0
        if listen:
            self.listen()

    def listen(self) -> None:
        """Take the signals, again where TensorFlow took them: with several workers it watches for SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM) if not self._signal else ():
            signal.signal(number, self._ask)

    def _ask(self, number: int, _) -> None:
        self._signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def asked(self) -> bool:
        return bool(self._signal)

    def code(self) -> int:
        """The exit code, as shells have it: 128 and the signal's number; 0 where nobody asked."""
        return 128 + self._signal if self._signal else 0
