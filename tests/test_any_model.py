"""What a step does for the models that people bring is what a plain GradientTape loop does.

`own_models` has the models and the plain loop; run as a script it tries all of them in all modes.
"""

import gc
import os
import subprocess
import sys
import types
import warnings
import weakref

import keras
import numpy as np
import own_models
import pytest
import tensorflow as tf
from keras import layers
from own_models import CASES, MODES, NOT_COMPARED, data_for, made, state_of

import tfloop
from tfloop import models
from tfloop.models.inside import seed_generators
from tfloop.step import accumulated
from tfloop.training import checkpoints

# In full it is `python tests/own_models.py`: MobileNetV2 takes half a minute in each mode.
NAMES = [name for name in CASES if name != "MobileNetV2"]
QUICK = {("functional ResNet", "compiled"), ("subclass", "shards=2")}
PAIRS = [
    pytest.param(name, mode, marks=[pytest.mark.quick] if (name, mode) in QUICK else [])
    for name in NAMES
    for mode in MODES
]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- the plain loop is the judge


@pytest.mark.parametrize("name, mode", PAIRS)
def test_weights_averages_and_loss_terms_are_the_plain_loops(name, mode):
    """Two epochs, whose last batch has 3 of 4 rows."""
    if (name, mode) in NOT_COMPARED:
        pytest.skip(NOT_COMPARED[name, mode])
    own_models.check(name, mode)


@pytest.mark.parametrize("replicas", [2])
def test_on_replicas_they_are_the_plain_loops_too(replicas):
    """With four, the last batch has fewer rows than there are replicas."""
    names = NAMES[::2]
    flags = [f"--replicas={replicas}", "--modes=compiled", *names]
    process = subprocess.run(
        [sys.executable, own_models.__file__, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.returncode == 0, process.stdout + process.stderr[-2000:]
    assert process.stdout.count("as the plain loop") == len(names)


@pytest.mark.parametrize("name", NAMES)
def test_reset_and_resume_repeat_the_run_bit_for_bit(name, tmp_path):
    case = CASES[name]
    if case.thaws:
        pytest.skip("the next test has it")
    state = state_of(case)
    loop = tfloop.Loop(state, data_for(case), batch_size=4, steps_per_call=2)
    saver = checkpoints.Checkpoints(state, tmp_path)
    for record in loop.run(2):
        if isinstance(record, tfloop.Call) and record.step == 5:
            path = saver.save({})
    digest = state.digest("weights", "moving", "slots")
    state.reset()
    loop.fit(2)
    assert state.digest("weights", "moving", "slots") == digest

    other = state_of(case)
    resumed = tfloop.Loop(other, data_for(case), batch_size=4, steps_per_call=1)
    checkpoints.restore(other, path)
    assert int(other.global_step) == 5
    resumed.fit(2)
    assert other.digest("weights", "moving", "slots") == digest


def test_a_phase_with_more_weights_is_resumed_where_its_model_is_unfrozen(tmp_path):
    case = CASES["frozen, then unfrozen"]
    state = state_of(case)
    loop = tfloop.Loop(state, data_for(case), batch_size=4)
    loop.fit(1)
    frozen = checkpoints.Checkpoints(state, tmp_path / "frozen").save({})
    state.model.get_layer("base").trainable = True
    loop.fit(2)
    thawed = checkpoints.Checkpoints(state, tmp_path / "thawed").save({})
    loop.fit(3)

    other = state_of(case)
    with pytest.raises(tfloop.UserError, match=r"base/.* was trained .* trainable = True before"):
        checkpoints.restore(other, thawed)
    other.model.get_layer("base").trainable = True
    other.follow_model()
    with pytest.raises(tfloop.UserError, match=r"base/.* was frozen .* trainable = False before"):
        checkpoints.restore(other, frozen)
    checkpoints.restore(other, thawed)
    tfloop.Loop(other, data_for(case), batch_size=4).fit(3)
    assert other.digest("weights", "slots") == state.digest("weights", "slots")


# --- rows that were never in the data


def rows_of_ones() -> tfloop.Dataset:
    x = np.array([1, 1, 4], np.float32).reshape(3, 1, 1, 1)
    return tfloop.from_arrays(x, [0, 1, 0], x, [0, 1, 0], standardize=False)


def test_what_layers_add_to_the_loss_is_that_of_the_rows_that_there_are():
    """Of the images 1, 1 and 4 the mean of the squares is 6, and 1 or 16 for the last alone."""
    square = keras.regularizers.L2(1.0)
    one = layers.Dense(1, use_bias=False, kernel_initializer="ones", activity_regularizer=square)
    head = layers.Dense(2, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((1, 1, 1)), layers.Flatten(), one, head])
    loop = tfloop.Loop(
        tfloop.TrainState(model, "sgd", 0.0), rows_of_ones(), batch_size=2, steps_per_call=1
    )
    *calls, epoch = loop.run(1)
    last = float(loop.batch(1).inputs[0, 0, 0, 0])
    assert len(loop.batch(1).targets) == 1
    assert calls[1].train.model == pytest.approx(last**2)
    assert epoch.train.model == epoch.test.model == pytest.approx(6.0)


@pytest.mark.parametrize("evaluation_batch_size, rows", [(0, {2, 1}), (3, {3}), (8, {3})])
def test_an_evaluation_takes_no_more_rows_than_asked_for(evaluation_batch_size, rows):
    class Rows(tf.Module):
        def __init__(self):
            super().__init__()
            self.w, self.seen = tf.Variable(tf.zeros([1, 2])), []

        def __call__(self, x):
            self.seen.append(x.shape[0])
            return tf.reshape(x, [-1, 1]) @ self.w

    model = Rows()
    loop = tfloop.Loop(
        tfloop.TrainState(model, "sgd"),
        rows_of_ones(),
        batch_size=2,
        evaluation_batch_size=evaluation_batch_size,
    )
    model.seen.clear()
    loop.evaluate(loop.data.test)
    assert set(model.seen) == rows and loop.traces["evaluate"] == 1


def test_the_epochs_own_loss_does_not_depend_on_the_steps_of_a_call(loop):
    one, many = loop(steps_per_call=1), loop(steps_per_call=7)
    assert one.fit(2).train == many.fit(2).train


def test_what_a_users_code_does_in_a_step_is_done_once_a_step(digits):
    counter = tf.Variable(0)

    def loss(labels, outputs):
        counter.assign_add(1)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, outputs)

    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(10)])
    loop = tfloop.Loop(tfloop.TrainState(model, "sgd", loss=loss), digits, batch_size=500)
    for _ in loop.train_epoch():
        pass
    assert int(counter) == loop.steps == 3


