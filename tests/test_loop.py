import math
import traceback
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfloop
from tfloop import models
from tfloop.cli import main
from tfloop.data import pipelines
from tfloop.errors import DivergenceError, UserError
from tfloop.step import accumulated, forward_and_backward, losses, train_step

from conftest import SMALL


def same(ours, theirs, **tolerance):
    for name, weight in ours.items():
        np.testing.assert_allclose(weight.numpy(), theirs[name].numpy(), **tolerance)


@pytest.mark.quick
def test_an_epoch_follows_keras_with_the_same_order(loop):
    """Keras's own layers, loss, regularizer and optimizer, on the same 15 batches, the last of
    37."""
    ours = loop(l2=0.01, momentum=0.8)
    twin = models.build(tfloop.Config.make(**SMALL), ours.data.image_shape, ours.data.classes)
    for layer in twin.layers:
        if isinstance(layer, keras.layers.Dense):
            layer.kernel.regularizer = keras.regularizers.L2(0.01)
    twin.compile(keras.optimizers.RMSprop(0.001, momentum=0.8), "sparse_categorical_crossentropy")
    total = 0.0
    for index in range(ours.steps):
        batch = pipelines.batch_at(ours.data.train, 100, 0, 0, index)
        n = len(batch.targets)
        twin.reset_metrics()
        total += n * float(twin.train_on_batch(ours.state.standardize(batch.inputs), batch.targets))
    *_, last = ours.train_epoch()
    assert last.step == 15 and n == 37
    assert last.train.total == pytest.approx(total / 1437, rel=1e-5)
    same(ours.state.weights, models.named_variables(twin)[0], rtol=1e-4, atol=1e-6)


def test_epoch_metrics_are_means_over_examples(loop):
    """With rate 0 nothing moves, so the epoch's mean is that of one large batch."""
    still = loop(learning_rate=0.0, l2=0.01)
    record = still.fit(1)
    images, labels = still.data.train.inputs, still.data.train.targets
    whole = pipelines.Batch(tf.constant(images), tf.constant(labels), tf.ones(len(labels)))
    loss, accuracy, examples, _, _, logits = forward_and_backward(still.state, whole)
    assert float(examples) == len(labels) and float(accuracy) == pytest.approx(
        record.train.accuracy, abs=1e-6
    )
    assert record.train.total == pytest.approx(float(loss.total), rel=1e-5)
    assert record.train.l2 == pytest.approx(float(loss.l2), rel=1e-5)
    assert record.train.accuracy == pytest.approx(
        np.mean(np.argmax(logits, axis=1) == labels), abs=1e-6
    )


@pytest.mark.quick
def test_evaluation_agrees_with_numpy_float64(loop):
    trained = loop(l1=0.001, l2=0.01)
    trained.fit(1)
    test = trained.data.test
    logits = np.float64(models.outputs(trained.state.model, trained.state.standardize(test.inputs)))
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = trained.evaluate(test)
    kernels = [np.float64(kernel) for kernel in trained.state.kernels.values()]
    assert found.data == pytest.approx(-log_p[np.arange(len(test)), test.targets].mean(), rel=1e-5)
    assert found.accuracy == pytest.approx((logits.argmax(axis=1) == test.targets).mean())
    assert found.l1 == pytest.approx(0.001 * sum(np.abs(k).sum() for k in kernels), rel=1e-5)
    assert found.l2 == pytest.approx(0.01 * sum((k**2).sum() for k in kernels), rel=1e-5)
    assert found.total == pytest.approx(found.data + found.l1 + found.l2, rel=1e-6)


