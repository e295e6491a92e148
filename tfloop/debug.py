"""Gradients that one can step through: the step layer by layer, and a pdb that stays in readable source.

`backward` shows a batch's way back through the model; `forward_and_backward` is the twin of the one in `step` that
takes this way; `Debugger` stops in `step.train_step`, with everything it computes in plain names.
"""

import functools
import inspect
import os
import pdb
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import keras
import tensorflow as tf

from tfloop import models
from tfloop import step as step_module
from tfloop.errors import UserError
from tfloop.optimizers import Vector
from tfloop.pipelines import Batch
from tfloop.state import TrainState
from tfloop.step import Loss, Pass, example_losses, hit_rate, losses, model_losses, train_step


class Gradient(NamedTuple):
    """The gradient of the loss by one weight, term by term as in `Loss`; all of the weight's shape."""

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


def record(state: TrainState, batch: Batch, part: tf.Tensor | int = 0, parts: int = 1) -> _Recording:
    """Forward, layer by layer, and the loss, term by term. Changes nothing but moving averages."""
    key = state.key(part, parts)
    images = state.inputs(batch.images, key)
    activations = {}
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(images)
        for layer, activation in models.forward(state.model, images, batch.weights, training=True, key=key):
            activations[layer] = activation
        logits = activation
        each = example_losses(state, batch.labels, logits)
        data_loss = tf.math.divide_no_nan(tf.reduce_sum(batch.weights * each), tf.reduce_sum(batch.weights))
        loss = losses(state, data_loss, model_losses(state))
    return _Recording(images, activations, loss, tape)


def walk_back(state: TrainState, recording: _Recording) -> Iterator[tuple[str, tf.Tensor, dict[str, Gradient]]]:
    """Yields (layer, upstream gradient, gradients by weight) from the last layer to the first."""
    images, activations, loss, tape = recording
    layers = list(activations)
    upstream = tape.gradient(loss.data, recording.logits)
    for index in reversed(range(len(layers))):
        layer, activation = layers[index], activations[layers[index]]
        inputs = activations[layers[index - 1]] if index else images
        weights = _weights_of(state, index)
        below, data = tape.gradient(activation, (inputs, weights), upstream, tf.UnconnectedGradients.ZERO)
        yield layer, upstream, {name: split(state, recording, name, data[name]) for name in weights}
        upstream = below


def _weights_of(state: TrainState, index: int) -> dict[str, tf.Variable]:
    """The weights of the layer with this index; all, where the model is no stack of layers."""
    if not isinstance(state.model, keras.Sequential):
        return state.weights
    own = {id(variable.value) for variable in state.model.layers[index].trainable_variables}
    return {name: weight for name, weight in state.weights.items() if id(weight) in own}


def split(state: TrainState, recording: _Recording, name: str, data: tf.Tensor) -> Gradient:
    """The gradient by one weight: what the data contributed, and what each penalty did."""
    loss, tape, weight = recording.loss, recording.tape, state.weights[name]
    l1, l2, custom, model = (tape.gradient(term, weight, unconnected_gradients=tf.UnconnectedGradients.ZERO)
                             for term in (loss.l1, loss.l2, loss.custom, loss.model))
    return Gradient(data + l1 + l2 + custom + model, data, l1, l2, custom, model)


def forward_and_backward(state: TrainState, batch: Batch, part: tf.Tensor | int = 0, parts: int = 1) -> Pass:
    """The twin of `step.forward_and_backward`: the same loss, logits and gradients, layer by layer (in float16 without a loss scale)."""
    recording = record(state, batch, part, parts)
    gradients = {}
    for layer, upstream, found in walk_back(state, recording):
        for name, gradient in found.items():
            gradients[name] = gradient.total
    return Pass(recording.loss, hit_rate(batch, recording.logits), tf.reduce_sum(batch.weights),
                Vector.of({name: gradients[name] for name in state.weights}), recording.logits)


def backward(state: TrainState, batch: Batch) -> Iterator[Layer]:
    """A batch's way back through the model, from the last layer to the first. Changes nothing but moving averages.

    The sum of each gradient's terms is what the step applies.

    Example:
      >>> for layer in tfloop.debug.backward(loop.state, loop.batch(0)):
      ...     for name, gradient in layer.gradients.items():
      ...         print(name, float(tf.norm(gradient.data)), float(tf.norm(gradient.l2)))
    """
    recording = record(state, batch)
    walk = list(walk_back(state, recording))
    gradients = {name: gradient.total for _, _, found in walk for name, gradient in found.items()}
    gradients = Vector.of({name: gradients[name] for name in state.weights})
    updates, _ = state.optimizer.updates(gradients, state.weights, state.schedule(state.schedule_step))
    for layer, upstream, found in walk:
        yield Layer(layer, recording.activations[layer], upstream, found, {name: updates[name] for name in found})