# --- gradients that do not exist


def unused(**options) -> keras.Model:
    """A model with a layer that the outputs do not depend on."""
    inputs = keras.Input((8, 8, 1))
    x = layers.Flatten()(inputs)
    off = Stopped()(layers.Dense(10, name="off", **options)(x))
    return keras.Model(inputs, layers.Add()([layers.Dense(10, name="on")(x), off]))


class Stopped(layers.Layer):
    def call(self, x):
        return 0.0 * tf.stop_gradient(x)


def test_a_weight_without_a_gradient_is_named_and_left_as_it_is(digits):
    model = unused()
    before = model.get_layer("off").get_weights()
    state = tfloop.TrainState(model, "adamw", 0.01, l2=0.1, ema=0.9)
    loop = tfloop.Loop(state, digits, batch_size=400)
    with pytest.warns(UserWarning, match="does not depend on off/kernel, off/bias: not trained"):
        warnings.simplefilter("always")
        loop.fit(1)
    assert state.without_gradient == ("off/kernel", "off/bias")
    assert list(state.kernels) == ["on/kernel"] and list(state.weights) == ["on/kernel", "on/bias"]
    for variable, value in zip(model.get_layer("off").weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    seen = {
        name: g
        for layer in tfloop.debug.backward(state, loop.batch(0))
        for name, g in layer.gradients.items()
    }
    assert seen["off/kernel"] is None and seen["on/kernel"] is not None


def test_what_had_no_gradient_is_known_to_a_checkpoint(digits, tmp_path):
    state = tfloop.TrainState(unused(), "adamw", 0.01)
    tfloop.Loop(state, digits, batch_size=400).fit(1)
    path = checkpoints.Checkpoints(state, tmp_path).save({})
    other = tfloop.TrainState(unused(), "adamw", 0.01)
    checkpoints.restore(other, path)
    assert other.without_gradient == state.without_gradient
    assert other.digest() == state.digest()


@pytest.mark.parametrize("options", [{}, {"eager": True}, {"accumulate": 2}], ids=str)
def test_without_any_gradient_nothing_is_trained(digits, options):
    def loss(labels, outputs):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, tf.stop_gradient(outputs))

    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(10)])
    state = tfloop.TrainState(model, keras.optimizers.SGD(0.5), loss=loss)
    with pytest.raises(tfloop.UserError, match="no weight has a gradient: .*dense.*/kernel") as e:
        tfloop.Loop(state, digits, **options).fit(1)
    assert e.value.__context__ is None  # one line, not two errors
    assert int(state.global_step) == 0


# --- what the model says counts when it says it


@pytest.mark.parametrize("optimizer", ["nadam", lambda: keras.optimizers.Nadam(0.001)])
def test_trainable_counts_from_the_next_call_on_and_slots_stay(digits, optimizer):
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(6, name="a"), layers.Dense(10)]
    )
    made_one = optimizer if isinstance(optimizer, str) else optimizer()
    state = tfloop.TrainState(model, made_one, ema=0.9)
    loop = tfloop.Loop(state, digits, batch_size=400, steps_per_call=1)
    loop.fit(1)
    slots = slots_of(state)
    model.get_layer("a").trainable = False
    with pytest.warns(UserWarning, match="step is traced again: a/kernel, a/bias no longer"):
        warnings.simplefilter("always")
        records = loop.run(2)
        frozen = model.get_layer("a").get_weights()
        next(records)
    for variable, value in zip(model.get_layer("a").weights, frozen, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert loop.traces["train"] == 2 and "a/kernel" not in state.weights
    model.get_layer("a").trainable = True
    state.follow_model()
    kept = slots_of(state)
    assert np.abs(kept[-10:] - slots[-10:]).max() < 1.0 and np.abs(kept[-10:]).max() > 0
    for _ in records:
        pass
    assert np.abs(model.get_layer("a").get_weights()[0] - frozen[0]).max() > 0


def slots_of(state: tfloop.TrainState) -> np.ndarray:
    vectors = [v.numpy().ravel() for v in state.optimizer.slots.values() if v.shape.rank]
    return np.concatenate(vectors)


class Linear(layers.Layer):
    """As in Keras's guide: its weights are called w and b."""

    def __init__(self, units):
        super().__init__()
        self.units = units

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], self.units), initializer="ones")
        self.b = self.add_weight(shape=(self.units,), initializer="ones")

    def call(self, x):
        return x @ self.w + self.b


