"""Models, losses, optimizers and schedules that users hand in: taken as Keras takes them, or
refused in one line that says why."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfloop
from tfloop import models
from tfloop.randomness import Key, seed_of
from tfloop.training import checkpoints

fast = functools.partial(models.outputs, fast=True)

L2 = keras.regularizers.L2(0.01)


def stack(*after, shape=(8, 8, 1)) -> keras.Sequential:
    return keras.Sequential([keras.Input(shape), *after])


def linear(**options) -> keras.Sequential:
    return stack(layers.Flatten(), layers.Dense(10, **options))


def functional(activation=None) -> keras.Model:
    inputs = keras.Input((8, 8, 1))
    return keras.Model(inputs, layers.Dense(10, activation=activation)(layers.Flatten()(inputs)))


class Doubled(layers.Dense):
    def call(self, x):
        return 2.0 * super().call(x)


class Least(layers.MaxPooling2D):
    def call(self, x):
        return -super().call(-x)


class Gated(keras.Model):
    """Its last layer is not what it ends in."""

    def __init__(self):
        super().__init__()
        self.flat, self.out, self.gate = (
            layers.Flatten(),
            layers.Dense(10),
            layers.Dense(64, "sigmoid"),
        )
        self(np.zeros((1, 8, 8, 1), np.float32))

    def call(self, images):
        x = self.flat(images)
        return self.out(x * self.gate(x))


@pytest.fixture
def train(digits):
    def train(model, *arguments, epochs=1, loop=None, **options):
        state = tfloop.TrainState(model, *arguments, **options)
        return state, tfloop.Loop(state, digits, **{"batch_size": 100, **(loop or {})}).fit(epochs)

    return train


# --- models


@pytest.mark.quick
@pytest.mark.parametrize(
    "model",
    [
        lambda: stack(layers.Flatten(), layers.Dense(16), Doubled(10)),
        lambda: stack(layers.Conv2D(4, 3), Least(2), layers.Flatten(), layers.Dense(10)),
        lambda: stack(
            layers.Conv2D(4, 3, activation=layers.LeakyReLU()),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(10),
        ),
        lambda: stack(
            layers.Conv2D(4, 3),
            layers.MaxPooling2D(2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
            shape=(None, None, 1),
        ),
        lambda: stack(layers.Flatten(), layers.Dense(10), shape=(8, 8)),
        Gated,
    ],
    ids=[
        "derived layer",
        "derived pool",
        "layer as activation",
        "any size",
        "no channels",
        "own class",
    ],
)
def test_a_model_gives_what_keras_gives(random, train, model):
    model, images = model(), tf.constant(random.normal(size=(6, 8, 8, 1)).astype(np.float32))
    expected = model(
        images[..., 0]
        if len((getattr(model, "inputs", None) and model.inputs[0].shape) or ()) == 3
        else images
    )
    for forward in (models.outputs, fast, lambda model, x: fast(model, x, shards=2)):
        np.testing.assert_allclose(forward(model, images), expected, rtol=1e-5, atol=1e-5)
    assert np.isfinite(train(model, "sgd", 0.01)[1].train.total)


@pytest.mark.quick
@pytest.mark.parametrize(
    "model, last",
    [
        (
            lambda: stack(
                layers.Flatten(),
                layers.EinsumDense("ab,bc->ac", (10,), activation="softmax", name="einsum"),
            ),
            "einsum",
        ),
        (lambda: linear(activation="softmax", activity_regularizer=L2, name="regular"), "regular"),
    ],
)
def test_a_softmax_that_cannot_be_left_out_is_refused(train, model, last):
    expected = rf"outputs are probabilities, those of a softmax \({last}.*; the loss takes logits"
    with pytest.raises(tfloop.UserError, match=expected):
        train(model())


def test_with_a_loss_of_ones_own_a_model_may_end_in_probabilities(train, digits):
    keras.utils.set_random_seed(0)
    model = functional("softmax")
    state, record = train(
        model, "sgd", 0.1, loss=keras.losses.sparse_categorical_crossentropy, epochs=2
    )
    assert record.test.accuracy > 0.5
    images = digits.test.inputs[:5]
    np.testing.assert_allclose(
        tfloop.predict(state, images), model(state.standardize(images)), rtol=1e-6
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_frozen_batch_normalisation_goes_by_its_averages_and_leaves_them(random, train, shards):
    model = stack(
        layers.Conv2D(4, 3), layers.BatchNormalization(), layers.Flatten(), layers.Dense(10)
    )
    model.layers[1].trainable = False
    model.layers[1].moving_mean.assign(random.normal(size=4))
    before, images = (
        model.layers[1].moving_mean.numpy(),
        tf.constant(random.normal(size=(6, 8, 8, 1)).astype(np.float32)),
    )
    np.testing.assert_allclose(
        fast(model, images, True, shards=shards),
        model(images, training=True),
        atol=1e-5,
    )
    train(model, loop=dict(shards=shards))
    np.testing.assert_array_equal(model.layers[1].moving_mean, before)


@pytest.mark.parametrize("settings", [dict(fast=False), {}, dict(shards=4)], ids=str)
def test_a_layers_own_loss_is_that_of_the_whole_batch(random, settings):
    model = stack(
        layers.Conv2D(4, 3, activation="relu", activity_regularizer=L2),
        layers.MaxPooling2D(2),
        layers.Flatten(),
        layers.Dense(10, activity_regularizer=L2),
    )
    images = tf.constant(random.normal(size=(8, 8, 8, 1)).astype(np.float32))
    model(images)
    expected = sum(float(loss) for loss in model.losses)
    forward = (
        models.outputs if settings.pop("fast", None) is False else lambda *a: fast(*a, **settings)
    )
    forward(model, images)
    assert (
        sum(float(loss) for loss in model.losses) == pytest.approx(expected, rel=1e-5)
        and expected > 0
    )


def test_frozen_kernels_are_not_penalised():
    model = stack(layers.Flatten(), layers.Dense(8), layers.Dense(10))
    model.layers[1].trainable = False
    assert [kernel.shape for kernel in tfloop.TrainState(model).kernels.values()] == [(8, 10)]


def test_what_is_called_kernel_and_is_none_is_left_alone(train):
    class Identity(layers.Layer):
        kernel = 3

        def call(self, x):
            return x

    assert np.isfinite(
        train(stack(layers.Flatten(), Identity(), layers.Dense(10)), l2=0.1)[1].train.total
    )


def test_a_functional_model_in_16_bits_returns_32(train):
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, layers.Dense(10, dtype="mixed_float16")(layers.Flatten()(inputs)))
    assert np.isfinite(train(model, scale_loss=True)[1].train.total)


@pytest.mark.parametrize("decorate", [lambda f: f, tf.function], ids=["plain", "tf.function"])
def test_a_module_that_asks_is_told_whether_it_is_trained(train, decorate):
    class Module(tf.Module):
        def __init__(self):
            super().__init__()
            self.w, self.told = tf.Variable(tf.zeros([64, 10])), set()

        @decorate
        def __call__(self, images, training=False):
            self.told.add(training)
            return tf.reshape(images, [-1, 64]) @ self.w

    model = Module()
    train(model)
    assert model.told == {True, False}


# --- losses and penalties


@pytest.mark.quick
@pytest.mark.parametrize(
    "options, expected",
    [
        (
            dict(label_smoothing=0.5, loss=lambda labels, outputs: tf.reduce_sum(outputs, 1)),
            "label_smoothing=0.5 belongs to the cross-entropy",
        ),
        (dict(penalize="denes"), "penalize=denes is unknown; choose from dense, conv, all, none"),
        (
            dict(penalize="none", penalties=[tf.reduce_sum]),
            "penalties: the model has no kernels that they could count, with penalize=none",
        ),
        (
            dict(penalties=[lambda kernel: kernel]),
            r"a penalty gives \(64, 10\), expected \(\): one number for the kernel",
        ),
        (dict(l2=-1), "l2=-1.0 is out of range: it must be at least 0"),
        (dict(ema=7), "ema=7.0 is out of range: it must be at least 0 and less than 1"),
        (dict(label_smoothing=3), "label_smoothing=3.0 is out of range"),
        (dict(schedule=-0.1), "learning_rate=-0.1 is out of range"),
    ],
)
def test_numbers_and_functions_that_do_not_fit_are_refused(train, options, expected):
    with pytest.raises(tfloop.UserError, match=expected):
        train(linear(), **options)


# --- optimizers and schedules


@pytest.mark.parametrize(
    "make, expected",
    [
        (
            lambda: keras.optimizers.SGD(loss_scale_factor=1024.0),
            "expects a loss that it has scaled",
        ),
        (
            lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
            "expects a loss that it has scaled",
        ),
        (
            lambda: keras.optimizers.SGD(gradient_accumulation_steps=2),
            "without gradient_accumulation_steps, and accumulate=… to the loop",
        ),
        (
            lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)),
            "its schedule to the state: schedule=…",
        ),
    ],
)
def test_what_the_loop_does_itself_a_keras_optimizer_must_not(make, expected):
    with pytest.raises(tfloop.UserError, match=expected):
        tfloop.TrainState(linear(), make())


@pytest.mark.parametrize("make", [lambda: tfloop.Optimizer("sgd"), keras.optimizers.SGD])
def test_an_optimizer_belongs_to_one_state(make):
    optimizer = make()
    tfloop.TrainState(linear(), optimizer)
    with pytest.raises(
        tfloop.UserError, match="belongs to another .*state already; make one for each"
    ):
        tfloop.TrainState(linear(), optimizer)


@pytest.mark.quick
def test_without_a_schedule_the_rate_is_the_keras_optimizers(train):
    assert train(linear(), keras.optimizers.SGD(0.5))[1].learning_rate == 0.5
    assert train(linear(), "sgd")[1].learning_rate == pytest.approx(0.001)


@pytest.mark.parametrize(
    "schedule, last",
    [
        (lambda step: 0.1 / (1.0 + step), 0.1 / 15),
        (keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5), 0.1 * 0.5**1.4),
    ],
)
def test_any_function_of_the_step_is_a_schedule(train, schedule, last):
    assert train(linear(), "sgd", schedule)[1].learning_rate == pytest.approx(last, rel=1e-5)


def test_keras_constraints_come_with_a_keras_optimizer(train):
    def limited():
        return linear(kernel_constraint=keras.constraints.MaxNorm(0.1), name="limited")

    with pytest.raises(
        tfloop.UserError,
        match="limited/kernel has a constraint, which Keras's optimizers alone apply",
    ):
        tfloop.TrainState(limited(), "sgd")
    state, _ = train(limited(), keras.optimizers.SGD(0.1))
    assert float(tf.reduce_max(tf.norm(state.weights["limited/kernel"], axis=0))) < 0.1001


@pytest.mark.parametrize(
    "name, numbers, expected",
    [
        (
            "piecewise",
            dict(learning_rate=0.1, boundaries=[10.0, 20.0], rates=[0.05]),
            "needs as many rates as boundaries; found 1 and 2",
        ),
        (
            "inverse_time",
            dict(learning_rate="fast"),
            "learning_rate: expected a number, found 'fast'",
        ),
        (
            lambda step: 0.1,
            dict(decay_rate=0.1),
            "decay_rate: a schedule that is a function takes a step alone",
        ),
    ],
)
def test_a_schedules_numbers_are_checked(name, numbers, expected):
    with pytest.raises(tfloop.UserError, match=expected):
        tfloop.Schedule(name, **numbers)


def test_a_rules_numbers_are_checked_and_none_is_the_default():
    assert float(tfloop.Optimizer("adam", beta_1=None).hyper["beta_1"]) == 0.9
    assert tfloop.Optimizer("sgd", nesterov=1)._switches == {"nesterov": True}
    with pytest.raises(tfloop.UserError, match="beta_1=1.5 is out of range"):
        tfloop.Optimizer("adam", beta_1=1.5)


# --- what is kept


@pytest.mark.parametrize(
    "optimizer",
    [lambda: "adam", keras.optimizers.Adam, keras.optimizers.Nadam],
    ids=["own", "Adam", "Nadam"],
)
def test_a_checkpoint_fits_the_same_model_made_again(train, tmp_path, optimizer):
    """Whatever the names: with dots, or counted by Keras for each process."""

    def make():
        return stack(layers.Flatten(), layers.Dense(10, name="fc.1"))

    state, _ = train(make(), optimizer())
    state.global_step.assign(10**8)
    path = tfloop.Checkpoints(state, tmp_path).save({})
    other = tfloop.TrainState(make(), optimizer())
    checkpoints.restore(other, path)
    assert other.digest() == state.digest() and checkpoints.newest(tmp_path)[0] == path


def test_tensorflows_own_checkpoint_keeps_a_state_whole(train, tmp_path):
    state, other = (
        train(linear(name="out"), ema=0.9)[0],
        tfloop.TrainState(linear(name="out"), ema=0.9),
    )
    tf.train.Checkpoint(state=other).read(
        tf.train.Checkpoint(state=state).write(str(tmp_path / "state"))
    )
    assert other.digest() == state.digest()


def test_predictions_are_those_of_the_weights_that_were_evaluated(train, digits):
    state, record = train(linear(), "sgd", 0.05, ema=0.99)
    raw = models.outputs(state.model, state.standardize(digits.test.inputs)).numpy().argmax(1)
    found = tfloop.predict(state, digits.test.inputs).argmax(1)
    assert (
        np.mean(found == digits.test.targets) == pytest.approx(record.test.accuracy, abs=1e-6)
        and (found != raw).any()
    )


# --- data


@pytest.mark.parametrize(
    "call, expected",
    [
        (
            lambda data: tfloop.TrainState(lambda images: images),
            "the model must be a keras.Model, or a tf.Module that can be called; found function",
        ),
        (lambda data: tfloop.TrainState(Gated), "can be called; found the class Gated"),
        (
            lambda data: tfloop.Loop(
                tfloop.TrainState(linear()), (data.train.inputs, data.train.targets)
            ),
            r"expected a tfloop.Dataset, found tuple; tfloop.from_arrays",
        ),
        (lambda data: tfloop.make_loop("digits"), "expected a tfloop.Config, found str"),
        (
            lambda data: tfloop.TrainState(linear(), penalties=tf.reduce_sum),
            "penalties: expected a list of functions",
        ),
        (
            lambda data: tfloop.TrainState(linear(), penalties=[0.1]),
            "penalties: expected a list of functions",
        ),
    ],
)
def test_what_is_no_model_data_or_function_is_named(digits, call, expected):
    with pytest.raises(tfloop.UserError, match=expected):
        call(digits)


def test_what_does_not_fit_the_data_is_named(train, digits):
    state = tfloop.TrainState(linear())
    loop = tfloop.Loop(state, digits)
    for call, expected in [
        (
            lambda: tfloop.Loop(
                tfloop.TrainState(stack(layers.Flatten(), layers.Dense(10), shape=(28, 28, 1))),
                digits,
            ),
            "the model takes images of 28×28×1, the data have 8×8×1",
        ),
        (
            lambda: tfloop.Loop(state, digits, batch_size=0),
            "batch_size=0 is out of range: it must be at least 1",
        ),
        (lambda: loop.evaluate(digits.test.take(slice(0, 0))), "there are no images to evaluate"),
        (
            lambda: loop.evaluate(
                tfloop.Split(digits.test.inputs / np.float32(2), digits.test.targets)
            ),
            "images to evaluate are float32, those of the training uint8",
        ),
        (lambda: tfloop.predict(state, digits.test.inputs[:0]), "there are no images to predict"),
    ]:
        with pytest.raises(tfloop.UserError, match=expected):
            call()


def test_arrays_may_be_lists():
    images = [[[1, 2], [3, 4]]] * 4
    assert len(tfloop.from_arrays(images, [0, 1, 0, 1], images[:2], [0, 1]).train) == 4


def check_as_keras(model, inputs, shards):
    """The model's outputs in training are those of Keras's call."""
    found = models.outputs(model, inputs, True, Key(seed_of(0, 1)), fast=True, shards=shards)
    np.testing.assert_allclose(found, model(inputs, training=True), atol=1e-5)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_nested_model_takes_its_inputs_by_name(random, shards):
    first, second = keras.Input((6,), name="z"), keras.Input((6,), name="a")
    inner = keras.Model([first, second], layers.Concatenate()([first, 0 * second]))
    inputs = keras.Input((6,))
    outputs = layers.Dense(2)(inner({"z": inputs, "a": layers.Dense(6)(inputs)}))
    images = tf.constant(random.normal(size=(8, 6)).astype(np.float32))
    check_as_keras(keras.Model(inputs, outputs), images, shards)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_nested_model_of_several_inputs_changes_types_and_axes(random, shards):
    floats, whole = keras.Input((4,)), keras.Input((4,), dtype="int32")
    inner = keras.Model([floats, whole], floats + keras.ops.cast(whole, "float32"))
    inputs = keras.Input((4, 1))
    outputs = layers.Dense(2)(inner([inputs, 3.7 * layers.Flatten()(inputs)]))
    images = tf.constant(random.normal(size=(8, 4, 1)).astype(np.float32))
    check_as_keras(keras.Model(inputs, outputs), images, shards)


class ByKeyword(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.out = (
            layers.BatchNormalization(),
            layers.Dropout(0.0),
            layers.Dense(2),
        )

    def call(self, inputs, training=False):
        x = self.norm(inputs=inputs, training=training)
        return self.out(inputs=self.drop(inputs=x, training=training))


def test_layers_may_be_called_by_keyword(random):
    model, images = ByKeyword(), tf.constant(random.normal(size=(8, 6)).astype(np.float32))
    model(images)
    check_as_keras(model, images, 1)


def test_a_causal_convolution_may_come_last(random):
    model = keras.Sequential(
        [keras.Input((10, 4)), layers.Conv1D(3, 3, padding="causal", activation="sigmoid")]
    )
    inputs = random.normal(size=(64, 10, 4)).astype(np.float32)
    data = tfloop.from_arrays(inputs, inputs[..., :3] > 0, inputs[:8], inputs[:8, :, :3] > 0)
    loop = tfloop.Loop(tfloop.TrainState(model, "adam", 0.05), data, batch_size=16)
    first, last = loop.fit(1), loop.fit(20)
    assert last.train.total < 0.9 * first.train.total


def test_batch_normalisation_in_16_bits_throughout(random):
    norm = layers.BatchNormalization(dtype="bfloat16")
    inputs = keras.Input((4, 4, 3), dtype="bfloat16")
    model = keras.Model(inputs, norm(inputs))
    images = tf.constant(random.normal(size=(8, 4, 4, 3)), tf.bfloat16)
    found = models.outputs(model, images, True, Key(seed_of(0, 1)), fast=True)
    np.testing.assert_allclose(found, tf.cast(model(images, training=True), tf.float32), atol=0.05)


def test_an_evaluation_leaves_weights_of_64_bits_as_they_are(random):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2, dtype="float64")])
    inputs = random.normal(size=(64, 6)).astype(np.float32)
    data = tfloop.from_arrays(inputs, (inputs[:, 0] > 0).astype(int), inputs, inputs[:, 0] > 0)
    state = tfloop.TrainState(model, "adam", 0.01, ema=0.9)
    loop = tfloop.Loop(state, data, batch_size=16)
    loop.fit(1)
    before = state.digest("weights")
    loop.evaluate(data.test)
    assert state.digest("weights") == before
