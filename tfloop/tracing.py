"""tf.function that counts its traces, and says what changed when it is traced a second time."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfloop.stopping import interruptible, wait_for


class Traced:
    """A compiled function.

    Attributes:
      call: the function to call: compiled, or as it is where `eager`.
      traces: how often TensorFlow traced it; one is what a training loop wants.
    """

    def __init__(self, function: Callable, name: str, eager: bool = False, **options: Any) -> None:
        """Make one.

        Args:
          function: what to compile.
          name: what warnings call it.
          eager: run it as it is instead, in a debugger's reach; then `traces` stays 0.
          **options: of tf.function.
        """
        self.name, self.traces = name, 0
        self._function, self._eager, self._options = function, eager, options
        self._make()

    def _make(self) -> None:
        self._seen: list[str] | None = None
        # TensorFlow's own warning counts traces by code, whatever object they are of: a partial
        # has none.
        counted = functools.partial(self._trace)
        self.call: Any = self._function
        if not self._eager:
            self.call = tf.function(counted, autograph=False, **self._options)

    def begin(self, stays: bool, *arguments: Any) -> Any:
        """The first call, in which TensorFlow traces, and then optimizes, which may take long.

        Args:
          stays: it cannot be broken off, such as one that changes something.
          *arguments: of the function.
        """
        if self._eager:
            return self.call(*arguments)
        with interruptible():
            self.call.get_concrete_function(*arguments)
            if not stays:
                return wait_for(lambda: self.call(*arguments))
        return self.call(*arguments)

    def renew(self, reason: str = "") -> None:
        """Trace anew at the next call, and say why; without a reason the last trace failed."""
        if self._eager:
            return
        self._make()
        if not reason:
            self.traces -= 1
        elif self.traces:
            warnings.warn(f"{self.name} is traced again: {reason}", stacklevel=2)

    def _trace(self, *arguments: Any) -> Any:
        self.traces += 1
        described = [_describe(part) for part in tf.nest.flatten(arguments)]
        if self._seen is not None:
            reason = _changes(self._seen, described) or (
                "no argument changed its type: a Python value or a variable that it reads was "
                "replaced"
            )
            warnings.warn(f"{self.name} was traced again: {reason}", stacklevel=3)
        self._seen = described
        return self._function(*arguments)


def _changes(before: list[str], after: list[str]) -> str:
    pairs = enumerate(zip(before, after, strict=False), start=1)
    changed = [f"argument {i} was {old}, is {new}" for i, (old, new) in pairs if old != new]
    return "; ".join(changed)


def _describe(part: Any) -> str:
    if isinstance(part, tf.Tensor):
        return f"{part.dtype.name} {part.shape}"
    if hasattr(part, "element_spec"):
        specs = tf.nest.flatten(part.element_spec)
        return ", ".join(f"{spec.dtype.name} {spec.shape}" for spec in specs)
    return repr(part)