@pytest.mark.quick
@pytest.mark.parametrize(
    "stack, names",
    [
        ([layers.Flatten(), Linear(3)], ["linear/variable"]),
        (
            [layers.SeparableConv2D(2, 3), layers.Flatten(), layers.Dense(3, use_bias=False)],
            ["depthwise_kernel", "pointwise_kernel", "kernel"],
        ),
        ([layers.Reshape((4, 4)), layers.GRU(3)], ["kernel", "recurrent_kernel"]),
        ([layers.Flatten(), layers.Embedding(3, 2), layers.Flatten()], ["embeddings"]),
        (
            [
                layers.Reshape((4, 4)),
                layers.LayerNormalization(axis=[1, 2]),
                layers.Flatten(),
                layers.Dense(3),
            ],
            ["kernel"],
        ),
    ],
    ids=["own layer", "separable", "recurrent", "embedding", "normalisation"],
)
def test_penalties_count_what_layers_multiply_by_whatever_its_name(stack, names):
    state = tfloop.TrainState(keras.Sequential([keras.Input((4, 4, 1)), *stack]), l2=1.0)
    assert len(state.kernels) == len(names)
    for kernel, name in zip(state.stable(state.kernels), names, strict=True):
        assert kernel.endswith(name)
    total = tfloop.losses(state, tf.constant(0.0), tf.constant(0.0)).l2
    expected = sum(float(tf.reduce_sum(k**2)) for k in state.kernels.values())
    assert float(total) == pytest.approx(expected, rel=1e-5) and expected > 0


def test_the_user_names_what_is_penalised():
    def penalised(penalize):
        shared = layers.Dense(64, name="shared")
        inputs = keras.Input((8, 8, 1))
        x = shared(shared(layers.Flatten()(inputs)))
        model = keras.Model(inputs, layers.Dense(10, name="head")(x))
        return list(tfloop.TrainState(model, penalize=penalize(model)).kernels)

    assert penalised(lambda m: "all") == ["shared/kernel", "head/kernel"]
    assert penalised(lambda m: [m.get_layer("head")]) == ["head/kernel"]
    assert penalised(lambda m: [m.get_layer("shared").bias]) == ["shared/bias"]
    assert penalised(lambda m: lambda v: "head" in v.path) == ["head/kernel", "head/bias"]
    assert penalised(lambda m: m.get_layer("head").kernel) == ["head/kernel"]
    with pytest.raises(tfloop.UserError, match="penalize: 'bias' is no variable or layer"):
        penalised(lambda m: ["bias"])


# --- logits and probabilities, one output


def ends_in(*last, first=None) -> keras.Model:
    return keras.Sequential(
        [keras.Input((1, 2, 1)), layers.Flatten(), first or layers.Dense(2), *last]
    )


def by_ops() -> keras.Model:
    inputs = keras.Input((1, 2, 1))
    return keras.Model(inputs, keras.ops.softmax(layers.Dense(2)(layers.Flatten()(inputs))))


class SoftmaxInside(keras.Model):
    def __init__(self):
        super().__init__()
        self.flat, self.out = layers.Flatten(), layers.Dense(2, "softmax")
        self(np.zeros((1, 1, 2, 1), np.float32))

    def call(self, x):
        return self.out(self.flat(x))


class SoftmaxModule(tf.Module):
    def __init__(self):
        super().__init__()
        self.w = tf.Variable(tf.zeros([2, 2]))

    def __call__(self, x):
        return tf.nn.softmax(tf.reshape(x, [-1, 2]) @ self.w)


def two_classes() -> tfloop.Dataset:
    x = np.eye(2, dtype=np.float32).repeat(5, 0).reshape(10, 1, 2, 1)
    y = np.arange(10) // 5
    return tfloop.from_arrays(x, y, x, y, standardize=False)


@pytest.mark.quick
@pytest.mark.parametrize(
    "make",
    [
        lambda: ends_in(layers.Softmax()),
        lambda: ends_in(first=layers.Dense(2, "softmax")),
        lambda: ends_in(
            layers.Activation("linear", dtype="float32"), first=layers.Dense(2, "softmax")
        ),
        lambda: ends_in(first=layers.Dense(2, tf.nn.softmax)),
        lambda: ends_in(first=layers.Dense(2, layers.Softmax())),
        by_ops,
    ],
    ids=["Softmax", "Dense", "Activation behind", "tf.nn", "layer as activation", "keras.ops"],
)
def test_a_last_softmax_that_the_graph_shows_is_left_out(make):
    """Taken for logits, probabilities would keep the loss above ln(1 + 1/e) = 0.3133."""
    state = tfloop.TrainState(make(), "adam", 0.3)
    record = tfloop.Loop(state, two_classes(), batch_size=10).fit(100)
    assert record.train.data < 0.01
    shares = tfloop.predict(state, two_classes().test.inputs)
    np.testing.assert_allclose(shares, state.model(two_classes().test.inputs), atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize(
    "make",
    [
        SoftmaxInside,
        SoftmaxModule,
        lambda: ends_in(layers.Dropout(0.1), first=layers.Dense(2, "softmax")),
        lambda: ends_in(layers.Reshape((2,)), first=layers.Dense(2, "softmax")),
    ],
    ids=["subclass", "tf.Module", "Dropout behind", "Reshape behind"],
)
def test_probabilities_that_cannot_be_undone_are_noticed_by_their_values(make):
    state = tfloop.TrainState(make(), "adam", 0.3)
    with pytest.raises(tfloop.UserError, match="outputs are probabilities, those of a softmax"):
        tfloop.Loop(state, two_classes(), batch_size=10)


def test_a_loss_of_ones_own_is_handed_what_the_model_gives():
    weights = np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32)
    data, loss = two_classes(), keras.losses.sparse_categorical_crossentropy
    for make in (lambda: ends_in(first=layers.Dense(2, "softmax")), by_ops):
        model = make()
        model.trainable_variables[0].assign(weights)
        state = tfloop.TrainState(model, "sgd", 0.0, loss=loss)
        record = tfloop.Loop(state, data, batch_size=10).fit(1)
        expected = np.mean(loss(data.train.targets, model(data.train.inputs)))
        assert record.train.data == pytest.approx(expected, rel=1e-5)


