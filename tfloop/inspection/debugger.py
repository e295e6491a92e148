"""Gradients that one can step through: the step layer by layer, and a pdb for it.

`backward` shows a batch's way back through the model. `forward_and_backward` is the twin of the one
in `step` that takes this way. `Debugger` stops in `step.train_step`, with everything it computes in
plain names, and stays in readable source.
"""

import functools
import inspect
import os
import pdb
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import tensorflow as tf

from tfloop import models
from tfloop import step as step_module
from tfloop.data.pipelines import Batch
from tfloop.errors import UserError
from tfloop.loop import Loop
from tfloop.metrics import Loss
from tfloop.nests import is_leaf, map_leaves
from tfloop.randomness import Part
from tfloop.state import TrainState
from tfloop.step import (
    Pass,
    data_loss,
    judged,
    losses,
    mean_over,
    model_losses,
    train_step,
)
from tfloop.vectors import Vector

ZERO = tf.UnconnectedGradients.ZERO


class Gradient(NamedTuple):
    """The gradient of the loss by one weight, term by term as in `Loss`; all of its shape."""

    total: tf.Tensor
    data: tf.Tensor
    l1: tf.Tensor
    l2: tf.Tensor
    custom: tf.Tensor
    model: tf.Tensor


Gradients = dict[str, Gradient | None]  # by weight: "conv1/kernel"; None where there is none


class Layer(NamedTuple):
    """One layer on the way back."""

    name: str
    activation: tf.Tensor  # what the layer gave
    upstream: tf.Tensor  # the gradient of the data loss by it
    gradients: Gradients  # None for a weight that the loss does not depend on
    updates: dict[str, tf.Tensor]  # what the optimizer would add to each weight


class _Recording(NamedTuple):
    """A forward pass and its loss, on a tape that can be asked more than once."""

    activations: list[models.Activation]
    outputs: Any  # what the loss was given
    loss: Loss
    accuracy: tf.Tensor
    more: tf.Tensor  # means of what else is summed up
    tape: tf.GradientTape


def record(state: TrainState, batch: Batch, part: Part | None = None) -> _Recording:
    """Forward, layer by layer, and the loss, term by term. Changes nothing but moving averages."""
    key = state.key(part)
    inputs, objective = state.prepared(batch.inputs, key), state.objective
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(list(state.weights.values()))
        activations = []
        for activation in models.activations(state.model, inputs, True, key, objective.as_logits):
            activations.append(activation)
        last = activations.pop()
        outputs = map_leaves(_as_float32, last.value) if objective.is_default else last.value
        if is_leaf(outputs):
            activations.append(last._replace(value=outputs))
        each, correct, more = judged(state, batch.targets, outputs)
        loss = losses(state, data_loss(batch, each), model_losses(state))
    accuracy, more = mean_over(batch, correct), mean_over(batch, more)
    return _Recording(activations, outputs, loss, accuracy, more, tape)


def _as_float32(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32)


def walk_back(
    state: TrainState, recording: _Recording
) -> Iterator[tuple[str, tf.Tensor, Gradients]]:
    """Yields (layer, upstream gradient, gradients by weight) from the last layer to the first.

    A weight comes with the last layer that uses it.
    """
    activations, loss, tape = recording.activations, recording.loss, recording.tape
    upstreams = tape.gradient(
        loss.data, [activation.value for activation in activations], None, ZERO
    )
    gradients, owners = all_gradients(state, recording), _owners(state, activations)
    for place in reversed(range(len(activations))):
        own = {name: gradients[name] for name, owner in owners.items() if owner == place}
        yield activations[place].name, upstreams[place], own


def _owners(state: TrainState, activations: list[models.Activation]) -> dict[str, int]:
    """Each trainable weight → the place of the layer that it belongs to; the last, if of none."""
    names = {id(weight): name for name, weight in _trainable(state).items()}
    owners: dict[str, int] = {}
    # Layers that call others come after those: what is left is theirs.
    for leaves_first in (True, False):
        for place, (_, layer, _) in enumerate(activations):
            if models.is_leaf(layer) != leaves_first:
                continue
            for variable in getattr(layer, "trainable_variables", ()):
                name = names.get(id(models.as_tf_variable(variable)))
                if name and (leaves_first or name not in owners):
                    owners[name] = place
    last = len(activations) - 1
    return {name: owners.get(name, last) for name in names.values()}


