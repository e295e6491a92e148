"""Quick proofs that model and loop are wired up right.

The gradients, the agreement of modes, and whether one batch can be memorised.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfloop import assembly, models, penalties
from tfloop.config import Config
from tfloop.cross_entropy import binary_cross_entropy, cross_entropy
from tfloop.data.dataset import Dataset, Split
from tfloop.errors import UserError
from tfloop.loop import Loop
from tfloop.models.program import Call, program_of
from tfloop.nests import leaves
from tfloop.objective import logits_of
from tfloop.randomness import Key, seed_of
from tfloop.records import Epoch

STEP = 1e-6  # of central differences, in float64
# Relative to the largest entry of the gradient, or to a thousandth of Σ|terms| of the value if that
# is more.
TOLERANCE = 1e-6
ENTRIES = 40  # of each weight that are checked, drawn at random


class GradientCheck(NamedTuple):
    """One weight or input of one function: the worst entry of those that were checked."""

    what: str  # "conv1", "loss, softmax", "fast forward pass" …
    weight: str
    entry: tuple[int, ...]
    tape: float
    difference: float
    error: float  # |tape - difference|, relative as TOLERANCE says

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE


def check_gradients(
    config: Config | keras.Model,
    image_shape: tuple[int, ...] = (28, 28, 1),
    classes: int = 10,
    seed: int = 0,
) -> Iterator[GradientCheck]:
    """GradientTape against central differences (f(x + h) - f(x - h)) / 2h, in float64.

    Each layer of the model is checked on its own, with random input and a random projection of its
    output to a number; so are the losses, the penalties, and both ways forward through the whole
    model. (Of batch normalisation this is the form of any shape: TensorFlow's fused operation knows
    no float64. `tests/test_fast.py` compares it, and the gradient written out for it over shards,
    with this one.)

    Args:
      config: describes the model; or a keras.Model that shows its graph, with one input of floats.
      image_shape, classes: of the data, where `config` describes the model.
      seed: of the weights and inputs.

    Raises:
      UserError: a model without a graph.
    """
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> tf.Variable:
        return tf.Variable(random.normal(size=shape))

    if isinstance(config, Config):
        model = _in_float64(models.build(config, image_shape, classes))
    elif program_of(config) is None:
        raise UserError("check_gradients: the model shows no graph whose layers could be checked")
    elif any(x.dtype != "float32" for x in config.inputs) or len(config.outputs) != 1:
        raise UserError(
            "check_gradients: takes models of floats with one output; this one takes "
            f"{', '.join(x.dtype for x in config.inputs)} and gives {len(config.outputs)}"
        )
    else:
        model = _in_float64(config)
        classes = model.output_shape[-1]
    weights, _ = models.named_variables(model)
    for weight in weights.values():
        inputs = max(np.prod(weight.shape[:-1]), 1)
        weight.assign(random.normal(size=weight.shape) / np.sqrt(inputs))
    key, program = Key(seed_of(seed, 1)), program_of(model)
    assert program is not None
    for call in program.calls:
        own = {id(v.value) for v in getattr(call.operation, "trainable_variables", ())}
        of_layer = {name: weight for name, weight in weights.items() if id(weight) in own}
        inputs = [normal(2, *program.shapes[value][1:]) for value in call.inputs]
        output_shape = program.shapes[call.outputs[0]][1:]
        projection = random.normal(size=(2, *output_shape))

        def apply(
            call: Call = call, inputs: list = inputs, projection: np.ndarray = projection
        ) -> tf.Tensor:
            values = [tf.convert_to_tensor(x) for x in inputs]
            return projection * models.call_alone(model, call, values, key)

        names = ["input", *(f"input {number}" for number in range(2, len(inputs) + 1))]
        variables = {**dict(zip(names, inputs, strict=True)), **of_layer}
        yield from _compare(call.name, apply, variables, random)

    labels = tf.constant(random.integers(classes, size=6), tf.int64)
    for name, sigmoid in (("softmax", False), ("sigmoid", True)):
        logits = normal(6, classes)
        loss = functools.partial(cross_entropy, labels, logits, 0.1, sigmoid)
        yield from _compare(f"loss, {name}, smoothed", loss, {"logits": logits}, random)
    for penalty in (penalties.l1, penalties.l2):
        kernel = normal(5, 7)
        of_kernel = functools.partial(penalty, kernel)
        yield from _compare(f"penalty {penalty.__name__}", of_kernel, {"kernel": kernel}, random)

    given = [normal(2, *program.shapes[number][1:]) for number in range(program.inputs)]
    projection = random.normal(size=(2, *program.shapes[program.outputs[0]][1:]))
    passes: dict[str, Callable] = {
        "plain forward pass": models.outputs,
        "fast forward pass": functools.partial(models.outputs, fast=True),
        "fast forward pass, 2 shards": functools.partial(models.outputs, fast=True, shards=2),
    }
    for name, forward in passes.items():

        def whole(forward: Callable = forward) -> tf.Tensor:
            inputs = [tf.convert_to_tensor(x) for x in given]
            return projection * forward(model, inputs if len(inputs) > 1 else inputs[0], True, key)

        names = ["images"] if len(given) == 1 else [f"input {n}" for n in range(1, len(given) + 1)]
        yield from _compare(
            name, whole, {**dict(zip(names, given, strict=True)), **weights}, random
        )


def _in_float64(model: keras.Model) -> keras.Model:
    """The same calls in float64, written down flat: models in a model would cast to float32."""
    program, clones = program_of(model), dict[int, Any]()
    assert program is not None
    inputs = [keras.Input(program.shapes[n][1:], dtype="float64") for n in range(program.inputs)]
    values = dict(enumerate(inputs))
    for call in program.calls:
        arguments, options = call.arguments([values[value] for value in call.inputs])
        layer = call.operation
        if call.order < 0:  # which casts
            outputs = arguments
        else:
            if isinstance(layer, keras.layers.Layer):
                config = {**layer.get_config(), "dtype": "float64"}
                layer = clones.setdefault(id(layer), type(layer).from_config(config))
            outputs = keras.tree.flatten(layer(*arguments, **options))
        values.update(zip(call.outputs, outputs, strict=True))
    return keras.Model(inputs, [values[output] for output in program.outputs])


def _compare(
    what: str,
    function: Callable[[], tf.Tensor],
    variables: dict[str, tf.Variable],
    random: np.random.Generator,
) -> Iterator[GradientCheck]:
    """`function` gives the terms whose sum is differentiated."""
    with tf.GradientTape() as tape:
        terms = function()
        value = tf.reduce_sum(terms)
    floor = max(1e-3 * float(tf.reduce_sum(tf.abs(terms))), 1e-12)
    zero = tf.UnconnectedGradients.ZERO
    gradients = tape.gradient(value, variables, unconnected_gradients=zero)
    for name, variable in variables.items():
        gradient = gradients[name].numpy()
        scale = max(np.abs(gradient).max(), floor)
        checks = []
        size = gradient.size
        for flat in random.choice(size, min(ENTRIES, size), replace=False):
            entry = tuple(int(i) for i in np.unravel_index(flat, gradient.shape))
            difference = _central_difference(function, variable, entry)
            error = abs(difference - gradient[entry]) / scale
            tape_value = float(gradient[entry])
            checks.append(GradientCheck(what, name, entry, tape_value, difference, error))
        yield max(checks, key=lambda check: check.error)


def _central_difference(
    function: Callable[[], tf.Tensor], variable: tf.Variable, entry: tuple[int, ...]
) -> float:
    """(f(x + h) - f(x - h)) / 2h for one entry; the variable is afterwards what it was."""
    start, sides = variable.numpy(), []
    for sign in (1, -1):
        moved = start.copy()
        moved[entry] += sign * STEP
        variable.assign(moved)
        sides.append(float(tf.reduce_sum(function())))
    variable.assign(start)
    return (sides[0] - sides[1]) / (2 * STEP)


class Parity(NamedTuple):
    """One way to run the first steps, compared with the reference."""

    mode: str
    step: int | None  # the first after which a weight differs; None: the same, bit for bit
    layer: str = ""  # the first weight that does, in the model's order
    ulps: int = 0  # the most units in the last place, in that weight
    largest: float = 0.0  # relative to the weight's largest entry, after the last step


_MODES: dict[str, dict[str, Any]] = {
    "compiled, again": {},
    "eager": {"eager": True},
    "XLA": {"jit_compile": True},
    "host pipeline": {"pipeline": "host"},
    "prefetch pipeline": {"pipeline": "prefetch"},
    "many steps a call": {"steps_per_call": 0},
    "fast": {"fast": True},
    "fast, 2 shards": {"fast": True, "shards": 2},
}


def parity(config: Config, steps: int) -> Iterator[Parity]:
    """Run the same first steps in every mode, and compare the weights after each step.

    The reference is the compiled step with the plain forward pass, on the CPU, from resident
    images.
    """
    data = assembly.load_data(config)
    longest = assembly.steps_per_epoch(config, data)
    if steps > longest:
        raise UserError(f"--steps={steps}: an epoch has {longest} steps, and one epoch is compared")
    tf.get_logger().setLevel("ERROR")  # each mode is traced, which TensorFlow warns of
    reference = dict(_weights(config, data, steps))
    devices = ["CPU", "GPU"] if tf.config.list_logical_devices("GPU") else ["CPU"]
    for device in devices:
        for mode, settings in _MODES.items():
            if settings.get("steps_per_call") == 0:
                settings = {"steps_per_call": steps}
            name = f"{mode}, {device}" if len(devices) > 1 else mode
            weights = _weights(config, data, steps, device, **settings)
            yield _compare_runs(name, reference, weights)


Weights = dict[str, np.ndarray]


def _weights(
    config: Config, data: Dataset, steps: int, device: str = "CPU", **settings: Any
) -> Iterator[tuple[int, Weights]]:
    """(step, weights) after each step; where a call makes several, after that."""
    plain = {
        "pipeline": "resident",
        "steps_per_call": 1,
        "fast": False,
        "shards": 1,
        "eager": False,
        "jit_compile": False,
    }
    with tf.device(device):
        # A split of its own, whose tensors will lie on this device.
        train = dataclasses.replace(data.train) if isinstance(data.train, Split) else data.train
        own = dataclasses.replace(data, train=train)
        loop = assembly.make_loop(config.replace(**{**plain, **settings}), own)
        for call in loop.train_epoch():
            if call.step > steps:
                return
            yield call.step, {name: w.numpy() for name, w in loop.state.weights.items()}
            if call.step == steps:
                return


def _compare_runs(
    mode: str, reference: dict[int, Weights], run: Iterator[tuple[int, Weights]]
) -> Parity:
    first = None
    for step, weights in run:
        expected = reference[step]
        for name, weight in weights.items():
            if first is None and not np.array_equal(weight, expected[name]):
                first = step, name, int(ulps(weight, expected[name]).max())
    if first is None:
        return Parity(mode, None)
    largest = max(
        float(np.abs(weights[name] - other).max() / np.abs(other).max())
        for name, other in expected.items()
    )
    return Parity(mode, *first, largest)


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many float32 numbers lie between a and b, entry by entry."""

    def ordered(x: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(x, np.float32).view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return np.abs(ordered(a) - ordered(b))


class Memorising(NamedTuple):
    """One step of `overfit`."""

    step: int
    loss: float  # of the data, above the least there is
    accuracy: float | None  # None where there are no classes
    # All right, at a loss below 0.01 and the share of smoothing; without classes a loss below 1 %
    # of the first.
    done: bool


def overfit(config: Config, most: int) -> Iterator[Memorising]:
    """Train on the first `config.batch_size` examples alone until all are learnt for certain.

    Args:
      config: the settings.
      most: give up after N steps.
    """
    data = assembly.load_data(config).head(config.batch_size)
    data = dataclasses.replace(data, test=data.train)
    own = config.replace(steps_per_call=1, epochs=most, evaluate_every="1epoch")
    loop = assembly.make_loop(own, data)
    least, first = _least_loss(loop), None
    for record in loop.run(most):
        if isinstance(record, Epoch) and record.test:
            loss, accuracy = record.test.data - least, record.test.accuracy
            first = max(loss, 1e-30) if first is None else first
            if accuracy is None:
                done = loss < 0.01 * first
            else:
                done = accuracy == 1.0 and loss < 0.01 + config.label_smoothing
            yield Memorising(record.step, loss, accuracy, done)
            if done:
                return


def _least_loss(loop: Loop) -> float:
    """The loss of outputs that are just the targets, smoothed; 0 with a loss of one's own."""
    state, targets = loop.state, loop.data.train.targets
    smoothing, total = float(state.hyper["label_smoothing"]), 0.0
    for term in state.objective.terms:
        kind = term.target.kind
        if not term.is_default or kind == "values":
            continue
        own = tf.constant(leaves(targets)[term.places[0]])
        if term.loss is not binary_cross_entropy and kind == "classes":
            shares = tf.one_hot(own, term.target.classes)
        else:
            shares = tf.cast(own, tf.float32)
        is_sigmoid = term.activation == "sigmoid"
        spread = smoothing / (2 if is_sigmoid else term.target.classes)
        perfect = logits_of(
            tf.clip_by_value(shares * (1 - smoothing) + spread, 1e-7, 1 - 1e-7), term.activation
        )
        total += term.weight * float(tf.reduce_mean(term.loss(own, perfect, smoothing)))
    return total
