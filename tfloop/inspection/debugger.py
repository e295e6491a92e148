"""Gradients that one can step through: the step layer by layer, and a pdb for it.

`backward` shows a batch's way back through the model. `forward_and_backward` is the twin of the one
in `step` that takes this way. `Debugger` stops in `step.train_step`, with everything it computes in
plain names, and stays in readable source.
"""

import ast
import dataclasses
import functools
import inspect
import os
import pdb
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import tensorflow as tf

from tfloop import models
from tfloop import step as step_module
from tfloop.data.pipelines import Batch
from tfloop.errors import UserError
from tfloop.inspection import showing
from tfloop.inspection.showing import show as show
from tfloop.loop import Loop
from tfloop.metrics import Loss
from tfloop.models.program import Call
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


@dataclasses.dataclass
class Story:
    """What the step under the debugger has computed so far."""

    activations: dict[str, tf.Tensor] = dataclasses.field(default_factory=dict)
    upstreams: dict[str, tf.Tensor] = dataclasses.field(default_factory=dict)
    gradients: "Gradients" = dataclasses.field(default_factory=dict)
    owners: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # layer → weights
    loss: Loss | None = None


STORY = Story()


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
    scaled: Loss  # the same with data and model times the loss scale; what the tape is asked by
    accuracy: tf.Tensor
    more: tf.Tensor  # means of what else is summed up
    tape: tf.GradientTape


def record(state: TrainState, batch: Batch, part: Part | None = None) -> _Recording:
    """Forward, layer by layer, and the loss, term by term. Changes nothing but moving averages."""
    key = state.key(part)
    inputs, objective = state.prepared(batch.inputs, key), state.objective
    vars(STORY).update(vars(Story()))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(list(state.weights.values()))
        activations = []
        for activation in models.activations(state.model, inputs, True, key, objective.as_logits):
            activations.append(activation)
            STORY.activations[activation.name] = activation.value
        last = activations.pop()
        outputs = map_leaves(_as_float32, last.value) if objective.is_default else last.value
        if is_leaf(outputs):
            activations.append(last._replace(value=outputs))
        each, correct, more = judged(state, batch.targets, outputs)
        loss = losses(state, data_loss(batch, each), model_losses(state))
        STORY.loss = loss
        scaled = loss if state.loss_scale is None else _scaled(loss, state.loss_scale)
    accuracy, more = mean_over(batch, correct), mean_over(batch, more)
    return _Recording(activations, outputs, loss, scaled, accuracy, more, tape)


def _scaled(loss: Loss, scale: tf.Tensor) -> Loss:
    """What comes through 16-bit layers times the loss scale, so that small gradients survive."""
    return loss._replace(data=scale * loss.data, model=scale * loss.model)


def _as_float32(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32)