def test_one_output_has_no_accuracy_and_is_predicted_as_it_is():
    model = keras.Sequential([keras.Input((1, 2, 1)), layers.Flatten(), layers.Dense(1)])
    state = tfloop.TrainState(model, "adam", 0.1, loss=lambda y, o: tf.square(o[:, 0] - 3.0))
    record = tfloop.Loop(state, two_classes(), batch_size=10).fit(200)
    assert record.train.accuracy is None and record.test.accuracy is None
    np.testing.assert_allclose(tfloop.predict(state, two_classes().test.inputs), 3.0, rtol=1e-2)


def test_targets_that_are_no_class_numbers_are_kept_as_they_are():
    """Four targets from 0 to 1; a model that gives 0 has the mean of their squares as its error."""
    y = np.linspace(0, 1, 4)
    data = tfloop.from_arrays(np.zeros((4, 1)), y, standardize=False)
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    loop = tfloop.Loop(tfloop.TrainState(model, "sgd", 0.0), data, batch_size=4)
    assert loop.batch(0).targets.dtype == tf.float32
    assert loop.fit(1).train.data == pytest.approx(np.mean(y**2))


@pytest.mark.quick
@pytest.mark.parametrize("shows_graph", [True, False])
def test_a_loop_calls_the_model_once_before_it_trains(shows_graph):
    """On as many rows as a batch has, whether it shows its graph or not."""
    rows = []

    class Counting(layers.Layer):
        def call(self, x):
            if tf.executing_eagerly():
                rows.append(int(x.shape[0]))
            return x

    class Whole(keras.Model):
        def __init__(self):
            super().__init__()
            self.counting, self.dense = Counting(), layers.Dense(2)

        def call(self, x):
            return self.dense(layers.Flatten()(self.counting(x)))

    if shows_graph:
        model = keras.Sequential(
            [keras.Input((1, 2, 1)), Counting(), layers.Flatten(), layers.Dense(2)]
        )
    else:
        model = Whole()
        model(np.zeros((1, 1, 2, 1), np.float32))
    rows.clear()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    tfloop.Loop(tfloop.TrainState(model, loss=loss), two_classes(), batch_size=5)
    assert rows == [5]


@pytest.mark.quick
def test_targets_that_are_not_what_the_data_set_says_are_refused():
    part = tfloop.Split(np.zeros((4, 1), np.float32), np.linspace(0, 1, 4))
    scale = tfloop.Standardizer.identity((1,))
    data = tfloop.Dataset("line", part, part, part, 2, scale)  # 2 classes
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2)])
    with pytest.raises(tfloop.UserError, match=r"training targets: found float64 \(4,\)"):
        tfloop.Loop(tfloop.TrainState(model), data, batch_size=4)


# --- training or not, seeds, types, names