@pytest.mark.parametrize(
    "output, keras_loss",
    [
        ("softmax", keras.losses.CategoricalCrossentropy),
        ("sigmoid", keras.losses.BinaryCrossentropy),
    ],
)
def test_label_smoothing_is_keras_own(loop, random, output, keras_loss):
    state = loop(output=output, label_smoothing=0.1).state
    labels, logits = np.arange(10, dtype=np.int32), random.normal(size=(10, 10)).astype(np.float32)
    reference = keras_loss(from_logits=True, label_smoothing=0.1, reduction=None)(
        np.eye(10), logits
    )
    np.testing.assert_allclose(
        tfloop.example_losses(state, tf.constant(labels), tf.constant(logits)), reference, rtol=1e-5
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(steps_per_call=1),
        dict(steps_per_call=4),
        dict(pipeline="host"),
        dict(pipeline="prefetch", steps_per_call=7),
    ],
    ids=str,
)
def test_how_it_runs_does_not_change_a_bit_of_the_state(loop, settings):
    """Sums of metrics are another matter: a call's are added up before they are added to the rest.

    So they are the same bits with the same calls, and agree to rounding with others.
    """
    plain, other = loop(dropout=0.3), loop(dropout=0.3, **settings)
    before = bits(plain.state)
    expected, found = plain.fit(2), other.fit(2)
    moved = [name for name, value in bits(plain.state).items() if value != before[name]]
    assert set(moved) >= {f"weights/{name}" for name in plain.state.weights}
    sums = {"totals"}
    assert without(bits(plain.state), sums) == without(bits(other.state), sums)
    assert found.train.by_name() == pytest.approx(expected.train.by_name(), rel=1e-6)
    assert found.test == expected.test

    same_calls = loop(dropout=0.3, steps_per_call=other.steps_per_call)
    assert same_calls.fit(2).train == found.train
    assert bits(same_calls.state) == bits(other.state)


def bits(state):
    return {name: variable.numpy().tobytes() for name, variable in state.named().items()}


def without(values, names):
    return {name: value for name, value in values.items() if name not in names}


@pytest.mark.parametrize("settings", [dict(eager=True), dict(jit_compile=True)], ids=str)
def test_eager_and_xla_agree_to_rounding(loop, settings):
    rich = dict(optimizer="sgd", learning_rate=0.1, dropout=0.3, augment_shift=1, augment_rotate=5)
    plain, other = loop(**rich), loop(**rich, **settings)
    start = {name: weight.numpy() for name, weight in plain.state.weights.items()}
    plain.fit(1), other.fit(1)
    same(plain.state.weights, other.state.weights, rtol=1e-3, atol=1e-5)
    for name, weight in plain.state.weights.items():  # they moved much further than they differ
        assert np.abs(weight - start[name]).max() > 1e-2, name


@pytest.mark.parametrize("settings", [dict(conv=(), pool=(), optimizer="adam", ema=0.9)], ids=str)
def test_one_xla_program_makes_all_steps_of_a_call(loop, settings, monkeypatch):
    """As it does on a GPU."""
    monkeypatch.setattr(
        tf.config, "list_logical_devices", lambda kind: [tf.config.LogicalDevice(f"{kind}:0", kind)]
    )
    whole = loop(jit_compile=True, steps_per_call=4, **settings)
    monkeypatch.undo()
    plain = loop(steps_per_call=4, **settings)
    assert whole.options == {"jit_compile": True} and plain.options == {}
    found, expected = whole.fit(1), plain.fit(1)
    assert found.train.total == pytest.approx(expected.train.total, rel=1e-3)
    assert whole.traces["train"] == 1 and int(whole.state.global_step) == int(
        plain.state.global_step
    )


def test_batch_normalisation_and_dropout_train(loop):
    record = loop(batch_norm=True, dropout=0.1, optimizer="adam", learning_rate=0.01).fit(30)
    assert record.test.accuracy > 0.8


@pytest.mark.quick
def test_nothing_is_traced_again_whatever_number_changes(loop):
    trained = loop(optimizer="adam", schedule="cosine", l1=0.1, label_smoothing=0.1)
    trained.fit(1)
    for variable in trained.state.hyper.values():
        variable.assign(variable * 0.5)
    trained.state.reset(seed=3)
    trained.fit(2)
    assert trained.traces == {"train": 1, "evaluate": 1}


@pytest.mark.quick
def test_records_come_one_per_call_and_one_per_epoch(loop):
    records = list(loop(steps_per_call=6).run(2))
    calls = [r for r in records if isinstance(r, tfloop.Call)]
    assert [(c.epoch, c.step, c.batch_index, c.steps) for c in calls] == [
        (1, 6, 6, 6),
        (1, 12, 12, 6),
        (1, 15, 15, 3),
        (2, 21, 6, 6),
        (2, 27, 12, 6),
        (2, 30, 15, 3),
    ]
    epochs = [r for r in records if isinstance(r, tfloop.Epoch)]
    assert [(e.epoch, e.step) for e in epochs] == [(1, 15), (2, 30)] and records[3] is epochs[0]


