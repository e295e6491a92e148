"""The fast forward pass against its plain twin: values and gradients, for every kind of layer
stack."""

import functools
import os
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfloop
from tfloop import models
from tfloop.config import Config
from tfloop.machine.devices import _hidden, choose, start
from tfloop.models.fast import used_pixels
from tfloop.models.program import program_of
from tfloop.randomness import Key, seed_of

fast = functools.partial(models.outputs, fast=True)
pytestmark = pytest.mark.quick

CASES = {
    "article2": ({}, (28, 28, 1)),
    "article3": (dict(conv=(64, 64, 128), dense=(120,)), (28, 28, 1)),
    "batch norm": (dict(batch_norm=True), (28, 28, 1)),
    "odd colour": (dict(conv=(4, 5), pool=(3, 2)), (23, 26, 3)),
    "5×5": (dict(kernel=(5, 3, 3)), (32, 32, 3)),
    "same": (dict(padding="same", pool=(2, 2, 2)), (28, 28, 1)),
    "sigmoid": (dict(conv_activation="sigmoid", output="sigmoid"), (28, 28, 1)),
    "elu, tanh, dropout": (
        dict(conv_activation="elu", dense_activation="tanh", dropout=0.5),
        (28, 28, 1),
    ),
    "pool first": (dict(pool_first=True, batch_norm=True, kernel=(5, 3, 3)), (28, 28, 1)),
    "pool first, plain": (dict(pool_first=True), (27, 28, 1)),
    "no pool": (dict(conv=(3, 4), pool=()), (9, 10, 1)),
    "dense": (dict(conv=(), pool=()), (6, 5, 1)),
}