@pytest.mark.quick
def test_a_model_is_told_of_training_however_it_takes_it():
    class Net(tf.Module):
        def __init__(self):
            super().__init__()
            self.w, self.told = tf.Variable(tf.zeros([2])), set()

        def __call__(self, x, training=False):
            self.told.add(training)
            return tf.zeros([tf.shape(x)[0], 2]) + self.w

    class HandsOn(tf.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def __call__(self, *arguments, **options):
            return self.net(*arguments, **options)

    class OtherWord(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(tf.zeros([2]))

        def __call__(self, x, is_training=False):
            return tf.zeros([tf.shape(x)[0], 2]) + self.w

    net = Net()
    for model in (net, HandsOn(net)):
        net.told.clear()
        tfloop.Loop(tfloop.TrainState(model, "sgd"), two_classes(), batch_size=10).fit(1)
        assert net.told == {True, False}
    with pytest.raises(tfloop.UserError, match="takes is_training; name it training"):
        tfloop.TrainState(OtherWord())


def noisy() -> keras.Model:
    inputs = keras.Input((8, 8, 1))
    x = layers.RandomFlip()(layers.GaussianNoise(0.3)(inputs))
    x = layers.Reshape((8, 8))(x)
    x = layers.MultiHeadAttention(2, 4, dropout=0.3)(x, x)
    x = layers.LSTM(6, dropout=0.2)(x)
    return keras.Model(inputs, layers.Dense(10)(layers.SpatialDropout1D(0.2)(x[:, None])[:, 0]))


def test_all_random_numbers_of_keras_are_a_function_of_the_seed(digits):
    """In two models with other seeds of their own, made one after the other."""
    digests = []
    for seed in (0, 0, 1):
        keras.utils.set_random_seed(3)
        model = noisy()
        keras.utils.set_random_seed(len(digests))
        for generator in seed_generators(model):
            generator.state.assign([len(digests), 9])
        state = tfloop.TrainState(model, "sgd", 0.1, seed=seed)
        tfloop.Loop(state, digits, batch_size=500).fit(1)
        digests.append(state.digest("weights"))
    assert digests[0] == digests[1] != digests[2]


def test_random_layers_draw_for_a_part_what_they_draw_for_the_whole(digits):
    keras.utils.set_random_seed(3)
    state = tfloop.TrainState(noisy(), "sgd", 0.1)
    batch = tfloop.Loop(state, digits, batch_size=60).batch(2)
    whole = tfloop.forward_and_backward(state, batch)
    again = tfloop.forward_and_backward(state, batch)
    np.testing.assert_array_equal(again.gradients.flat, whole.gradients.flat)
    parts = accumulated(tfloop.forward_and_backward, 7)(state, batch)
    assert float(parts.loss.data) == pytest.approx(float(whole.loss.data), rel=1e-5)
    np.testing.assert_allclose(parts.gradients.flat, whole.gradients.flat, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_kerass_global_policy_trains(digits, policy):
    keras.config.set_dtype_policy(policy)
    try:
        inputs = [keras.Input((8, 8, 1)), layers.Conv2D(8, 3, activation="relu")]
        norm = [layers.BatchNormalization(), layers.Flatten()]
        last = [layers.Dense(10), layers.Activation("softmax", dtype="float32")]
        model = keras.Sequential([*inputs, *norm, *last])
    finally:
        keras.config.set_dtype_policy("float32")
    state = tfloop.TrainState(
        model,
        "adam",
        0.01,
        l2=1e-4,
        ema=0.9,
        scale_loss=policy == "mixed_float16",
        standardizer=digits.standardizer,
    )
    for shards in (1, 2):
        state.reset()
        assert tfloop.Loop(state, digits, shards=shards).fit(3).test.accuracy > 0.9


def test_the_same_model_made_again_is_the_same_model(tmp_path):
    def make():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((8, 8, 1))
        x = layers.Bidirectional(layers.GRU(3))(layers.Reshape((8, 8))(inputs))
        x = Linear(6)(layers.Dense(6)(x))
        return tfloop.TrainState(keras.Model(inputs, layers.Dense(10)(x)), "adam")

    first, again = make(), make()
    assert list(first.weights) != list(again.weights)  # Keras counts on
    assert first.digest() == again.digest() and first.named().keys() == again.named().keys()
    first.weights[next(iter(first.weights))].assign_add(tf.ones([8, 9]))
    checkpoints.restore(again, checkpoints.Checkpoints(first, tmp_path).save({}))
    assert first.digest() == again.digest()


# --- one engine


def test_the_way_back_through_a_resnet_names_every_layer():
    case = CASES["functional ResNet"]
    state = state_of(case)
    batch = tfloop.Loop(state, data_for(case), batch_size=4).batch(0)
    layers_back = list(tfloop.debug.backward(state, batch))
    calls = [layer.name for layer in state.model.layers[1:]]
    assert [layer.name for layer in layers_back] == calls[::-1]
    found = {name: g.total for layer in layers_back for name, g in layer.gradients.items()}
    for name, expected in tfloop.forward_and_backward(state, batch).gradients.parts().items():
        scale = np.abs(expected).max() + 1e-3
        np.testing.assert_allclose(found[name] / scale, expected / scale, atol=1e-4)


def test_layers_that_a_users_own_code_calls_are_seen_too():
    case = CASES["subclass"]
    state = state_of(case)
    batch = tfloop.Loop(state, data_for(case), batch_size=4).batch(0)
    back = {layer.name: layer for layer in tfloop.debug.backward(state, batch)}
    names = [layer.name for layer in state.model.layers]
    assert list(back)[::-1] == names
    owned = {name.split("/")[0]: list(layer.gradients) for name, layer in back.items()}
    assert [len(owned[name]) for name in names] == [2, 2, 0, 2]


@pytest.mark.parametrize("name", ["nested Sequential", "frozen, then unfrozen", "shared layer"])
def test_a_model_in_a_model_gives_what_keras_gives(name):
    case, model = CASES[name], made(CASES[name])
    x = tf.constant(data_for(case).train.inputs)
    for training in (False, True):
        expected, added = model(x, training=training), [float(v) for v in model.losses]
        for options in ({}, {"fast": True}, {"fast": True, "shards": 3}):
            found = models.outputs(model, x, training, **options)
            np.testing.assert_allclose(found, expected, atol=2e-5)
            assert [float(v) for v in models.added_losses(model)] == pytest.approx(added)


def test_parts_of_a_split_are_not_taken_for_each_other(random):
    """TensorFlow's optimizer reads max-pool(relu(second part)) as that of the first."""

    class Doubled(layers.Layer):
        def call(self, x):
            return 2.0 * x

    stack = [Doubled(), layers.ReLU(), layers.MaxPooling2D(2), layers.Flatten()]
    model = keras.Sequential([keras.Input((8, 8, 2)), *stack])
    x = tf.constant(random.normal(size=(6, 8, 8, 2)).astype(np.float32))
    compiled = tf.function(lambda x: models.outputs(model, x, fast=True, shards=3))
    np.testing.assert_allclose(compiled(x), model(x), rtol=1e-6)


# --- Keras's optimizers, and one line for a mistake


class Scalar(tf.Module):
    def __init__(self):
        super().__init__()
        self.w = tf.Variable(0.0)

    def __call__(self, x):
        return tf.zeros([tf.shape(x)[0], 2]) + self.w


def moves(optimizer, rate, change) -> list[float]:
    """How far each of four steps goes, where `change` is called after the second."""
    model, last, found = Scalar(), 0.0, []
    state = tfloop.TrainState(model, optimizer, rate, loss=lambda y, outputs: outputs[:, 0])
    x = np.zeros((8, 1, 1, 1), np.float32)
    data = tfloop.from_arrays(x, np.arange(8) % 2, x, np.arange(8) % 2)
    for record in tfloop.Loop(state, data, batch_size=2, steps_per_call=1).train_epoch():
        found.append(last - float(model.w))
        last = float(model.w)
        if record.batch_index == 2:
            change()
    return found


@pytest.mark.quick
def test_a_rate_that_is_set_between_steps_counts():
    optimizer, variable = keras.optimizers.SGD(0.1), tf.Variable(0.1)
    right = pytest.approx([0.1, 0.1, 0.01, 0.01], rel=1e-5)
    assert moves(optimizer, None, lambda: setattr(optimizer, "learning_rate", 0.01)) == right
    assert moves("sgd", variable, lambda: variable.assign(0.01)) == right
    driven = keras.optimizers.SGD(0.1)
    with pytest.raises(tfloop.UserError, match=r"sgd.learning_rate was set to 0.5, but the"):
        moves(
            driven,
            tfloop.Schedule("cosine", learning_rate=0.1, decay_steps=9),
            lambda: setattr(driven, "learning_rate", 0.5),
        )


def fit(*arguments, model=None, **options):
    model = model or keras.Sequential([keras.Input((1, 2, 1)), layers.Flatten(), layers.Dense(2)])
    state = tfloop.TrainState(model, *arguments, **options)
    return tfloop.Loop(state, two_classes(), batch_size=10).fit(1)


def two_inputs() -> keras.Model:
    first, second = keras.Input((1, 2, 1)), keras.Input((1, 2, 1))
    x = layers.Flatten()(layers.Add()([first, second]))
    return keras.Model([first, second], layers.Dense(2)(x))


def by_default():
    return keras.optimizers.OptimizerMap(default_optimizer=keras.optimizers.SGD(0.1))


def nan_at_zero(kernel):
    return tf.norm(kernel)


@pytest.mark.quick
@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: fit("sgd", lambda step: 0.1 if step < 2 else 0.01),
            "takes tf.where in place of `if`",
        ),
        (lambda: fit("sgd", lambda step: [0.1, 0.01][step]), "the function fails on the step"),
        (lambda: fit("sgd", lambda epoch, rate: rate), "missing 1 required positional argument"),
        (lambda: fit("sgd", lambda step: None), "schedule: the function fails on the step"),
        (lambda: fit("sgd", lambda step: tf.ones([2])), r"gives float32 \(2,\) for a step"),
        (lambda: fit("sgd", "fast"), "schedule: expected a tfloop.Schedule"),
        (lambda: fit(loss="mse"), "the loss mean_squared_error fails on targets int64"),
        (lambda: fit(loss=keras.losses.categorical_crossentropy), "entropy fails on targets"),
        (lambda: fit(loss=keras.losses.MeanSquaredError), "found the class MeanSquaredError"),
        (lambda: fit(None), "optimizer: expected a tfloop.Optimizer, .* found None"),
        (lambda: fit(keras.optimizers.Adam), "optimizer: .* found the class Adam"),
        (lambda: fit(keras.optimizers.SGD(use_ema=True)), "without use_ema, and ema=0.99"),
        (lambda: tfloop.Optimizer("sgd", clip_norm=-1.0), "clip_norm=-1.0 is out of range"),
        (lambda: tfloop.Optimizer("sgd", clip_value="x"), "clip_value: expected a number"),
        (lambda: fit(penalties=[lambda kernel: None]), "a penalty gives None, expected"),
        (lambda: fit(penalize=lambda v: v.nope), "penalize: the function fails on .*: Attribute"),
        (lambda: fit(penalize=[layers.Dense(3)]), "penalize: 'dense.*' is no variable or layer of"),
        (lambda: fit(keras.optimizers.MultiOptimizer(by_default())), "rates of their own"),
        (lambda: fit(model=two_inputs()), r"with \[8, 1, 2, 1\] float32: it has 2 inputs \("),
        (
            lambda: fit(model=keras.Sequential([keras.Input((7,)), layers.Dense(2)])),
            r"takes inputs",
        ),
    ],
)
def test_a_mistake_is_one_line(call, message):
    with pytest.raises(tfloop.UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.quick
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda state, loop: loop.fit("2"), "epochs='2': expected a whole number"),
        (lambda state, loop: loop.fit(2.5), "epochs=2.5: expected a whole number"),
        (lambda state, loop: state.reset(seed="a"), "seed: expected a whole number"),
        (lambda state, loop: tfloop.TrainState(state.model, seed=1.5), "seed: expected a whole"),
        (lambda state, loop: tfloop.TrainState(state.model, penalties=3), "expected a list of"),
        (lambda state, loop: tfloop.TrainState(state.model, standardizer=3), "tfloop.Standardizer"),
        (lambda state, loop: tfloop.Loop(state.model, loop.data), "expected a tfloop.TrainState"),
        (lambda state, loop: tfloop.predict(state.model, [1]), "expected a tfloop.TrainState"),
        (lambda state, loop: tfloop.predict(state, np.zeros((2, 7, 7))), "are 7×7×1, the model"),
        (lambda state, loop: tfloop.predict(state, "x"), "inputs to predict: expected numbers"),
    ],
)
def test_an_argument_of_another_kind_is_one_line(digits, call, message):
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(10)])
    state = tfloop.TrainState(model, standardizer=digits.standardizer)
    with pytest.raises(tfloop.UserError, match=message) as caught:
        call(state, tfloop.Loop(state, digits))
    assert "\n" not in str(caught.value)


