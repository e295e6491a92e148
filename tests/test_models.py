import keras
import numpy as np
import pytest
import tensorflow as tf

from tfloop import models
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.models.normalization import batch_norm
from tfloop.randomness import Key, seed_of

pytestmark = pytest.mark.quick

SHAPE = (28, 28, 1)


def build(shape=SHAPE, classes=10, **settings):
    return models.build(Config.make(**settings), shape, classes)


def test_the_articles_first_network_has_96844_parameters():
    rows = models.table(build())
    assert [(name, count) for name, _, _, count in rows if count] == [
        ("conv1", 320),
        ("conv2", 18496),
        ("conv3", 36928),
        ("dense1", 40390),
        ("output", 710),
    ]
    assert sum(row[-1] for row in rows) == 96844
    assert ("dense1", "(70)", "kernel (576, 70), bias (70)", 40390) in rows


def test_names_are_those_of_stock_layers():
    trainable, moving = models.named_variables(build(batch_norm=True))
    assert list(trainable)[:4] == ["conv1/kernel", "conv1/bias", "norm1/gamma", "norm1/beta"]
    assert list(moving)[:2] == ["norm1/moving_mean", "norm1/moving_variance"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(output="sigmoid"),
        dict(batch_norm=True, dropout=0.5),
        dict(conv=(), pool=()),
        dict(
            conv=(3, 4),
            kernel=(5, 3),
            padding="same",
            conv_activation="elu",
            dense=(),
            dense_activation="tanh",
        ),
    ],
)
def test_forward_gives_the_logits_of_what_keras_computes(random, settings):
    model = build(**settings)
    images = random.normal(size=(5, *SHAPE)).astype(np.float32)
    ours = models.probabilities(model, models.outputs(model, images))
    np.testing.assert_allclose(ours, model(images, training=False), atol=1e-6)


def test_forward_names_every_layer_in_order(random):
    model = build(conv=(3,), pool=(2,))
    names = [
        name
        for name, *_ in models.activations(
            model, random.normal(size=(2, *SHAPE)).astype(np.float32)
        )
    ]
    assert names == ["conv1", "pool1", "flatten", "dense1", "output"]


def test_initial_weights_are_a_function_of_the_seed_alone():
    model = build()
    one, again, other = (models.initial_weights(model, seed) for seed in (1, 1, 2))
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
        assert name.endswith("bias") or (one[name] != other[name]).any()
    assert (one["conv2/kernel"].ravel()[:576] != one["conv3/kernel"].ravel()[:576]).any()


def test_initial_kernels_are_glorot_uniform():
    kernel = models.initial_weights(build(), 0)["dense1/kernel"]
    limit = (6 / (576 + 70)) ** 0.5
    assert np.abs(kernel).max() <= limit and np.abs(kernel).max() > 0.99 * limit
    assert kernel.std() == pytest.approx(limit / 3**0.5, rel=0.02)


@pytest.mark.parametrize("shape", [(6, 5, 3, 2), (6, 7, 2), (6, 2)])
def test_batch_normalisation_is_keras_own(shape):
    """Values, gradients and moving averages, of images and of what is none."""
    results = []
    for ours in (True, False):
        layer = keras.layers.BatchNormalization()
        model = keras.Sequential([keras.Input(shape[1:]), layer])
        layer.gamma.assign([1.5, 0.5]), layer.beta.assign([0.1, -0.2])
        x = tf.constant(np.random.default_rng(1).normal(2, 3, shape).astype(np.float32))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = models.outputs(model, x, True) if ours else layer(x, training=True)
            loss = tf.reduce_sum(tf.sin(y))
        gradients = tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])
        averages = [layer.moving_mean.value, layer.moving_variance.value]
        results.append([y, *gradients, *averages])
    for found, expected in zip(*results):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("after", ["", "relu", "relu6"])
@pytest.mark.parametrize("mean", [0.5, 2000.0])
def test_batch_normalisation_over_parts_is_that_of_the_whole_in_float64(after, mean):
    """With the ReLU behind it; also where the mean is a thousand times the deviation."""
    random = np.random.default_rng(1)
    x = random.normal(mean, 2, (6, 5, 3, 2))
    x[..., 1] = 7.0  # a channel that is constant
    layer = keras.layers.BatchNormalization()
    layer.build(x.shape)
    gamma, beta = np.array([2.5, 0.5]), np.array([2.0, -0.2])
    layer.gamma.assign(gamma), layer.beta.assign(beta)
    upstream = random.normal(size=x.shape)
    with tf.GradientTape() as tape:
        parts = [tf.constant(part.astype(np.float32)) for part in np.split(x, [1, 4])]
        tape.watch(parts)
        y = tf.concat(batch_norm(layer, parts, activation=after), axis=0)
        loss = tf.reduce_sum(y * upstream.astype(np.float32))
    *dx, dgamma, dbeta = tape.gradient(loss, [*parts, layer.gamma.value, layer.beta.value])

    x = x.astype(np.float32).astype(np.float64)
    variance = x.var(axis=(0, 1, 2))
    s = 1 / np.sqrt(variance + layer.epsilon)
    normed = (x - x.mean(axis=(0, 1, 2))) * s
    before = gamma * normed + beta
    limit = {"": np.inf, "relu": np.inf, "relu6": 6.0}[after]
    clipped = np.clip(before, 0 if after else -np.inf, limit)
    dy = upstream * (clipped == before)
    n = x.size / 2
    sums = dy.sum(axis=(0, 1, 2)), (dy * normed).sum(axis=(0, 1, 2))
    expected = gamma * s * (dy - (normed * sums[1] + sums[0]) / n)
    close = 1e-4 if mean < 10 else 5e-3  # float32 has 2e-4 at 2000
    np.testing.assert_allclose(y, clipped, atol=close, rtol=close)
    np.testing.assert_allclose(dbeta, sums[0], atol=10 * close)
    np.testing.assert_allclose(dgamma[0], sums[1][0], atol=10 * close)
    np.testing.assert_allclose(tf.concat(dx, axis=0)[..., 0], expected[..., 0], atol=10 * close)
    np.testing.assert_allclose(layer.moving_variance, 0.99 + 0.01 * variance, rtol=1e-3)