def walk_back(
    state: TrainState, recording: _Recording
) -> Iterator[tuple[str, tf.Tensor, Gradients]]:
    """Yields (layer, upstream gradient, gradients by weight) from the last layer to the first.

    A weight comes with the last layer that uses it.
    """
    activations, tape = recording.activations, recording.tape
    values = [activation.value for activation in activations]
    upstreams = tape.gradient(recording.scaled.data, values, None, ZERO)
    if state.loss_scale is not None:
        upstreams = [_as_float32(upstream) / state.loss_scale for upstream in upstreams]
    gradients, owners = all_gradients(state, recording), _owners(state, activations)
    for place in reversed(range(len(activations))):
        own = {name: gradients[name] for name, owner in owners.items() if owner == place}
        STORY.upstreams[activations[place].name] = upstreams[place]
        STORY.owners[activations[place].name] = list(own)
        STORY.gradients.update(own)
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
    loss, tape = recording.scaled, recording.tape
    terms = {
        term: tape.gradient(getattr(loss, term), state.weights)
        for term in ("data", "l1", "l2", "custom", "model")
    }
    if state.loss_scale is not None:
        for term in ("data", "model"):
            terms[term] = {
                name: None if gradient is None else _as_float32(gradient) / state.loss_scale
                for name, gradient in terms[term].items()
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
    """The twin of `step.forward_and_backward`: the same values, layer by layer."""
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
        self.class_names: tuple[str, ...] = ()
        file, (first, update) = step_module.__file__, _lines()
        if condition or on_nan:
            self.set_break(file, update, cond=condition or "not bool(finite)")
            return
        for line in (first, update):
            self.set_break(file, line, temporary=at is not None)

    def stop_here(self, frame: FrameType) -> bool:
        return _is_to_be_seen(frame.f_code) and super().stop_here(frame)

    def do_show(self, argument: str) -> None:
        """show NAME: a value as people look at it; images as a small picture, labels by name."""
        if not argument:
            self.error("show NAME: which value? inputs, targets, loss, gradients, …")
            return
        found = self._value_of(argument)
        if found is not _NOTHING:
            is_target = argument in ("targets", "labels")
            self.message(showing.show(found, self.class_names if is_target else ()))

    def do_plot(self, argument: str) -> None:
        """plot NAME: draw a value into NAME.png: images, a curve, or a histogram."""
        found = self._value_of(argument) if argument else _NOTHING
        if found is _NOTHING:
            return
        path = f"{re.sub(r'[^A-Za-z0-9]+', '-', argument).strip('-') or 'value'}.png"
        try:
            showing.plot(found, path)
        except UserError as error:
            self.error(str(error))
            return
        self.message(path)

    def do_loss(self, argument: str) -> None:
        """loss: the terms of the loss, of the step so far."""
        loss = STORY.loss
        if loss is None:
            self.error("the loss is not computed yet")
            return
        terms = [(n, float(v)) for n, v in loss._asdict().items() if n != "total" and float(v)]
        parts = " + ".join(f"{name} {value:.6g}" for name, value in terms)
        self.message(f"total {float(loss.total):.6g} = {parts or '0'}")

    def do_layers(self, argument: str) -> None:
        """layers: activations and gradients of the step so far, by layer."""
        for line in layer_lines(STORY):
            self.message(line)

    def do_where(self, arg: str) -> bool | None:
        """where: the place in the step, and the stack of readable frames to it."""
        self.message(place_in_step(self.stack[: self.curindex + 1]))
        for frame, line in self.stack[: self.curindex + 1]:
            if _is_readable(frame.f_code.co_filename):
                name = Path(frame.f_code.co_filename).name
                self.message(f"  {name}:{line} {frame.f_code.co_name}")
        return None

    do_w = do_bt = do_where

    def _value_of(self, text: str) -> Any:
        """The value of an expression in the present frame; it is said where it has none."""
        frame = self.curframe
        alias = ALIASES.get(text, text)
        names = {} if frame is None else {**frame.f_globals, **self.curframe_locals}
        try:
            return eval(text if text in names or text == alias else alias, names)
        except Exception as error:
            self.error(f"{type(error).__name__}: {error}")
            return _NOTHING

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
    """Lines of step.py: the first with a batch by name, and that where only the update is left."""
    source, start = inspect.getsourcelines(train_step)

    def line_of(text: str) -> int:
        return start + next(i for i, line in enumerate(source) if line.strip().startswith(text))

    return line_of("learning_rate ="), line_of("valid = finite")


_NOTHING = object()
PLUMBING = ("vectors.py", "nests.py", "tracing.py", "lazy.py")  # no story to step through
ALIASES = {"images": "inputs", "labels": "targets"}  # as image data have it


def layer_lines(story: Story) -> Iterator[str]:
    """The story as a table: norm of each layer's activation, of what comes back, of its weights'.

    A line for each layer that was computed, in the order of the forward pass.
    """
    if not story.activations:
        yield "no layer is computed yet"
        return
    width = max(map(len, story.activations))
    yield f"{'layer':{width}}  {'activation':>20}  {'norm':>9}  {'upstream':>9}  gradient norms"
    for name, value in story.activations.items():
        shape = "×".join(map(str, value.shape))
        line = f"{name:{width}}  {shape:>20}  {float(_norm(value)):9.4g}"
        if name in story.upstreams:
            line += f"  {float(_norm(story.upstreams[name])):9.4g}"
            own = ((each, story.gradients.get(each)) for each in story.owners.get(name, ()))
            norms = [
                f"{each.rpartition('/')[2]} {float(_norm(gradient.total)):.4g}"
                for each, gradient in own
                if gradient is not None
            ]
            line += f"  {', '.join(norms)}"
        yield line.rstrip()


def _norm(x: tf.Tensor) -> tf.Tensor:
    return tf.norm(tf.cast(x, tf.float32))


def place_in_step(stack: Sequence[tuple[FrameType, int]]) -> str:
    """The step's story at this stack: "forward conv2", "loss", "backward dense1", "update"."""
    place = "outside the step"
    _, update = _lines()
    for frame, line in stack:
        code, names = frame.f_code, frame.f_locals
        if code is train_step.__code__:
            place = "update" if line >= update - 3 else "input"
        elif code is record.__code__:
            done = names.get("activation")
            place = f"forward, after {done.name}" if done else "input"
            place = "loss" if "last" in names else place
        elif code.co_name == "_call" and isinstance(names.get("call"), Call):
            place = f"forward {names['call'].name}"
        elif code in (walk_back.__code__, all_gradients.__code__):
            place = "backward"
        elif code is forward_and_backward.__code__ and "recording" in names:
            place = f"backward {names['layer']}" if "layer" in names else "backward"
    return place


def _is_to_be_seen(code: CodeType) -> bool:
    """Is it something to step through: no comprehension, and no helper of one line of ours?"""
    return _is_readable(code.co_filename) and not _is_helper(code)


@functools.cache
def _is_helper(code: CodeType) -> bool:
    if code.co_name.startswith("<") and code.co_name != "<module>":
        return True
    ours, file = (Path(os.path.realpath(p)) for p in (step_module.__file__, code.co_filename))
    if ours.parent not in file.parents:
        return False
    if file.name in PLUMBING:
        return True
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return False
    body = getattr(parsed, "body", ())
    is_text = [isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in body]
    steps = [part for part, is_doc in zip(body, is_text, strict=True) if not is_doc]
    return len(steps) <= 1 and not any(hasattr(part, "body") for part in steps)


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
{where}. n: next line, s: step into, c: go on to the update, then to the next stop, q: quit;
show NAME, plot NAME, layers, loss, where.
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
    target = loop.data.target
    debugger.class_names = tuple(target.names or ()) if target else ()
    where = _where(at, condition, on_nan)
    debugger.message(HELP.format(where=where, name=next(iter(loop.state.weights))))
    records = loop.run(epochs)
    before = at if at is not None and int(loop.state.global_step) < at else 0
    if before and not any(record.step >= before for record in records):  # to there at full speed
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
