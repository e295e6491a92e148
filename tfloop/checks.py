"""Quick proofs that a model and loop are wired up right: gradients, agreement of modes, memorising one batch."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfloop import models, ops, penalties, runs
from tfloop.config import Config
from tfloop.data import Dataset
from tfloop.errors import UserError
from tfloop.loop import Epoch
from tfloop.randomness import Key, seed_of
from tfloop.step import cross_entropy

STEP = 1e-6  # of central differences, in float64
TOLERANCE = 1e-6  # relative to the largest entry of the gradient, or to a thousandth of Σ|terms| of the value if that is more
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


def check_gradients(config: Config, image_shape: tuple[int, ...] = (28, 28, 1), classes: int = 10,
                    seed: int = 0) -> Iterator[GradientCheck]:
    """GradientTape against central differences (f(x + h) - f(x - h)) / 2h, in float64.

    Each layer of the model that `config` describes is checked on its own, with random input and a random projection of
    its output to a number; so are the losses, the penalties, and both ways forward through the whole model. (Of batch
    normalisation this is the weighted form: TensorFlow's fused operation knows no float64; `tests/test_ops.py` compares it,
    and the gradient written out for it over shards, with this one.)
    """
    random = np.random.default_rng(seed)
    normal = lambda *shape: tf.Variable(random.normal(size=shape))
    model = _in_float64(models.build(config, image_shape, classes))
    for layer in model.layers:
        for weight in layer.weights:
            weight.assign(random.normal(size=weight.shape) / np.sqrt(max(np.prod(weight.shape[:-1]), 1)))
    weights, _ = models.named_variables(model)
    key, rows = Key(seed_of(seed, 1)), tf.ones([2], tf.float64)
    for index, layer in enumerate(model.layers):
        own = {name: weight for name, weight in weights.items() if name.startswith(f"{layer.name}/")}
        x = normal(2, *layer.input.shape[1:])
        projection = random.normal(size=(2, *layer.output.shape[1:]))
        apply = lambda: projection * models.apply_layer(model, index, x, rows, True, key)
        yield from _compare(layer.name, apply, {"input": x, **own}, random)

    labels = tf.constant(random.integers(classes, size=6), tf.int64)
    for name, sigmoid in (("softmax", False), ("sigmoid", True)):
        logits = normal(6, classes)
        loss = lambda: cross_entropy(labels, logits, 0.1, sigmoid)
        yield from _compare(f"loss, {name}, smoothed", loss, {"logits": logits}, random)
    for penalty in (penalties.l1, penalties.l2):
        kernel = normal(5, 7)
        yield from _compare(f"penalty {penalty.__name__}", lambda: penalty(kernel), {"kernel": kernel}, random)

    images, projection = normal(2, *image_shape), random.normal(size=(2, classes))
    for name, forward in (("plain forward pass", models.logits), ("fast forward pass", ops.logits),
                          ("fast forward pass, 2 shards", lambda *a, **k: ops.logits(*a, **k, shards=2))):
        whole = lambda: projection * forward(model, images, rows, training=True, key=key)
        yield from _compare(name, whole, {"images": images, **weights}, random)


def _in_float64(model: keras.Sequential) -> keras.Sequential:
    return keras.models.clone_model(
        model, clone_function=lambda layer: type(layer).from_config({**layer.get_config(), "dtype": "float64"}))


def _compare(what: str, function: Callable, variables: dict[str, tf.Variable], random) -> Iterator[GradientCheck]:
    """`function` gives the terms whose sum is differentiated."""
    with tf.GradientTape() as tape:
        terms = function()
        value = tf.reduce_sum(terms)
    floor = max(1e-3 * float(tf.reduce_sum(tf.abs(terms))), 1e-12)
    gradients = tape.gradient(value, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    for name, variable in variables.items():
        start, gradient = variable.numpy(), gradients[name].numpy()
        scale = max(np.abs(gradient).max(), floor)
        worst = None
        for flat in random.choice(start.size, min(ENTRIES, start.size), replace=False):
            entry = tuple(int(i) for i in np.unravel_index(flat, start.shape))
            sides = []
            for sign in (1, -1):
                moved = start.copy()
                moved[entry] += sign * STEP
                variable.assign(moved)
                sides.append(float(tf.reduce_sum(function())))
            difference = (sides[0] - sides[1]) / (2 * STEP)
            error = abs(difference - gradient[entry]) / scale
            if worst is None or error > worst.error:
                worst = GradientCheck(what, name, entry, float(gradient[entry]), difference, error)
        variable.assign(start)
        yield worst


class Parity(NamedTuple):
    """One way to run the first steps, compared with the reference."""

    mode: str
    step: int | None  # the first after which a weight differs; None: the same, bit for bit
    layer: str = ""  # the first weight that does, in the model's order
    ulps: int = 0  # the most units in the last place, in that weight
    largest: float = 0.0  # relative to the weight's largest entry, after the last step


def parity(config: Config, steps: int) -> Iterator[Parity]:
    """Run the same first steps in every mode, and compare the weights after each with those of the reference.

    The reference is the compiled step with the plain forward pass, on the CPU, from resident images.
    """
    data = runs.load_data(config)
    longest = -(-len(data.train) // config.batch_size)
    if steps > longest:
        raise UserError(f"--steps={steps}: an epoch has {longest} steps, and one epoch is compared")
    tf.get_logger().setLevel("ERROR")  # each mode is traced, which TensorFlow warns of
    reference = list(_weights(config, data, steps))
    modes = {"compiled, again": {}, "eager": {"eager": True}, "XLA": {"jit_compile": True},
             "host pipeline": {"pipeline": "host"}, "prefetch pipeline": {"pipeline": "prefetch"},
             "many steps a call": {"steps_per_call": steps}, "fast": {"fast": True}, "fast, 2 shards": {"fast": True, "shards": 2}}
    devices = ["CPU"] + ["GPU"] * bool(tf.config.list_logical_devices("GPU"))
    for device in devices:
        for mode, settings in modes.items():
            yield _compare_runs(f"{mode}, {device}" if len(devices) > 1 else mode, reference,
                                _weights(config, data, steps, device, **settings))


def _weights(config: Config, data: Dataset, steps: int, device: str = "CPU", **settings) -> Iterator[dict[str, np.ndarray]]:
    """The weights after each step; where a call makes several, after that."""
    chosen = {"pipeline": "resident", "steps_per_call": 1, "fast": False, "shards": 1, "eager": False, "jit_compile": False}
    with tf.device(device):
        own = dataclasses.replace(data, train=dataclasses.replace(data.train))  # whose tensors will lie on this device
        loop = runs.make_loop(config.replace(**{**chosen, **settings}), own)
        for call in loop.train_epoch():
            if call.step > steps:
                return
            yield call.step, {name: weight.numpy() for name, weight in loop.state.weights.items()}
            if call.step == steps:
                return


def _compare_runs(mode: str, reference: list, run: Iterator) -> Parity:
    expected, first = dict(reference), None
    for step, weights in run:
        for name, weight in weights.items():
            if first is None and not np.array_equal(weight, expected[step][name]):
                first = step, name, int(ulps(weight, expected[step][name]).max())
    if first is None:
        return Parity(mode, None)
    largest = max(float(np.abs(weights[name] - other).max() / np.abs(other).max()) for name, other in expected[step].items())
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
    loss: float  # of the data, above the least there is with smoothed labels
    accuracy: float
    done: bool  # all images right, at a loss below 0.01 and the share of smoothing


def overfit(config: Config, most: int) -> Iterator[Memorising]:
    """Train on the first `config.batch_size` images alone, at most `most` steps, until all of them are learnt for certain."""
    data = runs.load_data(config).head(config.batch_size)
    data = dataclasses.replace(data, test=data.train)
    smoothing, sigmoid = config.label_smoothing, config.output == "sigmoid"
    targets = tf.one_hot(data.train.labels, data.classes) * (1 - smoothing) + smoothing / (2 if sigmoid else data.classes)
    targets = tf.clip_by_value(targets, 1e-7, 1 - 1e-7)
    perfect = tf.math.log(targets) - (tf.math.log(1 - targets) if sigmoid else 0.0)
    least = float(tf.reduce_mean(cross_entropy(tf.constant(data.train.labels), perfect, smoothing, sigmoid)))
    for record in runs.make_loop(config.replace(steps_per_call=1, epochs=most), data).run(most):
        if isinstance(record, Epoch):
            loss, accuracy = record.test.data - least, record.test.accuracy
            step = Memorising(record.step, loss, accuracy, accuracy == 1.0 and loss < 0.01 + smoothing)
            yield step
            if step.done:
                return
