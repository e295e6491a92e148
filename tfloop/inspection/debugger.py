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

import keras
import tensorflow as tf

from tfloop import models
from tfloop import step as step_module
from tfloop.data.pipelines import Batch
from tfloop.errors import UserError
from tfloop.loop import Loop
from tfloop.metrics import Loss
from tfloop.state import TrainState
from tfloop.step import (
    Pass,
    accuracy,
    example_losses,
    losses,
    model_losses,
    train_step,
    weighted_mean,
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


class Layer(NamedTuple):
    """One layer on the way back."""

    name: str
    activation: tf.Tensor  # what the layer gave
    upstream: tf.Tensor  # the gradient of the data loss by it
    gradients: dict[str, Gradient]  # by weight: "conv1/kernel"
    updates: dict[str, tf.Tensor]  # what the optimizer would add to each weight


class _Recording(NamedTuple):
    """A forward pass and its loss, on a tape that can be asked more than once."""

    images: tf.Tensor
    activations: dict[str, tf.Tensor]
    loss: Loss
    tape: tf.GradientTape

    @property
    def logits(self) -> tf.Tensor:
        return list(self.activations.values())[-1]


def record(
    state: TrainState, batch: Batch, part: tf.Tensor | int = 0, parts: int = 1
) -> _Recording:
    """Forward, layer by layer, and the loss, term by term. Changes nothing but moving averages."""
    key = state.key(part, parts)
    images, sample_weight = state.inputs(batch.images, key), batch.sample_weight
    activations = {}
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(images)
        forward = models.activations(state.model, images, sample_weight, training=True, key=key)
        for layer, activation in forward:
            activations[layer] = activation
        logits = activation
        each = example_losses(state, batch.labels, logits)
        loss = losses(state, weighted_mean(each, sample_weight), model_losses(state))
    return _Recording(images, activations, loss, tape)


def walk_back(
    state: TrainState, recording: _Recording
) -> Iterator[tuple[str, tf.Tensor, dict[str, Gradient]]]:
    """Yields (layer, upstream gradient, gradients by weight) from the last layer to the first."""
    images, activations, loss, tape = recording
    layers = list(activations)
    upstream = tape.gradient(loss.data, recording.logits)
    for index in reversed(range(len(layers))):
        layer, activation = layers[index], activations[layers[index]]
        inputs = activations[layers[index - 1]] if index else images
        weights = _weights_of(state, index)
        below, data = tape.gradient(activation, (inputs, weights), upstream, ZERO)
        gradients = {name: split(state, recording, name, data[name]) for name in weights}
        yield layer, upstream, gradients
        upstream = below


def _weights_of(state: TrainState, index: int) -> dict[str, tf.Variable]:
    """The weights of the layer with this index; all, where the model is no stack of layers."""
    if not isinstance(state.model, keras.Sequential):
        return state.weights
    variables = state.model.layers[index].trainable_variables
    of_the_layer = {id(variable.value) for variable in variables}
    return {name: weight for name, weight in state.weights.items() if id(weight) in of_the_layer}


def split(state: TrainState, recording: _Recording, name: str, data: tf.Tensor) -> Gradient:
    """The gradient by one weight: what the data contributed, and what each penalty did."""
    loss, tape, weight = recording.loss, recording.tape, state.weights[name]
    l1, l2, custom, model = (
        tape.gradient(term, weight, unconnected_gradients=ZERO)
        for term in (loss.l1, loss.l2, loss.custom, loss.model)
    )
    return Gradient(data + l1 + l2 + custom + model, data, l1, l2, custom, model)


def forward_and_backward(
    state: TrainState, batch: Batch, part: tf.Tensor | int = 0, parts: int = 1
) -> Pass:
    """The twin of `step.forward_and_backward`: the same values, layer by layer.

    In float16 it goes without a loss scale.
    """
    recording = record(state, batch, part, parts)
    gradients = {}
    for layer, upstream, by_weight in walk_back(state, recording):  # noqa: B007 (to be printed)
        for name, gradient in by_weight.items():
            gradients[name] = gradient.total
    return Pass(
        recording.loss,
        accuracy(batch, recording.logits),
        tf.reduce_sum(batch.sample_weight),
        Vector.of({name: gradients[name] for name in state.weights}),
        recording.logits,
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
    totals = {}
    for _, _, by_weight in walk:
        totals.update({name: gradient.total for name, gradient in by_weight.items()})
    gradients = Vector.of({name: totals[name] for name in state.weights})
    learning_rate = state.schedule(state.schedule_step)
    updates, _ = state.optimizer.updates(gradients, state.weights, learning_rate)
    for layer, upstream, by_weight in walk:
        layer_updates = {name: updates[name] for name in by_weight}
        yield Layer(layer, recording.activations[layer], upstream, by_weight, layer_updates)


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

    return line_of("images, labels, sample_weight = batch"), line_of("valid = finite")


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
Names: images, labels, sample_weight, learning_rate; after the backward pass: logits, loss.data,
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

    def stopping(state: TrainState, batch: Batch) -> Pass:
        nonlocal has_stopped
        if not has_stopped:
            has_stopped = True
            # Step out of here for the step, or into the next line for the pass, layer by layer.
            breakpoint()
        return grad_fn(state, batch)

    return stopping