class Debugger(pdb.Pdb):
    """A pdb that stops at the step's first line and once more before its update, and in nobody's source but yours.

    `s` steps into this project's functions and yours, and over those of TensorFlow, Keras and Python.
    """

    def __init__(self, at: int | None = None, condition: str = "", on_nan: bool = False, **options):
        """Args:
          at: stop at one step alone, the first that runs under this debugger.
          condition: a Python expression in the names of `train_step`; stop before the update where it holds.
          on_nan: stop before the update where the loss, a gradient or an update is not finite.
            With none of the three, stop at every step.
          **options: of pdb.Pdb.
        """
        super().__init__(nosigint=True, **options)
        self.prompt, self._running = "(tfloop) ", False
        first, update = _lines()
        if condition or on_nan:
            self.set_break(step_module.__file__, update, cond=condition or "not bool(finite)")
            return
        for line in (first, update):
            self.set_break(step_module.__file__, line, temporary=at is not None)

    def stop_here(self, frame) -> bool:
        return _is_readable(frame.f_code.co_filename) and super().stop_here(frame)

    def user_call(self, frame, arguments) -> None:
        self._begin() or super().user_call(frame, arguments)

    def user_line(self, frame) -> None:
        self._begin() or super().user_line(frame)

    def _begin(self) -> bool:
        """Go on to the first breakpoint in place of stopping where tracing begins."""
        if self._running:
            return False
        self._running = True
        self.set_continue()
        return True


def _lines() -> tuple[int, int]:
    """Line numbers in step.py: the first of train_step's body, and that where everything but the update is done."""
    source, start = inspect.getsourcelines(train_step)
    at = lambda text: start + next(i for i, line in enumerate(source) if line.strip().startswith(text))
    return at("images, labels, weights = batch"), at("valid = finite")


@functools.cache
def _is_readable(filename: str) -> bool:
    """Is this source of tfloop, or of the user: neither installed nor Python's own?"""
    if filename.startswith("<"):
        return False
    path, ours = Path(os.path.realpath(filename)), Path(os.path.realpath(__file__)).parent
    stdlib = Path(os.path.realpath(sysconfig.get_path("stdlib")))
    installed = {"site-packages", "dist-packages"} & set(path.parts) or stdlib in path.parents
    return ours in path.parents or not installed


def check_condition(condition: str, loop) -> None:
    """Try an expression on the first batch, before hours of training do.

    Raises:
      UserError: it is no expression, or uses a name that the step does not have.
    """
    state = loop.state
    batch = loop.batch(0)
    averages = [variable.numpy() for variable in state.moving.values()]
    loss, accuracy, examples, gradients, logits = step_module.forward_and_backward(state, batch)
    learning_rate = state.schedule(state.schedule_step)
    updates, slots = state.optimizer.updates(gradients, state.weights, learning_rate)
    for variable, value in zip(state.moving.values(), averages):
        variable.assign(value)
    names = dict(state=state, batch=batch, images=batch.images, labels=batch.labels, weights=batch.weights, loss=loss,
                 accuracy=accuracy, examples=examples, logits=logits, gradients=gradients, updates=updates, slots=slots, learning_rate=learning_rate,
                 finite=tf.constant(True))
    try:
        bool(eval(compile(condition, "--break_if", "eval"), vars(step_module), names))
    except Exception as error:
        raise UserError(f"--break_if={condition}: {type(error).__name__}: {error}; the names are {', '.join(names)}") from None


HELP = """\
{where}. n: next line, s: step into, c: go on to the update, then to the next stop, q: quit.
Names: images, labels, weights, learning_rate; after the backward pass: logits, loss.data, loss.l1, loss.l2,
gradients["{name}"], gradients.norm; then updates["{name}"], slots."""


def run(loop, epochs: int, at: int | None = None, condition: str = "", on_nan: bool = False, **options) -> bool:
    """Train `loop`, one step a call, under the Debugger; false where somebody quit. `options` are pdb.Pdb's."""
    if condition:
        check_condition(condition, loop)
    where = (f"Stops once, at step {at}" if at is not None else f"Stops before the update where {condition}" if condition else
             "Stops before the update where a value is not finite" if on_nan else "Stops at every step")
    debugger = Debugger(at, condition, on_nan, **options)
    debugger.message(HELP.format(where=where, name=next(iter(loop.state.weights))))
    records, finished = loop.run(epochs), []
    if at and not any(record.step >= at for record in records):  # up to there at full speed
        debugger.message(f"step {at} was not reached: the run has {int(loop.state.global_step)} steps")
        return True

    def rest() -> None:
        for _ in records:
            pass
        finished.append(True)

    debugger.runcall(rest)  # which swallows pdb's own way out
    return bool(finished)


def under_another_debugger() -> bool:
    """Does an editor's debugger, such as that of VS Code, run this process?"""
    return "debugpy" in sys.modules and sys.modules["debugpy"].is_client_connected()


def stop_once(differentiate: Callable) -> Callable:
    """`differentiate`, which calls breakpoint() the first time, for an editor's debugger to stop there."""
    stopped = []

    def stopping(state: TrainState, batch: Batch) -> Pass:
        if not stopped:
            stopped.append(True)
            breakpoint()  # step out of here for the step, or into the next line for the pass, layer by layer
        return differentiate(state, batch)

    return stopping