def _trainable(state: TrainState) -> dict[str, tf.Variable]:
    """The weights that are trained, and those that would be if they had a gradient."""
    left_out = {name: state.non_trainable[name] for name in state.without_gradient}
    return {**state.weights, **left_out}


def all_gradients(state: TrainState, recording: _Recording) -> Gradients:
    """By weight what the data contributed, and what each penalty did; None without a gradient."""
    loss, tape = recording.loss, recording.tape
    terms = {
        term: tape.gradient(getattr(loss, term), state.weights)
        for term in ("data", "l1", "l2", "custom", "model")
    }
    found: Gradients = dict.fromkeys(_trainable(state))
    for name, weight in state.weights.items():
        by_term = {term: gradients[name] for term, gradients in terms.items()}
        if by_term["data"] is None and by_term["model"] is None:
            continue
        parts = {
            term: tf.zeros_like(weight) if gradient is None else tf.convert_to_tensor(gradient)
            for term, gradient in by_term.items()
        }
        total = parts["data"] + parts["l1"] + parts["l2"] + parts["custom"] + parts["model"]
        found[name] = Gradient(total, **parts)
    return found


def _vector(state: TrainState, gradients: Gradients) -> Vector:
    totals = {
        name: None if (gradient := gradients[name]) is None else gradient.total
        for name in state.weights
    }
    return Vector.of(state.connected(totals))


def forward_and_backward(state: TrainState, batch: Batch, part: Part | None = None) -> Pass:
    """The twin of `step.forward_and_backward`: the same values, layer by layer.

    In float16 it goes without a loss scale.
    """
    recording = record(state, batch, part)
    gradients = {}
    for layer, upstream, by_weight in walk_back(state, recording):  # noqa: B007 (to be printed)
        for name, gradient in by_weight.items():
            gradients[name] = gradient
    return Pass(
        recording.loss,
        recording.accuracy,
        tf.reduce_sum(batch.counts),
        _vector(state, gradients),
        recording.more,
        recording.outputs,
    )


def backward(state: TrainState, batch: Batch) -> Iterator[Layer]:
    """A batch's way back through the model, from the last layer to the first.

    Changes nothing but moving averages. The sum of each gradient's terms is what the step applies.

    Example:
      >>> for layer in tfloop.debug.backward(loop.state, loop.batch(0)):
      ...     for name, gradient in layer.gradients.items():
      ...         print(name, float(tf.norm(gradient.data)), float(tf.norm(gradient.l2)))
    """
    recording = record(state, batch)
    walk = list(walk_back(state, recording))
    totals = {name: g for _, _, by_weight in walk for name, g in by_weight.items()}
    learning_rate = state.schedule(state.schedule_step)
    updates, _ = state.optimizer.updates(_vector(state, totals), state.weights, learning_rate)
    back = zip(reversed(recording.activations), walk, strict=True)
    for (_, _, activation), (layer, upstream, by_weight) in back:
        layer_updates = {name: updates[name] for name in by_weight if name in state.weights}
        yield Layer(layer, activation, upstream, by_weight, layer_updates)


class Debugger(pdb.Pdb):
    """A pdb that stops at the step's first line and once more before its update.

    It stays in your source and tfloop's: `s` steps into functions there, and over those of
    TensorFlow, Keras and Python.
    """

    def __init__(
        self, at: int | None = None, condition: str = "", on_nan: bool = False, **options: Any
    ) -> None:
        """With none of the three conditions it stops at every step.

        Args:
          at: stop at one step alone, the first that runs under this debugger.
          condition: a Python expression in the names of `train_step`; stop before the update where
            it holds.
          on_nan: stop before the update where the loss, a gradient or an update is not finite.
          **options: of pdb.Pdb.
        """
        super().__init__(nosigint=True, **options)
        self.prompt, self._is_running = "(tfloop) ", False
        file, (first, update) = step_module.__file__, _lines()
        if condition or on_nan:
            self.set_break(file, update, cond=condition or "not bool(finite)")
            return
        for line in (first, update):
            self.set_break(file, line, temporary=at is not None)

    def stop_here(self, frame: FrameType) -> bool:
        return _is_readable(frame.f_code.co_filename) and super().stop_here(frame)

    def user_call(self, frame: FrameType, arguments: Any) -> None:
        if not self._begin():
            super().user_call(frame, arguments)

    def user_line(self, frame: FrameType) -> None:
        if not self._begin():
            super().user_line(frame)

    def _begin(self) -> bool:
        """Go on to the first breakpoint in place of stopping where tracing begins."""
        if self._is_running:
            return False
        self._is_running = True
        self.set_continue()
        return True


