"""Models as people write them, and a plain loop that says what is right for each.

Each model is trained on 11 examples in batches of 4, so that the last one of an epoch has 3.

Run as a script it trains models in modes, compares each with the plain loop, and prints a table:
  python tests/own_models.py [--replicas=N] [--modes=compiled,eager,…] [NAME …]
"""

import argparse
import contextlib
import dataclasses
import sys
import time
import warnings
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfloop
from tfloop.data import pipelines
from tfloop.machine.replicas import Replicas, make_replicas
from tfloop.models.inside import seed_generators

MOMENTUM, L2, EXAMPLES, BATCH, CLASSES = 0.9, 0.01, 11, 4, 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what it is trained on, and how a plain loop calls it.

    Attributes:
      make: () → the model.
      shape: of an example.
      penalised: a part of the names of the weights that l2 counts.
      call: (model, x, key, rows) → logits of some rows of the batch x in training, where
        `model(x, training=True)` would draw other numbers than the step does.
      thaws: is the first layer unfrozen after the first epoch?
    """

    make: Callable[[], keras.Model]
    shape: tuple[int, ...] = (8, 8, 2)
    penalised: tuple[str, ...] = ("kernel",)
    call: Callable | None = None
    thaws: bool = False
    rate: float = 0.01


def block() -> list[keras.layers.Layer]:
    return [
        layers.Conv2D(4, 3, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.5),
        layers.ReLU(),
        layers.MaxPooling2D(2),
    ]


def flat() -> keras.Model:
    return keras.Sequential(
        [keras.Input((8, 8, 2)), *block(), layers.Flatten(), layers.Dense(CLASSES)]
    )


def nested() -> keras.Model:
    base = keras.Sequential([keras.Input((8, 8, 2)), *block()])
    head = keras.Sequential([keras.Input((4, 4, 4)), layers.Flatten(), layers.Dense(CLASSES)])
    return keras.Sequential([keras.Input((8, 8, 2)), base, head])


def resnet() -> keras.Model:
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, padding="same")(inputs)
    for stride in (1, 2):
        y = layers.BatchNormalization(momentum=0.5)(x)
        y = layers.Activation("relu")(y)
        y = layers.Conv2D(4, 3, strides=stride, padding="same", use_bias=False)(y)
        y = layers.BatchNormalization(momentum=0.5)(y)
        y = layers.Activation("relu")(y)
        y = layers.Conv2D(4, 3, padding="same", use_bias=False)(y)
        x = layers.add([layers.Conv2D(4, 1, strides=stride)(x), y])
    x = layers.GlobalAveragePooling2D()(layers.BatchNormalization(momentum=0.5)(x))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def dropped() -> keras.Model:
    inputs = keras.Input((8, 8, 2))
    x = layers.Dense(6, "tanh")(layers.Flatten()(inputs))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Dropout(0.5)(x)))


def call_dropped(model: keras.Model, x: tf.Tensor, key, rows: slice) -> tf.Tensor:
    """Its dropout is the graph's third operation, from 0 on number 2."""
    _, flatten, first, _, second = model.layers
    kept = key.fold_in(2).uniform([len(x), 6]) >= 0.5
    return second(tf.where(kept[rows], first(flatten(x[rows])) / 0.5, 0.0))