def test_dropout_is_a_function_of_the_key(random):
    model = build(dropout=0.5)
    images = random.normal(size=(3, *SHAPE)).astype(np.float32)
    one, again, other, off = (
        models.outputs(model, images, training, Key(seed_of(0, use))).numpy()
        for training, use in ((True, 1), (True, 1), (True, 2), (False, 1))
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any() and (one != off).any()


@pytest.mark.parametrize(
    "which, names",
    [
        ("dense", ["dense1", "output"]),
        ("conv", ["conv1", "conv2"]),
        ("all", ["conv1", "conv2", "dense1", "output"]),
        ("none", []),
    ],
)
def test_penalised_kernels_are_chosen_by_kind(which, names):
    model = build(conv=(2, 3), pool=())
    trainable, _ = models.named_variables(model)
    found = list(models.penalized(model, which, trainable))
    assert found == [f"{name}/kernel" for name in names]


def test_a_kernel_larger_than_its_input_is_named():
    with pytest.raises(
        UserError, match="kernel: conv3 has a 9×9 kernel, larger than its 5×5 input"
    ):
        build(kernel=(3, 3, 9))


def test_more_pools_than_the_image_allows_are_named():
    with pytest.raises(UserError, match="pool: pool3 is 4×4, larger than its 3×3 input"):
        build(pool=(2, 2, 4))


def test_a_stack_that_ends_in_a_softmax_layer_gives_logits(random):
    dense = keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((4,)), dense, keras.layers.Softmax()])
    x = random.normal(size=(2, 4)).astype(np.float32)
    np.testing.assert_allclose(models.outputs(model, x), dense(x))


def test_dropout_of_another_kind_is_left_to_keras(random):
    model = keras.Sequential(
        [keras.Input((4, 4, 2)), keras.layers.SpatialDropout2D(0.5, seed=1), keras.layers.Flatten()]
    )
    found = (
        models.outputs(model, tf.ones((8, 4, 4, 2)), True, Key(seed_of(0, 1)))
        .numpy()
        .reshape(8, 16, 2)
    )
    assert (found == found[:, :1]).all() and {0.0, 2.0} == set(found.ravel())
    assert not models.named_variables(model)[1]  # its seed comes from the step


def test_a_functional_model_that_ends_in_softmax_gives_logits(random):
    inputs, dense = keras.Input((4,)), keras.layers.Dense(2, activation="softmax")
    model = keras.Model(inputs, dense(inputs))
    x = random.normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_allclose(models.outputs(model, x), x @ dense.kernel, rtol=1e-6)
    np.testing.assert_array_equal(models.outputs(model, x, as_logits=False), model(x))


def test_any_keras_model_is_taken(random):
    inputs = keras.Input((4,))
    model = keras.Model(
        inputs, keras.layers.Dense(2)(keras.layers.Dropout(0.5)(inputs)), name="mine"
    )
    trainable, moving = models.named_variables(model)
    assert [name.split("/")[-1] for name in trainable] == ["kernel", "bias"] and not moving
    assert models.outputs(model, random.normal(size=(3, 4)).astype(np.float32)).shape == (3, 2)


def test_batch_norm_behind_a_mask_counts_what_keras_counts(random):
    layer, stock = (keras.layers.BatchNormalization(scale=False) for _ in range(2))
    x = random.normal(3, 5, size=(6, 4, 7)).astype(np.float32)
    for each in (layer, stock):
        each.build(x.shape)
    mask = tf.sequence_mask([4, 3, 1, 2, 4, 1], 4)
    (y,) = batch_norm(layer, [tf.constant(x)], mask)
    np.testing.assert_allclose(y, stock(x, training=True, mask=mask), rtol=1e-3, atol=1e-4)
    for one, other in zip(layer.non_trainable_variables, stock.non_trainable_variables):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_pooling_before_a_rising_activation_changes_nothing_and_before_batch_norm_it_does(random):
    images = random.normal(size=(4, 28, 28, 1)).astype(np.float32)
    first, after = (
        models.build(Config.make(pool_first=early), (28, 28, 1), 10) for early in (True, False)
    )
    first.set_weights(after.get_weights())
    np.testing.assert_array_equal(models.outputs(first, images), models.outputs(after, images))
    model = models.build(Config.make(pool_first=True, batch_norm=True), (28, 28, 1), 10)
    assert [layer.name for layer in model.layers][:5] == [
        "conv1",
        "pool1",
        "norm1",
        "activation1",
        "conv2",
    ]
    assert model.get_layer("norm1").input.shape[1:3] == (13, 13)