def _lines() -> tuple[int, int]:
    """Lines of step.py: the first of train_step's body, and that where only the update is left."""
    source, start = inspect.getsourcelines(train_step)

    def line_of(text: str) -> int:
        return start + next(i for i, line in enumerate(source) if line.strip().startswith(text))

    return line_of("inputs, targets, sample_weight = batch"), line_of("valid = finite")


@functools.cache
def _is_readable(filename: str) -> bool:
    """Is this source of tfloop, or of the user: neither installed nor Python's own?"""
    if filename.startswith("<"):
        return False
    path = Path(os.path.realpath(filename))
    ours = Path(os.path.realpath(step_module.__file__)).parent
    stdlib = Path(os.path.realpath(sysconfig.get_path("stdlib")))
    is_installed = {"site-packages", "dist-packages"} & set(path.parts) or stdlib in path.parents
    return ours in path.parents or not is_installed


def check_condition(condition: str, loop: Loop) -> None:
    """Try an expression on the first batch, before hours of training do.

    Raises:
      UserError: it is no expression, or uses a name that the step does not have.
    """
    state, batch = loop.state, loop.batch(0)
    before = [variable.numpy() for variable in state.non_trainable.values()]
    result = step_module.forward_and_backward(state, batch)
    learning_rate = state.schedule(state.schedule_step)
    updates, slots = state.optimizer.updates(result.gradients, state.weights, learning_rate)
    for variable, value in zip(state.non_trainable.values(), before, strict=True):
        variable.assign(value)
    names = {
        "state": state,
        "batch": batch,
        **batch._asdict(),
        **result._asdict(),
        "updates": updates,
        "slots": slots,
        "learning_rate": learning_rate,
        "finite": tf.constant(True),
    }
    try:
        code = compile(condition, "--break_if", "eval")
        bool(eval(code, vars(step_module), names))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        known = ", ".join(names)
        raise UserError(f"--break_if={condition}: {reason}; the names are {known}") from None


HELP = """\
{where}. n: next line, s: step into, c: go on to the update, then to the next stop, q: quit.
Names: inputs, targets, sample_weight, learning_rate; after the backward pass: outputs, loss.data,
loss.l1, loss.l2, gradients["{name}"], gradients.norm; then updates["{name}"], slots."""


def run(
    loop: Loop,
    epochs: int,
    at: int | None = None,
    condition: str = "",
    on_nan: bool = False,
    **options: Any,
) -> bool:
    """Train `loop`, one step a call, under the Debugger; false where somebody quit.

    Args:
      loop: an eager one.
      epochs: as of Loop.run.
      at, condition, on_nan, **options: as of Debugger.
    """
    if condition:
        check_condition(condition, loop)
    debugger = Debugger(at, condition, on_nan, **options)
    where = _where(at, condition, on_nan)
    debugger.message(HELP.format(where=where, name=next(iter(loop.state.weights))))
    records = loop.run(epochs)
    if at and not any(record.step >= at for record in records):  # up to there at full speed
        steps = int(loop.state.global_step)
        debugger.message(f"step {at} was not reached: the run has {steps} steps")
        return True
    is_finished = False

    def rest() -> None:
        nonlocal is_finished
        for _ in records:
            pass
        is_finished = True

    debugger.runcall(rest)  # which swallows pdb's own way out
    return is_finished


def _where(at: int | None, condition: str, on_nan: bool) -> str:
    if at is not None:
        return f"Stops once, at step {at}"
    if condition:
        return f"Stops before the update where {condition}"
    if on_nan:
        return "Stops before the update where a value is not finite"
    return "Stops at every step"


def is_under_another_debugger() -> bool:
    """Does an editor's debugger, such as that of VS Code, run this process?"""
    return "debugpy" in sys.modules and sys.modules["debugpy"].is_client_connected()


def stop_once(grad_fn: Callable) -> Callable:
    """`grad_fn`, which calls breakpoint() the first time, so that an editor's debugger stops."""
    has_stopped = False

    def stopping(state: TrainState, batch: Batch, part: Part | None = None) -> Pass:
        nonlocal has_stopped
        if not has_stopped:
            has_stopped = True
            # Step out of here for the step, or into the next line for the pass, layer by layer.
            breakpoint()
        return grad_fn(state, batch, part)

    return stopping