@pytest.mark.quick
def test_from_the_command_to_the_step_there_are_three_functions(tmp_path, monkeypatch):
    """And the loop over the steps of a call. Eager mode shows what compiled mode traces."""
    package, frames = str(Path(tfloop.__file__).parent), []

    def step(*arguments, **options):
        stack = traceback.extract_stack()
        frames.append([frame.name for frame in stack if frame.filename.startswith(package)])
        return tfloop.train_step(*arguments, **options)

    monkeypatch.setattr("tfloop.loop.train_step", step)
    flags = ["--preset=digits", "--eager", "--nofast", "--summaries=none", "--quiet", "--epochs=1"]
    assert main(["train", *flags, f"--logdir={tmp_path}"]) == 0
    assert len(frames) == 45
    for names in frames:
        command, *between, body = names[names.index("train") :]
        assert (command, between) == ("train", ["train", "make", "train_steps"])
        assert body == ("last_step" if names is frames[-1] else "body")


def test_a_run_broken_off_goes_on_where_it_was(loop):
    whole, broken = loop(steps_per_call=4), loop(steps_per_call=4)
    last = whole.fit(2)
    for record in broken.run(2):
        if isinstance(record, tfloop.Call) and record.step == 23:
            break
    assert broken.fit(2).train == last.train
    assert broken.state.digest() == whole.state.digest()


def test_code_between_records_may_change_a_number(loop):
    trained, rates = loop(steps_per_call=5), []
    for record in trained.run(1):
        rates.append(record.learning_rate)
        trained.state.hyper["learning_rate"].assign(0.5)
    assert rates == pytest.approx([0.001, 0.5, 0.5, 0.5])


def test_a_reset_between_records_starts_the_run_again(loop):
    fresh, trained = (loop(pipeline=name, steps_per_call=5) for name in ("resident", "host"))
    next(records := trained.run(1))
    trained.state.reset()
    *_, last = records
    assert last.train == fresh.fit(1).train and trained.state.digest(
        "weights"
    ) == fresh.state.digest("weights")


def test_the_schedule_is_read_at_its_own_step(loop):
    trained = loop(schedule="inverse_time", learning_rate=0.1, decay_rate=1.0, steps_per_call=1)
    rates = [r.learning_rate for r in trained.run(1) if isinstance(r, tfloop.Call)]
    np.testing.assert_allclose(rates, [0.1 / (1 + step) for step in range(15)], rtol=1e-6)


class Linear(tf.Module):
    def __init__(self):
        super().__init__(name="linear")
        self.w, self.b = (
            tf.Variable(tf.zeros([64, 10]), name="w"),
            tf.Variable(tf.zeros([10]), name="b"),
        )

    def __call__(self, images):
        return tf.reshape(images, [-1, 64]) @ self.w + self.b


@pytest.mark.quick
def test_a_tf_module_trains_and_resets(digits):
    state = tfloop.TrainState(Linear(), "sgd", 0.05, l2=0.001, standardizer=digits.standardizer)
    trained = tfloop.Loop(state, digits)
    first = trained.fit(3)
    assert first.test.accuracy > 0.9 and first.test.l2 > 0
    state.reset()
    assert trained.fit(3).train == first.train and trained.traces["train"] == 1


def test_a_keras_model_with_losses_and_a_keras_optimizer_trains_and_resets(digits):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Dense(16, "relu", activity_regularizer=keras.regularizers.L2(1e-4))(
        keras.layers.Flatten()(inputs)
    )
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Dropout(0.2)(x)))
    schedule = tfloop.Schedule("exponential", learning_rate=0.01, decay_rate=0.99)
    state = tfloop.TrainState(
        model, keras.optimizers.Lion(0.5), schedule, standardizer=digits.standardizer
    )
    trained = tfloop.Loop(state, digits)
    first, digest = trained.fit(3), state.digest("weights", "slots")
    assert first.test.accuracy > 0.75 and first.train.model > 0
    assert float(state.optimizer.inner.learning_rate) == pytest.approx(first.learning_rate)
    state.reset()
    assert trained.fit(3).train == first.train and state.digest("weights", "slots") == digest
    assert trained.traces["train"] == 1