def test_a_penalty_without_a_gradient_at_0_is_named_as_such():
    model = keras.Sequential(
        [keras.Input((1, 2, 1)), layers.Flatten(), layers.Dense(2, kernel_initializer="zeros")]
    )
    with pytest.raises(tfloop.DivergenceError, match="gradient of a penalty of your own by dense"):
        fit("sgd", model=model, penalties=[nan_at_zero])


def test_a_layer_with_another_word_for_training_is_refused():
    class Misnamed(layers.Layer):
        def call(self, x, is_training=False):
            return x

    with pytest.raises(tfloop.UserError, match="Misnamed.call takes is_training; name it training"):
        fit("sgd", model=ends_in(Misnamed()))


class Traced(keras.Model):
    """Its call is a tf.function, as in TensorFlow's guides."""

    def __init__(self):
        super().__init__()
        self.flat, self.drop = layers.Flatten(), layers.Dropout(0.5)
        self.unused, self.out = layers.Dense(3), layers.Dense(10)
        self(np.zeros((1, 8, 8, 1), np.float32))

    @tf.function
    def call(self, x, training=False):
        x = self.flat(x)
        if tf.shape(x)[0] > 10**6:
            x = 0.0 * x
        return self.out(self.drop(x, training=training)) + 0.0 * tf.stop_gradient(
            tf.reduce_sum(self.unused(x))
        )


