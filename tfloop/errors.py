"""What can go wrong, in one line that names the thing, what was found, and what to do.

A message writes a setting as its flag, `--l2=-1`. In Python it reads as an argument, `l2=-1`; the
command line prints `as_flags`. What stands between backticks is a command and stays as it is.
"""

import re
from typing import Any

_FLAG_OR_COMMAND = re.compile(r"(`[^`]*`)|(?<![\w-])--(?=[a-z])")
_VERY_LONG = re.compile(r"([^\s/]{100})[^\s/]{200,}")


def as_arguments(message: str) -> str:
    """The message with arguments in place of flags: "--l2=-1" → "l2=-1"."""
    return _FLAG_OR_COMMAND.sub(lambda match: match[1] or "", message)


class UserError(ValueError):
    """A mistake in the input: an argument, a flag, a file, a combination of them.

    The command line prints it and exits with 2.

    Attributes:
      as_flags: the message as the command line prints it.
    """

    def __init__(self, message: str) -> None:
        # One line, whatever the input held; no name of a file is as long as what is cut.
        self.as_flags = _VERY_LONG.sub(r"\1 …", message.replace("\n", " "))
        super().__init__(as_arguments(self.as_flags))


class WorkerLost(RuntimeError):
    """Another process of the cluster is gone. The command line prints it and exits with 4."""

    def __init__(self, message: str) -> None:
        self.as_flags = message
        super().__init__(as_arguments(message))


class DivergenceError(ArithmeticError):
    """The loss or a gradient became NaN or infinite. The command line prints it and exits with 3.

    Attributes:
      step: global step at which it happened. That step's update was not made, so the weights are
        the last good ones.
      layer: name of the first layer whose weights, activations or gradients are not finite.
    """

    def __init__(self, message: str, step: int, layer: str) -> None:
        self.as_flags = message
        super().__init__(as_arguments(message))
        self.step, self.layer = step, layer


class WithoutGradient(Exception):
    """The loss does not depend on some weights. Raised and caught while a step is traced.

    Attributes:
      state: whose weights.
      names: of the weights.
    """

    def __init__(self, state: Any, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.state, self.names = state, names