def test_a_penalty_is_any_function_of_a_kernel(loop, digits):
    def orthogonal(kernel):
        return 0.1 * tf.reduce_sum(tf.square(tf.matmul(kernel, kernel, transpose_a=True)))

    state = tfloop.TrainState(
        Linear(), "sgd", 0.05, penalties=[orthogonal], standardizer=digits.standardizer
    )
    state.weights["w"].assign(tf.ones([64, 10]))
    loss = losses(state, tf.constant(2.0), tf.constant(0.0))
    assert float(loss.custom) == pytest.approx(0.1 * 100 * 64**2) and float(
        loss.total
    ) == pytest.approx(2 + 40960)


def test_a_loss_of_ones_own_takes_the_place_of_cross_entropy(digits):
    def squared(labels, outputs):
        return tf.reduce_sum(tf.square(tf.one_hot(labels, 10) - outputs), axis=-1)

    state = tfloop.TrainState(
        Linear(), "sgd", 0.001, loss=squared, standardizer=digits.standardizer
    )
    assert float(tfloop.example_losses(state, tf.constant([3]), tf.zeros([1, 10]))[0]) == 1
    assert tfloop.Loop(state, digits).fit(3).test.accuracy > 0.8


@pytest.mark.parametrize(
    "state, message",
    [
        (
            dict(loss=lambda labels, outputs: tf.reduce_mean(outputs)),
            r"the loss function gives \(\), expected \(64,\)",
        ),
        (
            dict(
                model=keras.Sequential(
                    [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(5)]
                )
            ),
            r"the model gives outputs of shape \(5,\) for an example; the data have 10 classes",
        ),
    ],
)
def test_a_model_or_loss_of_another_shape_is_named(digits, state, message):
    with pytest.raises(UserError, match=message):
        tfloop.Loop(tfloop.TrainState(**{"model": Linear(), **state}), digits).fit(1)


def test_a_batch_larger_than_the_data_is_named(loop):
    with pytest.raises(UserError, match="batch_size=1438 is larger than the 1437 training images"):
        loop(batch_size=1438)


@pytest.mark.parametrize("pipeline", ["resident", "host"])
def test_divergence_stops_before_the_step_and_names_step_and_layer(loop, pipeline):
    trained = loop(steps_per_call=10, pipeline=pipeline)
    records = trained.run(1)
    next(records)
    trained.state.weights["conv2/kernel"].assign(trained.state.weights["conv2/kernel"] * np.inf)
    before = trained.state.digest("weights", "slots", "count", "batch", "schedule_step")
    with pytest.raises(
        DivergenceError, match="step 10: the weights of conv2 became NaN or infinite"
    ) as caught:
        list(records)
    assert (caught.value.step, caught.value.layer) == (10, "conv2")
    assert trained.state.digest("weights", "slots", "count", "batch", "schedule_step") == before


@pytest.mark.parametrize("settings", [{}, dict(batch_norm=True), dict(steps_per_call=1)], ids=str)
def test_a_rate_that_is_far_too_high_is_caught_with_everything_finite(loop, settings):
    trained = loop(optimizer="sgd", learning_rate=1e20, **settings)
    with pytest.raises(DivergenceError, match="became NaN or infinite, at rate 1e"):
        trained.fit(1)
    assert all(
        np.isfinite(v).all() for name, v in trained.state.named().items() if name != "diverged"
    )


def test_an_update_that_is_not_finite_is_not_made(loop):
    trained = loop(epsilon=0.0)
    trained.state.weights["conv1/kernel"].assign(
        tf.zeros_like(trained.state.weights["conv1/kernel"])
    )
    with pytest.raises(DivergenceError, match="step 0: the update became NaN"):
        trained.fit(1)
    assert all(np.isfinite(weight).all() for weight in trained.state.weights.values())


def test_a_test_loss_that_is_not_finite_is_divergence_too(loop):
    trained = loop(optimizer="sgd", learning_rate=1e15, batch_size=1437)
    with pytest.raises(DivergenceError, match="step 1: the loss on the examples held out"):
        trained.fit(1)