def test_a_call_under_tf_function_is_a_part_of_the_step(digits):
    state = tfloop.TrainState(Traced(), "sgd", 0.01)
    loop = tfloop.Loop(state, digits, batch_size=500)
    loop.fit(1)
    state.model.flat.trainable = False
    loop.fit(2)
    batch = loop.batch(0)
    first = tfloop.forward_and_backward(state, batch)
    state.batch_index.assign_add(1)
    second = tfloop.forward_and_backward(state, batch)
    assert float(first.loss.data) != float(second.loss.data)  # another mask
    names = [layer.name.partition("_")[0] for layer in tfloop.debug.backward(state, batch)]
    assert {"dense", "dropout", "flatten"} <= set(names)


def test_a_refused_freeze_changes_nothing(digits):
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(10)])
    state = tfloop.TrainState(model, "adam", 0.01)
    loop = tfloop.Loop(state, digits, batch_size=500)
    loop.fit(1)
    model.trainable, digest = False, state.digest()
    for _ in range(2):
        with pytest.raises(tfloop.UserError, match="no weight is trainable any more"):
            loop.fit(2)
    assert state.digest() == digest
    model.trainable = True
    assert loop.fit(2).step == 6 and loop.traces["train"] == 1
    model.add(layers.Dense(10))
    with pytest.raises(tfloop.UserError, match="got or lost layers since its state was made"):
        loop.fit(3)


def test_looking_at_a_step_does_not_set_a_keras_optimizers_rate(digits):
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(10)])
    schedule = tfloop.Schedule("inverse_time", learning_rate=0.1, decay_rate=0.1)
    state = tfloop.TrainState(model, keras.optimizers.Adam(0.5), schedule)
    loop = tfloop.Loop(state, digits, batch_size=500)
    loop.fit(1)
    list(tfloop.debug.backward(state, loop.batch(0)))
    assert loop.fit(2).step == 6


@pytest.mark.parametrize(
    "stack",
    [
        lambda: [layers.Dense(4, activation=lambda x: x - tf.reduce_mean(x, axis=0))],
        lambda: [layers.Dense(4), layers.Softmax(axis=0)],
        lambda: [layers.Dense(4, activation=layers.BatchNormalization())],
    ],
    ids=["own activation", "softmax over rows", "norm as activation"],
)
def test_what_looks_at_the_batch_is_not_cut_into_shards(random, stack):
    model = keras.Sequential([keras.Input((5,)), *stack(), layers.Dense(2)])
    x = tf.constant(random.normal(size=(6, 5)).astype(np.float32))
    expected = model(x, training=True)
    found = models.outputs(model, x, True, fast=True, shards=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "first",
    [
        lambda: layers.Activation("relu", activity_regularizer="l2"),
        lambda: layers.Conv2D(2, 2, activity_regularizer="l2"),
        lambda: layers.Conv2D(2, 2, activation=layers.GroupNormalization(1)),
        lambda: layers.Activation(lambda x: x - tf.reduce_mean(x, axis=(1, 2), keepdims=True)),
    ],
    ids=["relu with a loss", "convolution with a loss", "norm", "mean"],
)
def test_pixels_that_a_layer_looks_at_are_not_cut_off(random, first):
    stack = [first(), layers.MaxPooling2D(3), layers.Flatten(), layers.Dense(2)]
    model = keras.Sequential([keras.Input((8, 8, 2)), *stack])
    x = tf.constant(random.normal(size=(4, 8, 8, 2)).astype(np.float32))
    expected = model(x)
    added = [float(loss) for loss in model.losses]
    np.testing.assert_allclose(models.outputs(model, x, fast=True), expected, atol=1e-5)
    assert [float(v) for v in models.added_losses(model)] == pytest.approx(added)


class Hot(layers.Layer):
    """A softmax with a temperature; it holds one, and is none."""

    def __init__(self):
        super().__init__()
        self.activation = keras.activations.softmax

    def call(self, x):
        return self.activation(5.0 * x)


def test_a_softmax_with_a_temperature_or_a_mask_is_not_left_out():
    state = tfloop.TrainState(ends_in(first=layers.Dense(2, activation=Hot())))
    with pytest.raises(tfloop.UserError, match="outputs are probabilities"):
        tfloop.Loop(state, two_classes(), batch_size=10)

    class Squeeze(layers.Layer):
        def __init__(self):
            super().__init__()
            self.supports_masking = True

        def call(self, x):
            return x[:, :, 0]

    embedded = [layers.Reshape((6,)), layers.Embedding(9, 4, mask_zero=True), layers.Dense(1)]
    model = keras.Sequential([keras.Input((6, 1, 1)), *embedded, Squeeze(), layers.Softmax()])
    tokens = tf.constant([[3, 4, 0, 0, 5, 0], [1, 2, 3, 4, 5, 6]], tf.float32)[..., None, None]
    assert not models.output_activation(model)
    np.testing.assert_allclose(models.outputs(model, tokens), model(tokens), atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", lambda: keras.optimizers.Nadam(0.01)])
def test_a_step_that_only_compiles_leaves_no_slots_behind(optimizer):
    digests = []
    for options in ({}, {"jit_compile": True}):
        keras.utils.set_random_seed(2)
        made_one = optimizer if isinstance(optimizer, str) else optimizer()
        state = tfloop.TrainState(unused(), made_one, 0.01)
        data = tfloop.load("digits").head(500)
        tfloop.Loop(state, data, batch_size=500, **options).fit(1)
        digests.append(state.weights["on/kernel"].numpy())
    np.testing.assert_allclose(*digests, atol=1e-5)


def test_attention_draws_for_a_part_what_it_draws_for_the_whole(digits):
    inputs = keras.Input((8, 8, 1))
    x = layers.Reshape((8, 8))(inputs)
    x = layers.Attention(dropout=0.5)([x, x])
    model = keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))
    state = tfloop.TrainState(model, "sgd", 0.1)
    batch = tfloop.Loop(state, digits, batch_size=60).batch(0)
    whole = tfloop.forward_and_backward(state, batch)
    parts = accumulated(tfloop.forward_and_backward, 4)(state, batch)
    np.testing.assert_allclose(parts.gradients.flat, whole.gradients.flat, rtol=1e-3, atol=1e-5)


