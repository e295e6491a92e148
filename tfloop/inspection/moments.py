"""When a summary is written, and what it may look at.

Each summary is a function that is registered for the moments when it is written. To add one, write
its function in `dashboards` with `@summary`.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow as tf

from tfloop import models
from tfloop.config import FIELDS
from tfloop.loop import Loop
from tfloop.machine import arithmetic
from tfloop.machine.usage import Usage
from tfloop.nests import is_leaf, map_leaves
from tfloop.records import Call, Epoch, Evaluation

LEVELS = tuple(FIELDS["summaries"].choices)
Moment = Literal["start", "call", "evaluation", "epoch", "end"]


class Context:
    """What a summary may look at.

    Attributes:
      loop: whose records are written.
      folder: the run's own.
      settings: what is told of the run.
      step: the global step that the summary stands at.
      call: the last record of a compiled call; None before the first.
      epoch: the last record of an epoch; None before the first.
      evaluation: the last record of an evaluation, within an epoch or at its end; None before.
      usage: how busy the processors are.
      most: weights, and layers, that are shown one by one.
    """

    def __init__(self, loop: Loop, folder: Path, settings: Mapping[str, object]) -> None:
        self.loop, self.folder, self.settings = loop, folder, settings
        self.step = 0
        self._evaluated: tuple[int, Any] | None = None  # (step, outputs)
        self.call: Call | None = None
        self.epoch: Epoch | None = None
        self.evaluation: Evaluation | Epoch | None = None
        self.usage = Usage()
        self.most = int(str(settings.get("summary_tensors", FIELDS["summary_tensors"].default)))

    @functools.cached_property
    def flop(self) -> float | None:
        """Multiplications and additions of matrices in a step, as it was first traced."""
        return arithmetic.flop_per_step(self.loop)

    @functools.cached_property
    def peak(self) -> float:
        """Multiplications and additions a second of this machine's matmul."""
        return arithmetic.peak()

    def shown(self, names: Collection[str]) -> list[str]:
        """Those that get curves and histograms of their own: `most`, from the first to the last."""
        found = list(names)
        if len(found) <= self.most:
            return found
        places = np.linspace(0, len(found) - 1, self.most).round().astype(int)
        return [found[place] for place in places]

    def outputs(self) -> Any:
        """[test examples, …]: those of the last epoch, or of the present weights."""
        if self.epoch is not None and self.epoch.outputs is not None:
            return self.epoch.outputs
        if self._evaluated is None or self._evaluated[0] != self.step:
            outputs = self.loop.evaluate_with_outputs(self.loop.data.test)[1]
            self._evaluated = self.step, outputs
        return self._evaluated[1]

    def activations(self, inputs: Any) -> list[tuple[str, tf.Tensor]]:
        """(layer, activation) of inputs as they lie in the data."""
        state = self.loop.state
        inputs = state.standardize(map_leaves(tf.constant, inputs))
        seen = models.activations(state.model, inputs, as_logits=state.objective.as_logits)
        return [(name, value) for name, _, value in seen if is_leaf(value)]


class Registration(NamedTuple):
    """When a summary is written, into which run, and how it is made."""

    moment: Moment
    run: str  # "train", "test", "validation", or "" for the run's own folder
    levels: tuple[str, ...]
    needs_test: bool  # does it look at test images?
    make: Callable[[Context], Iterable[Any]]  # messages, TensorBoard's or TensorFlow's


REGISTERED: list[Registration] = []


def summary(
    moment: Moment,
    run: str = "train",
    levels: tuple[str, ...] = ("scalars", "default", "full"),
    needs_test: bool = False,
) -> Callable[[Callable], Callable]:
    """Register a function `Context → Summary messages`; a decorator.

    Args:
      moment: "start", after each compiled "call", each "evaluation" within an epoch, each "epoch",
        or at the "end".
      run: the TensorBoard run that it belongs to.
      levels: of `--summaries`, those with which it is written.
      needs_test: it is left out where the data have no test images.
    """

    def register(make: Callable[[Context], Iterable[Any]]) -> Callable:
        REGISTERED.append(Registration(moment, run, levels, needs_test, make))
        return make

    return register