def test_evaluation_shows_the_model_no_image_that_is_not_there(digits):
    """Rows fill up a batch with an image of the set: to divide by its norm is possible."""

    class Unit(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(tf.zeros([64, 10]), name="w")

        def __call__(self, images):
            x = tf.reshape(images, [-1, 64])
            return x / tf.norm(x, axis=1, keepdims=True) @ self.w

    one = tfloop.Loop(tfloop.TrainState(Unit()), digits)
    for size in (1, 10, 256, 300):
        assert one.evaluate(digits.test.take(slice(0, size))).data == pytest.approx(
            math.log(10), rel=1e-5
        )


def test_training_goes_on_after_divergence_with_a_lower_rate(loop):
    trained = loop(optimizer="sgd", learning_rate=1e20)
    with pytest.raises(DivergenceError):
        trained.fit(1)
    trained.state.reset()
    trained.state.hyper["learning_rate"].assign(0.01)
    assert trained.fit(1).step > 0 and trained.traces["train"] == 1


def test_the_steps_that_a_diverging_call_made_count(digits):
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)]
    )
    state = tfloop.TrainState(
        model,
        "sgd",
        lambda step: tf.where(step < 13.0, 0.01, 1e38),
        standardizer=digits.standardizer,
    )
    with pytest.raises(DivergenceError, match="step 13: "):
        tfloop.Loop(state, digits, batch_size=50, steps_per_call=20).fit(1)
    assert state.totals.numpy()[:2].tolist() == [13, 650] and int(state.batch_index) == 13


# --- what must hold for the mathematics, whatever the numbers


def step_gradient(state, batch):
    return np.concatenate(
        [g.numpy().ravel() for g in forward_and_backward(state, batch).gradients.values()]
    )


@pytest.fixture
def batch(digits):
    return pipelines.batch_at(digits.train, 50, 0, 0, 0)


def test_permuting_a_batch_does_not_change_its_gradient(loop, batch, random):
    state, rows = loop().state, random.permutation(50)
    permuted = pipelines.Batch(*(tf.gather(part, rows) for part in batch))
    np.testing.assert_allclose(
        step_gradient(state, permuted), step_gradient(state, batch), rtol=1e-3, atol=1e-6
    )


def test_two_equal_batches_are_one(loop, batch):
    state = loop().state
    twice = pipelines.Batch(*(tf.concat([part, part], axis=0) for part in batch))
    np.testing.assert_allclose(
        step_gradient(state, twice), step_gradient(state, batch), rtol=1e-3, atol=1e-6
    )


def test_rows_that_are_left_out_change_nothing(loop, batch):
    state = loop().state
    padded = pipelines.Batch(
        tf.concat([batch.inputs, batch.inputs[:9]], 0),
        tf.concat([batch.targets, batch.targets[:9]], 0),
        tf.concat([batch.sample_weight, tf.fill([9], pipelines.LEFT_OUT)], 0),
    )
    np.testing.assert_allclose(
        step_gradient(state, padded), step_gradient(state, batch), rtol=1e-3, atol=1e-6
    )


def test_the_gradient_of_the_total_is_the_data_gradient_plus_2_l2_w(loop, batch):
    with_l2, without = loop(l2=0.05).state, loop().state
    a, b = (forward_and_backward(state, batch).gradients for state in (with_l2, without))
    for name in a:
        extra = 0.1 * without.weights[name] if name in ("dense1/kernel", "output/kernel") else 0
        np.testing.assert_allclose(a[name], b[name] + extra, rtol=1e-4, atol=1e-6)


@pytest.mark.quick
def test_one_step_of_sgd_is_minus_rate_times_gradient(loop, batch):
    state = loop(optimizer="sgd", learning_rate=0.1).state
    before = {name: weight.numpy() for name, weight in state.weights.items()}
    gradients = forward_and_backward(state, batch).gradients
    step = train_step(state, batch)
    for name, weight in state.weights.items():
        np.testing.assert_allclose(
            weight, before[name] - 0.1 * gradients[name].numpy(), rtol=1e-5, atol=1e-7
        )
    assert (
        step.sums[0] == 1 and step.sums[1] == 50 and float(step.learning_rate) == pytest.approx(0.1)
    )
    np.testing.assert_allclose(step.update[0], -0.1 * step.gradient[0], rtol=1e-6)