class Subclass(keras.Model):
    """As in Keras's guide: layers of its own, called by its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = layers.Conv2D(4, 3), layers.BatchNormalization(momentum=0.5)
        self.flat, self.out = layers.Flatten(), layers.Dense(CLASSES)
        self(tf.zeros([1, 8, 8, 2]))

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        x = tf.nn.relu(self.norm(self.conv(x), training=training))
        self.add_loss(0.01 * tf.reduce_mean(tf.square(x)))
        return self.out(self.flat(x))


def mobile_net() -> keras.Model:
    """In float64, and at a small rate: it normalises over three or four numbers, of which it makes
    gradients of norm 9000 that differ in the fourth digit with the last bit of an image."""
    keras.config.set_dtype_policy("float64")
    try:
        return keras.applications.MobileNetV2(
            (32, 32, 3), alpha=0.35, weights=None, classes=CLASSES, classifier_activation=None
        )
    finally:
        keras.config.set_dtype_policy("float32")


def tokens() -> keras.Model:
    inputs = [keras.Input((6, 1, 1)), layers.Reshape((6,))]
    embedding = layers.Embedding(20, 4, mask_zero=True)
    return keras.Sequential([*inputs, embedding, layers.LSTM(5), layers.Dense(CLASSES)])


def flipped() -> keras.Model:
    start = [keras.Input((8, 8, 2)), layers.Rescaling(0.5), layers.RandomFlip("horizontal")]
    return keras.Sequential([*start, layers.Flatten(), layers.Dense(CLASSES)])


def call_flipped(model: keras.Model, x: tf.Tensor, key, rows: slice) -> tf.Tensor:
    for number, generator in enumerate(seed_generators(model)):
        generator.state.assign(key.fold_in(-2).bits(number))
    return model(x, training=True)[rows]


def frozen() -> keras.Model:
    base = keras.Sequential([keras.Input((8, 8, 2)), *block()], name="base")
    base.trainable = False
    inputs = keras.Input((8, 8, 2))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Flatten()(base(inputs))))


def shared() -> keras.Model:
    inputs = keras.Input((8, 8, 2))
    twice = layers.Dense(128, "tanh", activity_regularizer=keras.regularizers.L2(0.01))
    x = twice(twice(layers.Flatten()(inputs)))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


MODES = {
    "compiled": {},
    "eager": {"eager": True},
    "shards=2": {"shards": 2},
    "XLA": {"jit_compile": True},
    "accumulate=2": {"accumulate": 2},
    "host": {"pipeline": "host", "steps_per_call": 1},
}
NOT_COMPARED = {
    ("Rescaling, RandomFlip", "XLA"): "XLA draws other numbers from Keras's seeds than TensorFlow",
    ("MobileNetV2", "accumulate=2"): "it normalises over one number, and a change of the images by "
    "1e-7 changes the plain loop's loss by a tenth",
}

CASES = {
    "flat Sequential": Case(flat),
    "nested Sequential": Case(nested),
    "functional ResNet": Case(resnet),
    "functional with Dropout": Case(dropped, call=call_dropped),
    "subclass": Case(Subclass),
    "MobileNetV2": Case(mobile_net, (32, 32, 3), rate=1e-7),
    "Embedding, mask, LSTM": Case(tokens, (6, 1, 1), ("kernel", "embeddings")),
    "Rescaling, RandomFlip": Case(flipped, call=call_flipped),
    "frozen, then unfrozen": Case(frozen, thaws=True),
    "shared layer": Case(shared),
}


def data_for(case: Case) -> tfloop.Dataset:
    random, shape = np.random.default_rng(3), (EXAMPLES, *case.shape)
    x = random.normal(size=shape).astype(np.float32)
    if case.make is tokens:
        x = random.integers(0, 20, shape).astype(np.float32)
        x[:, 4:] = 0  # masked
    y = np.arange(EXAMPLES) % CLASSES
    return tfloop.from_arrays(x, y, x[:5], y[:5], standardize=False)


def made(case: Case) -> keras.Model:
    keras.utils.set_random_seed(5)
    return case.make()


def state_of(case: Case, replicas: Replicas | None = None) -> tfloop.TrainState:
    optimizer = tfloop.Optimizer("sgd", momentum=MOMENTUM)
    with replicas.strategy.scope() if replicas else contextlib.nullcontext():
        model = made(case)
    return tfloop.TrainState(model, optimizer, case.rate, l2=L2, seed=7)


def train(case: Case, state: tfloop.TrainState, **options) -> list[tfloop.Epoch]:
    """The records of two epochs."""
    loop = tfloop.Loop(state, data_for(case), batch_size=BATCH, **options)
    records = [loop.fit(1)]
    if case.thaws:
        state.model.get_layer("base").trainable = True
    return [*records, loop.fit(2)]


def plain(case: Case, parts: int = 1) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """(the mean of each loss term, by epoch; all variables after two): a plain GradientTape loop.

    Args:
      case: the model.
      parts: to compute one after the other, each with its own pass.
    """
    model, data, epochs = made(case), data_for(case).train, []
    key_of = tfloop.TrainState(made(case), "sgd", case.rate, seed=7)
    velocity = {}
    for epoch in range(2):
        sums = dict.fromkeys(("data", "l2", "model"), 0.0)
        order = pipelines.order(7, epoch, EXAMPLES).numpy()
        for first in range(0, EXAMPLES, BATCH):
            rows = order[first : first + BATCH]
            weights = list(model.trainable_variables)
            gradients = [0.0] * len(weights)
            key_of.epoch.assign(epoch), key_of.batch_index.assign(first // BATCH)
            for part in np.array_split(np.arange(len(rows)), parts):
                own = slice(part[0], part[-1] + 1)
                x, y = tf.constant(data.inputs[rows]), data.targets[rows[own]]
                with tf.GradientTape() as tape:
                    tape.watch([weight.value for weight in weights])
                    if case.call:
                        logits = case.call(model, x, key_of.key(), own)
                    else:
                        logits = model(x[own], training=True)
                    each = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
                    terms = {
                        "data": tf.reduce_mean(each),
                        "l2": L2
                        * sum(tf.reduce_sum(w.value**2) for w in weights if _counts(case, w)),
                        "model": tf.add_n(model.losses) if model.losses else tf.constant(0.0),
                    }
                    total = sum(tf.cast(term, tf.float64) for term in terms.values())
                found = tape.gradient(total, [weight.value for weight in weights])
                share = len(part) / len(rows)
                gradients = [sum_ + share * g for sum_, g in zip(gradients, found, strict=True)]
                for term, value in terms.items():
                    sums[term] += len(part) / EXAMPLES * float(value)
            for weight, gradient in zip(weights, gradients, strict=True):
                m = MOMENTUM * velocity.get(id(weight), 0.0) - case.rate * gradient
                velocity[id(weight)] = m
                weight.assign_add(m)
        epochs.append(sums)
        if case.thaws:
            model.get_layer("base").trainable = True
    return epochs, _values(model)


def _counts(case: Case, weight: keras.Variable) -> bool:
    return any(part in weight.name for part in case.penalised)


def _values(model: keras.Model) -> list[np.ndarray]:
    return [variable.numpy() for variable in model.variables if "seed" not in variable.path]


def compare(case: Case, state: tfloop.TrainState, records: list, parts: int = 1) -> None:
    """Raises AssertionError where a run of two epochs differs from the plain loop's."""
    epochs, values = plain(case, parts)
    for record, expected in zip(records, epochs, strict=True):
        for term, value in expected.items():
            np.testing.assert_allclose(
                getattr(record.train, term), value, rtol=2e-4, atol=1e-6, err_msg=term
            )
    start, found = _values(made(case)), _values(state.model)
    for after, value in zip(found, values, strict=True):
        scale = max(np.abs(value).max(), 1e-2)
        np.testing.assert_allclose(after / scale, value / scale, atol=5e-4)
    moved, expected = (
        np.concatenate([(b - a).ravel() for a, b in zip(start, end, strict=True)])
        for end in (found, values)
    )
    assert np.linalg.norm(moved - expected) < 2e-3 * np.linalg.norm(expected)


def check(name: str, mode: str, replicas: Replicas | None = None) -> None:
    """Raises AssertionError where a model in a mode does not do what the plain loop does."""
    case, options = CASES[name], MODES[mode]
    state = state_of(case, replicas)
    records = train(case, state, **options, replicas=replicas)
    compare(case, state, records, options.get("accumulate", 1))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args()
    replicas = None
    if asked.replicas > 1:
        config = tfloop.Config.make(strategy="mirrored", replicas=asked.replicas, batch_size=BATCH)
        replicas = make_replicas(config, None, 0)
    failed = 0
    for name in asked.names or CASES:
        for mode in asked.modes.split(","):
            started, found = time.perf_counter(), "as the plain loop"
            try:
                if reason := NOT_COMPARED.get((name, mode)):
                    found = f"not compared: {reason}"
                else:
                    check(name, mode, replicas)
            except AssertionError as error:
                failed, found = failed + 1, f"differs: {' '.join(str(error).split())[:120]}"
            print(
                f"{name:26} {mode:22} {time.perf_counter() - started:5.1f} s  {found}", flush=True
            )
    return failed


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