def test_a_functional_model_is_freed():
    model = made(CASES["functional ResNet"])
    models.outputs(model, tf.zeros([2, 8, 8, 2]))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_states_that_a_recurrent_layer_returns_are_those_of_the_part(digits):
    inputs = keras.Input((8, 8, 1))
    x = layers.Reshape((8, 8))(inputs)
    y, state = layers.GRU(4, dropout=0.3, return_state=True)(x)
    model = keras.Model(inputs, layers.Dense(10)(layers.Concatenate()([y, state])))
    state = tfloop.TrainState(model, "sgd", 0.1)
    batch = tfloop.Loop(state, digits, batch_size=60, accumulate=2).batch(0)
    whole = tfloop.forward_and_backward(state, batch)
    parts = accumulated(tfloop.forward_and_backward, 4)(state, batch)
    np.testing.assert_allclose(parts.gradients.flat, whole.gradients.flat, rtol=1e-3, atol=1e-5)


def test_every_call_of_a_graph_is_in_the_models_table():
    model = made(CASES["shared layer"])
    rows = models.table(model)
    assert sum(row[-1] for row in rows) == model.count_params()
    assert [row[1] for row in rows] == ["(128)", "(128)", "(128)", "(3)"]
    assert [row[-1] > 0 for row in rows] == [False, True, False, True]
    whole = models.table(made(CASES["subclass"]))
    assert sum(row[-1] for row in whole) == sum(
        int(np.prod(v.shape)) for v in made(CASES["subclass"]).trainable_variables
    )


@pytest.mark.parametrize("name", ["shared layer", "nested Sequential"])
def test_the_gradients_of_every_layer_of_a_graph_are_central_differences(name):
    model = made(CASES[name])
    checks = list(tfloop.checks.check_gradients(model))
    assert all(check.passed for check in checks)
    checked = {check.what for check in checks}
    calls = [row[0] for row in models.table(model)]
    assert len(checked & set(calls)) >= 0.9 * len(calls)
    with pytest.raises(tfloop.UserError, match="the model shows no graph"):
        list(tfloop.checks.check_gradients(made(CASES["subclass"])))


class Holds(tf.Module):
    """A tf.Module that holds Keras's layers, of which TensorFlow does not know."""

    def __init__(self):
        super().__init__()
        square = keras.regularizers.L2(0.1)
        self.stack = [layers.Flatten(), layers.Dense(5, kernel_regularizer=square)]
        self.norm = layers.BatchNormalization()
        self.last = {"out": layers.Dense(10, activity_regularizer=square)}
        self(tf.zeros([1, 8, 8, 1]))

    def __call__(self, x, training=False):
        for layer in self.stack:
            x = layer(x)
        return self.last["out"](self.norm(x, training=training))

    @property
    def layers(self):
        return [*self.stack, self.norm, self.last["out"]]

    @property
    def variables(self):
        return [variable.value for layer in self.layers for variable in layer.variables]

    @property
    def trainable_variables(self):
        return [variable.value for layer in self.layers for variable in layer.trainable_variables]


def test_layers_that_a_module_holds_add_to_the_loss_and_are_seen(digits):
    model = Holds()
    state = tfloop.TrainState(model, "sgd", 0.01)
    batch = tfloop.Loop(state, digits).batch(0)
    x = tf.cast(batch.inputs, tf.float32)
    outputs = model(x, training=True)
    expected = 0.1 * float(tf.reduce_sum(tf.square(model.stack[1].kernel)))
    expected += 0.1 * float(tf.reduce_sum(tf.square(outputs))) / len(x)
    found = tfloop.forward_and_backward(state, batch)
    assert float(found.loss.model) == pytest.approx(expected, rel=1e-5)
    names = [layer.name for layer in tfloop.debug.backward(state, batch)]
    assert names == [layer.name for layer in model.layers][::-1]


@pytest.mark.quick
@pytest.mark.parametrize(
    "optimizer, accumulate, message",
    [
        (lambda: keras.optimizers.SGD(0.1), 1, r"a Keras optimizer \(sgd\) does not work on"),
        (lambda: "sgd", 2, "accumulate=2: batch normalisation looks at all replicas"),
    ],
)
def test_what_does_not_work_on_several_replicas_is_refused(optimizer, accumulate, message):
    case, several = CASES["flat Sequential"], types.SimpleNamespace(total=2, workers=1)
    state = tfloop.TrainState(made(case), optimizer())
    options = {"batch_size": 4, "accumulate": accumulate, "replicas": several}
    with pytest.raises(tfloop.UserError, match=message):
        tfloop.Loop(state, data_for(case), **options)