# --- parts of a batch, and 16 bits


@pytest.mark.parametrize(
    "settings",
    [{}, dict(l2=1e-2, optimizer="nadam"), dict(dropout=0.3, label_smoothing=0.1)],
    ids=str,
)
def test_accumulated_gradients_are_those_of_the_large_batch(loop, settings):
    """The last batch of the epoch has 37 images, so that parts have 8 or 7 of them."""
    whole, parts = (
        loop(**settings, steps_per_call=1),
        loop(**settings, steps_per_call=1, accumulate=5),
    )
    for index in (0, 14):
        passes = [
            train_step_grad_fn(each.state, each.batch(index))
            for each, train_step_grad_fn in (
                (whole, forward_and_backward),
                (parts, accumulated(forward_and_backward, 5)),
            )
        ]
        for name, expected in passes[0].gradients.parts().items():
            np.testing.assert_allclose(
                passes[1].gradients[name], expected, rtol=1e-4, atol=1e-6, err_msg=name
            )
        for name in ("accuracy", "examples"):
            assert float(getattr(passes[1], name)) == pytest.approx(
                float(getattr(passes[0], name)), rel=1e-6
            )
        np.testing.assert_allclose(
            tf.stack(passes[1].loss), tf.stack(passes[0].loss), rtol=1e-5, atol=1e-7
        )
    assert parts.fit(2).test.accuracy == pytest.approx(whole.fit(2).test.accuracy, abs=0.02)


def test_parts_of_unequal_size_leave_the_moving_averages_finite(loop):
    assert math.isfinite(loop(batch_norm=True, accumulate=5).fit(2).test.total)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    "settings", [{}, dict(batch_norm=True, dropout=0.2)], ids=["plain", "batch norm"]
)
def test_mixed_precision_computes_in_16_bits_keeps_weights_in_32_and_learns_as_well(
    loop, precision, settings
):
    mixed, full = loop(precision=precision, **settings), loop(**settings)
    state = mixed.state
    seen = models.activations(state.model, state.standardize(mixed.data.test.inputs[:4]))
    outputs = {name: value for name, _, value in seen}
    assert (
        outputs["conv1"].dtype == precision.removeprefix("mixed_")
        and outputs["output"].dtype == tf.float32
    )
    assert {weight.dtype for weight in state.weights.values()} == {tf.float32}
    assert mixed.fit(4).test.accuracy == pytest.approx(full.fit(4).test.accuracy, abs=0.03)


@pytest.mark.quick
def test_gradients_that_overflow_halve_the_loss_scale_and_leave_the_batch_out(loop):
    one = loop(precision="mixed_float16", optimizer="sgd", learning_rate=0.01)
    assert float(one.state.loss_scale) == 2.0**15
    one.state.loss_scale.assign(2.0**24)  # overflows for sure
    weights = one.state.digest("weights")
    first = next(one.run(1))
    made = int(one.state.schedule_step)
    assert (
        float(one.state.loss_scale) == 2.0 ** (24 - (first.steps - made)) and 0 < made < first.steps
    )
    assert (
        first.step == first.steps
        and int(one.state.optimizer.count) == made
        and one.state.digest("weights") != weights
    )
    assert math.isfinite(one.fit(1).test.total) and not bool(one.state.diverged)
    one.state.good_steps.assign(1999)
    one.state.loss_scale.assign(1024)
    next(one.run(2))
    assert float(one.state.loss_scale) == 2048


def test_scaled_gradients_are_the_unscaled_ones(loop):
    one = loop(precision="mixed_float16")
    batch = one.batch(0)
    scaled = forward_and_backward(one.state, batch).gradients
    one.state.loss_scale.assign(1024.0)
    np.testing.assert_allclose(
        forward_and_backward(one.state, batch).gradients.flat, scaled.flat, rtol=0.02, atol=1e-4
    )


def test_with_16_bits_a_loss_that_is_not_finite_is_divergence_all_the_same(loop):
    one = loop(precision="mixed_float16")
    one.state.weights["conv1/bias"].assign(np.full(4, np.inf))
    with pytest.raises(tfloop.DivergenceError, match="step 0"):
        one.fit(1)