def outputs_and_gradients(forward, model, images):
    """Logits, moving averages after it, and the gradient of Σ logits² / 2, by name."""
    trainable, moving = models.named_variables(model)
    with tf.GradientTape() as tape:
        found = forward(model, images, True, Key(seed_of(0, 1)))
        loss = tf.nn.l2_loss(found)
    gradients = tape.gradient(loss, trainable)
    return {"logits": found, **gradients, **{name: v.numpy() for name, v in moving.items()}}


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_twin(random, case, shards):
    settings, shape = CASES[case]
    images = tf.constant(random.normal(size=(8, *shape)).astype(np.float32))

    def found(forward):
        model = models.build(Config.make(**settings), shape, 10)
        return outputs_and_gradients(forward, model, images)

    plain = found(models.outputs)
    sharded = found(functools.partial(fast, shards=shards))
    largest = max(np.abs(value).max() for value in plain.values())
    for name, expected in plain.items():
        # A bias before batch normalisation has gradient 0, rounded.
        scale = max(np.abs(expected).max(), 0.1 * largest)
        np.testing.assert_allclose(sharded[name] / scale, expected / scale, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("rows", [8, 5, 1])
def test_batch_normalisation_sees_all_shards(random, rows, precision):
    images = tf.constant(random.normal(3, 2, size=(rows, 12, 12, 1)).astype(np.float32))

    def build(precision):
        small = dict(batch_norm=True, conv=(4, 5), pool=(2,), dense=(6,))
        return models.build(Config.make(**small, precision=precision), (12, 12, 1), 3)

    exact, plain = (
        outputs_and_gradients(models.outputs, build(p), images) for p in ("float32", precision)
    )
    sharded = outputs_and_gradients(functools.partial(fast, shards=3), build(precision), images)
    largest = max(np.abs(value).max() for value in exact.values())
    for name, expected in exact.items():
        rounding = 2e-5 * largest
        if precision == "mixed_bfloat16":
            # The first kernel's gradient is a small difference, a third off in one part, too.
            rounding = 1.5 * np.abs(plain[name] - expected).max() + (
                1e-3 if "moving_" in name else 0.1 * largest
            )
        np.testing.assert_allclose(sharded[name], expected, atol=rounding, err_msg=name)


def test_ties_go_where_the_twin_sends_them(random):
    """Integers and constant patches: whole windows of equal convolution outputs, and of outputs
    that ReLU cuts to 0."""
    images = np.repeat(np.repeat(random.integers(0, 2, (8, 7, 7, 1)), 4, axis=1), 4, axis=2).astype(
        np.float32
    )
    results = []
    for forward in (models.outputs, fast):
        model = models.build(Config.make(), (28, 28, 1), 10)
        for variable in models.named_variables(model)[0].values():
            variable.assign(tf.round(8 * variable) / 8)
        results.append(outputs_and_gradients(forward, model, images))
    for name, expected in results[0].items():
        np.testing.assert_allclose(
            results[1][name], expected, rtol=1e-5, atol=1e-4 * np.abs(expected).max(), err_msg=name
        )


def test_with_relu_even_values_that_the_bias_rounds_to_a_tie_go_to_the_first_place():
    """1 + 1e8 and 2 + 1e8 are one float32; the pool's gradient belongs to the pixel that comes
    first, the 1."""
    model = keras.Sequential(
        [
            keras.Input((2, 2, 1)),
            keras.layers.Conv2D(1, 1, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    for variable, value in zip(model.trainable_variables, (1.0, 1e8, 1.0, 0.0)):
        variable.assign(tf.fill(variable.shape, value))
    image = tf.constant([[1.0, 2.0], [2.0, 2.0]])[None, :, :, None]
    for forward in (models.outputs, fast):
        with tf.GradientTape() as tape:
            output = forward(model, image)
        kernel, bias, *_ = tape.gradient(output, model.trainable_weights)
        assert (float(tf.squeeze(kernel)), float(tf.squeeze(bias))) == (1.0, 1.0)


@pytest.mark.parametrize(
    "settings, shape, used",
    [
        ({}, (28, 28, 1), (26, 26)),
        (dict(pool=(2, 2, 2)), (28, 28, 1), (22, 22)),
        (dict(padding="same"), (28, 28, 1), (28, 28)),
        (dict(padding="same"), (30, 28, 1), (30, 28)),
        (dict(batch_norm=True), (28, 28, 1), (28, 28)),
        (dict(conv=(4,), pool=(3,)), (12, 10, 1), (11, 8)),
        (dict(conv=(), pool=()), (6, 5, 1), (6, 5)),
    ],
)
def test_used_pixels(settings, shape, used):
    model = models.build(Config.make(**settings), shape, 10)
    assert used_pixels(program_of(model)) == used


def test_pixels_beyond_the_used_ones_change_nothing_and_those_within_do(random):
    model = models.build(Config.make(), (28, 28, 1), 10)
    images = random.normal(size=(2, 28, 28, 1)).astype(np.float32)
    changed = images.copy()
    changed[:, 26:], changed[:, :, 26:] = 9, 9
    np.testing.assert_array_equal(models.outputs(model, changed), models.outputs(model, images))
    changed[:, 25, 25] = 9
    assert not np.array_equal(models.outputs(model, changed), models.outputs(model, images))


def test_layers_that_it_does_not_know_see_the_whole_batch(random):
    class Centre(keras.layers.Layer):
        def call(self, x):
            return x - tf.reduce_mean(x, axis=0)

    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), Centre(), keras.layers.Dense(2)]
    )
    x = random.normal(size=(6, 4)).astype(np.float32)
    np.testing.assert_allclose(fast(model, x, shards=3), model(x), atol=1e-6)


def test_strides_dilation_and_functional_models_are_left_to_keras(random):
    layers = keras.layers
    images = random.normal(size=(4, 12, 12, 1)).astype(np.float32)
    stack = keras.Sequential(
        [
            keras.Input((12, 12, 1)),
            layers.Conv2D(3, 3, strides=2, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(2, 2, dilation_rate=1),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    functional = keras.Model(stack.inputs, stack.outputs)
    for model in (stack, functional):
        np.testing.assert_allclose(fast(model, images, shards=2), model(images), atol=1e-6)


@pytest.mark.parametrize("relu", [layers.ReLU(), layers.ReLU(6.0), layers.Activation("relu6")])
@pytest.mark.parametrize("is_read_twice", [False, True])
def test_a_relu_behind_a_normalisation_goes_with_it_where_nothing_else_reads_that(
    random, relu, is_read_twice
):
    relu, images = type(relu).from_config(relu.get_config()), random.normal(size=(6, 8, 8, 3))
    inputs = keras.Input((8, 8, 3))
    normed = layers.BatchNormalization()(layers.Conv2D(4, 3)(inputs))
    x = layers.Add()([relu(normed), normed]) if is_read_twice else relu(normed)
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))
    plain, shared = (
        models.outputs(model, images.astype(np.float32), True, fast=fast, shards=2 if fast else 1)
        for fast in (False, True)
    )
    np.testing.assert_allclose(shared, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 500.0])
def test_many_shards_train_with_normalisation_and_penalties_that_come_and_go(random, mean):
    """Branches that are not taken in a compiled loop over steps, with sums of many in them."""
    x = random.normal(mean, 1, size=(64, 8, 8, 3)).astype(np.float32)
    data = tfloop.from_arrays(x, np.arange(64) % 10, x[:4], np.arange(4))
    results = []
    for shards in (1, 5):
        keras.utils.set_random_seed(1)
        stack = [layers.BatchNormalization(), layers.Conv2D(8, 3), layers.BatchNormalization()]
        model = keras.Sequential([keras.Input((8, 8, 3)), *stack, layers.ReLU()])
        for layer in (layers.Flatten(), layers.Dense(40), layers.Dense(10)):
            model.add(layer)
        state = tfloop.TrainState(model, tfloop.Optimizer("sgd", momentum=0.9), 0.01)
        loop = tfloop.Loop(state, data, batch_size=32, shards=shards)
        losses = [loop.fit(1).train.total]
        state.hyper["l2"].assign(0.01), state.hyper["l1"].assign(0.001)
        losses.append(loop.fit(2).train.total)
        state.hyper["l2"].assign(0.0)
        losses.append(loop.fit(3).train.total)
        assert loop.traces["train"] == 1
        results.append(losses)
    np.testing.assert_allclose(*results, rtol=2e-3)


@pytest.mark.parametrize(
    "settings, cores, shards, threads",
    [
        ({}, 2, 2, (1, 2)),
        ({}, 1, 1, (0, 0)),
        ({}, 16, 4, (4, 4)),
        (dict(batch_size=1024), 16, 16, (1, 16)),
        (dict(batch_size=256), 2, 4, (1, 2)),
        (dict(batch_size=192), 2, 4, (1, 2)),
        (dict(batch_size=128), 2, 2, (1, 2)),
        (dict(batch_size=1024), 2, 16, (1, 2)),
        (dict(batch_size=9000), 2, 32, (1, 2)),
        (dict(batch_size=256), 1, 4, (1, 1)),
        (dict(batch_size=1024, accumulate=16), 2, 2, (1, 2)),
        (dict(batch_size=32, accumulate=4), 2, 1, (0, 0)),
        (dict(batch_size=16), 2, 1, (0, 0)),
        (dict(batch_norm=True), 2, 2, (1, 2)),
        (dict(shards=2), 0, 1, (0, 0)),
        (dict(ensemble=2), 2, 1, (1, 2)),
        (dict(ensemble=8), 2, 1, (1, 2)),
        (dict(ensemble=2), 8, 4, (1, 8)),
        (dict(fast=False), 2, 1, (0, 0)),
        (dict(eager=True), 2, 1, (0, 0)),
        (dict(device="gpu"), 2, 1, (0, 0)),
        (dict(shards=1), 2, 1, (0, 0)),
        (dict(shards=2, intra_op_threads=2), 2, 2, (2, 2)),
    ],
    ids=str,
)
def test_shards_and_threads_are_chosen_once_and_can_be_set(settings, cores, shards, threads):
    chosen = choose(Config.make(**settings), cores)
    assert (chosen.shards, (chosen.intra_op_threads, chosen.inter_op_threads), chosen.onednn) == (
        shards,
        threads,
        "on",
    )
    assert choose(chosen, 64) == chosen


def test_a_shard_is_a_part_of_what_one_replica_of_one_worker_computes():
    def shards(**parts):
        return choose(Config.make(batch_size=1024), 2, **parts).shards

    assert (shards(), shards(workers=4), shards(replicas=2, workers=4)) == (16, 4, 2)


@pytest.mark.parametrize("asked, found", [(None, "0"), ("1", "1")])
def test_onednn_keeps_its_backward_primitives_unless_told_otherwise(monkeypatch, asked, found):
    name = "TF_MKL_OPTIMIZE_PRIMITIVE_MEMUSE"
    monkeypatch.setenv(name, asked or "")
    if asked is None:
        monkeypatch.delenv(name)
    start(Config.make())
    assert os.environ[name] == found


def test_what_keras_would_import_for_nothing_is_hidden_until_tensorflow_is_there(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with _hidden(
        "colorsys", "numpy"
    ):  # one that is not yet imported, as scikit-learn is then, and one that is
        with pytest.raises(ModuleNotFoundError):
            import colorsys
        assert sys.modules["numpy"] is np
    import colorsys

    assert colorsys.rgb_to_hsv(1, 0, 0) == (0, 1, 1)
