"""One side of a comparison: a run that is trained again in a process of its own.

Each side has its own device, threads and versions of TensorFlow's settings, so two sides are two
processes. The one that compares sends the name of a method and its arguments, and gets the answer.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from socket import socketpair
from typing import Any, NamedTuple

import numpy as np

from tfloop.config import Config
from tfloop.errors import DivergenceError, UserError
from tfloop.history.records import Records

# What is looked at of a step, in the order in which it is computed.
KINDS = ("weights", "batch", "activation", "loss", "gradient", "update", "weights after")


class Part(NamedTuple):
    """One array of a step."""

    kind: str  # of KINDS
    name: str
    digest: bytes


_SERVE = """
import signal, sys
from tfloop.machine.guardian import end_with
end_with(int(sys.argv[2]), signal.SIGKILL)
from tfloop.history.side import serve
serve(int(sys.argv[1]))
"""


class Side:
    """The process of one side. Use it in a `with` block."""

    def __init__(self, folder: str, given: dict[str, Any], changes: dict[str, Any]) -> None:
        """Start it.

        Args:
          folder: of the run.
          given: of `Records.trained_by`.
          changes: settings in place of the run's own, whatever they change.
        """
        ours, theirs = socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._connection.send((folder, given, changes))

    def ask(self, method: str, *arguments: Any) -> None:
        """Have it do something; `answer` waits for what it gives."""
        self._connection.send((method, arguments))

    def answer(self) -> Any:
        """What the last question gives.

        Raises:
          UserError: it cannot be done, or the process died.
        """
        try:
            is_good, value = self._connection.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            raise UserError(f"the process that trains the run again ended with {code}") from None
        if not is_good:
            raise UserError(value)
        return value

    def do(self, method: str, *arguments: Any) -> Any:
        """`ask`, and its answer."""
        self.ask(method, *arguments)
        return self.answer()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: Any) -> None:
        self._connection.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def both(sides: "tuple[Side, Side]", method: str, *arguments: Any) -> tuple[Any, Any]:
    """What two sides answer, which they work out at the same time."""
    for side in sides:
        side.ask(method, *arguments)
    first, second = (side.answer() for side in sides)
    return first, second


def serve(number: int) -> None:
    """Answer questions until nobody asks any more; what this process does is `Answers`."""
    connection = Connection(number)
    answers: Answers | None = None
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        folder, given, changes = connection.recv()
        while True:
            method, arguments = connection.recv()
            try:
                answers = answers or Answers(folder, given, changes)
                value = (True, getattr(answers, method)(*arguments))
            except (UserError, DivergenceError) as error:
                value = (False, error.as_flags)
            except Exception as error:
                value = (False, f"{type(error).__name__}: {str(error).splitlines()[0]}")
            connection.send(value)
    os._exit(0)  # TensorFlow's threads need not be waited for


class Answers:
    """What a side can be asked."""

    def __init__(self, folder: str, given: dict[str, Any], changes: dict[str, Any]) -> None:
        """Arguments as those of `Side`."""
        from tfloop.machine import devices

        records = Records(folder)
        config: Config = records.trained_by(given)
        if changes:
            free = {"shards": 0, "intra_op_threads": 0, "inter_op_threads": 0}
            # On another device threads and shards are chosen anew.
            config = config.replace(**(free if "device" in changes else {}), **changes)
        self.config, self.device, _ = devices.start(config)
        from tfloop.history.replay import Replay

        self._replay = Replay(records, self.config, device=self.device, is_changed=bool(changes))
        self._mark: dict[str, np.ndarray] = {}
        self._parts: dict[tuple[str, str], np.ndarray] = {}

    def about(self) -> dict[str, Any]:
        """Device, fingerprint of the data, and the weights' names and shapes."""
        loop = self._replay.loop
        return {
            "device": self.device,
            "fingerprint": loop.data.fingerprint,
            "weights": {name: tuple(w.shape) for name, w in loop.state.weights.items()},
            "steps_per_epoch": loop.steps,
            "elsewhere": self._replay.elsewhere,
        }

    def begin(self, step: int, path: Any) -> str:
        """Go to a checkpoint, or without one to the start; the digest there."""
        self._replay.begin(step, path)
        return self.digest()

    def to(self, step: int) -> tuple[str, float]:
        """Train until this is the next step: (the digest there, the loss of the last call).

        Where a step diverges, the digest says at which, and the loss is NaN.
        """
        loss = float("nan")
        try:
            for call in self._replay.calls(step):
                loss = call.train.total
        except DivergenceError as error:
            return f"diverged at step {error.step}", float("nan")
        return self.digest(), loss

    def digest(self) -> str:
        """Of weights and moving averages."""
        return self._replay.loop.state.digest("weights", "moving")

    def mark(self) -> None:
        """Remember the state."""
        self._mark = {name: v.numpy() for name, v in self._replay.loop.state.named().items()}

    def back(self) -> None:
        """Go back to what was remembered."""
        self._replay.back_to(self._mark)

    def weights(self) -> dict[str, np.ndarray]:
        """All weights and moving averages."""
        state = self._replay.loop.state
        return {n: v.numpy() for n, v in {**state.weights, **state.non_trainable}.items()}

    def look(self) -> list[Part]:
        """What the next step computes, part by part; the state is then as it was."""
        from tfloop.history.looking import look

        self._parts = look(self._replay)
        return [Part(*key, _sum(array)) for key, array in self._parts.items()]

    def part(self, kind: str, name: str) -> np.ndarray:
        """One array of the last `look`."""
        return self._parts[kind, name]


def _sum(array: np.ndarray) -> bytes:
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).digest()
