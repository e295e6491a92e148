"""Laws that the step must keep whatever the numbers are: each compares two ways to the same
result."""

import numpy as np
import pytest
import tensorflow as tf

import tfloop
from tfloop.data import spec
from tfloop.data.pipelines import Batch


def gradient(state, batch, **options):
    return np.concatenate(
        [
            g.numpy().ravel()
            for g in tfloop.forward_and_backward(state, batch, **options).gradients.values()
        ]
    )


def test_permuting_a_batch_does_not_change_its_gradient(loop, random):
    one = loop(l2=1e-3)
    batch = one.batch(0)
    order = random.permutation(len(batch.targets))
    permuted = Batch(*(tf.gather(part, order) for part in batch))
    np.testing.assert_allclose(
        gradient(one.state, permuted), gradient(one.state, batch), rtol=1e-3, atol=1e-6
    )


def test_a_penalty_of_zero_is_none(loop):
    zero, none = loop(l1=0.0, l2=0.0, penalize="all"), loop(penalize="none")
    assert zero.fit(2).train == none.fit(2).train
    assert zero.state.digest("weights") == none.state.digest("weights")


@pytest.mark.parametrize("k", [2, 4])
def test_k_equal_batches_are_one(loop, k):
    one = loop(l2=1e-3)
    batch = one.batch(0)
    several = Batch(*(tf.concat([part] * k, axis=0) for part in batch))
    np.testing.assert_allclose(
        gradient(one.state, several), gradient(one.state, batch), rtol=1e-3, atol=1e-6
    )


def test_the_gradient_of_two_halves_is_their_mean(loop):
    one = loop()
    batch = one.batch(0)
    halves = [Batch(*(part[i::2] for part in batch)) for i in (0, 1)]
    np.testing.assert_allclose(
        sum(gradient(one.state, half) for half in halves) / 2,
        gradient(one.state, batch),
        rtol=1e-3,
        atol=1e-6,
    )


@pytest.mark.parametrize("factor", [0.5, 2.0, 64.0])  # powers of two: exact
def test_scaling_the_loss_scales_the_gradients(digits, factor):
    def state(scale):
        config = tfloop.Config.make("digits", conv=(4,), dense=(8,))
        built = tfloop.make_state(
            config, spec.of_images(digits.image_shape, 10), 15, digits.standardizer
        )

        def loss(labels, outputs):
            return scale * tf.nn.sparse_softmax_cross_entropy_with_logits(labels, outputs)

        return tfloop.TrainState(built.model, loss=loss, standardizer=digits.standardizer)

    batch = tfloop.Loop(state(1.0), digits).batch(0)
    np.testing.assert_array_equal(
        gradient(state(factor), batch), factor * gradient(state(1.0), batch)
    )


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adam", "adamw", "nadam", "adamax"])
def test_at_rate_zero_the_model_does_not_move(loop, optimizer):
    one = loop(optimizer=optimizer, learning_rate=0.0, l2=0.01)
    before = one.state.digest("weights")
    one.fit(1)
    assert one.state.digest("weights") == before


@pytest.mark.parametrize(
    "name, hyper",
    [
        ("inverse_time", dict(decay_rate=0.5)),
        ("exponential", dict(decay_rate=0.9)),
        ("cosine", dict(end_rate=1e-5)),
        ("polynomial", dict(power=2.0)),
        ("one_cycle", dict(peak_at=0.3)),
    ],
)
def test_doubling_decay_steps_halves_the_schedules_speed(name, hyper):
    short, long = (
        tfloop.Schedule(name, learning_rate=0.1, decay_steps=steps, **hyper) for steps in (100, 200)
    )
    for step in range(0, 100, 7):
        assert float(long(2 * step)) == pytest.approx(float(short(step)), rel=1e-5)


def test_the_weight_of_a_row_is_how_much_its_loss_counts(loop, random):
    """The sum of the weighted losses over the number of rows, as Keras has it."""
    one = loop()
    batch = one.batch(0)
    weight = random.integers(0, 3, batch.rows)
    rows = np.repeat(np.arange(batch.rows), weight)
    repeated = Batch(*(tf.gather(part, rows) for part in batch))
    weighted = batch._replace(sample_weight=tf.constant(weight, tf.float32))
    np.testing.assert_allclose(
        gradient(one.state, weighted),
        gradient(one.state, repeated) * (len(rows) / batch.rows),
        rtol=1e-3,
        atol=1e-6,
    )


def test_permuting_the_classes_permutes_the_outputs(loop, random):
    """Relabelling the digits and the output's columns alike changes neither the loss nor any other
    gradient."""
    one = loop()
    batch, order = one.batch(0), random.permutation(10)
    plain = tfloop.forward_and_backward(one.state, batch)
    for name in ("output/kernel", "output/bias"):
        weight = one.state.weights[name]
        weight.assign(tf.gather(weight, order, axis=-1))
    relabelled = tfloop.forward_and_backward(
        one.state, batch._replace(targets=tf.gather(tf.argsort(order), batch.targets))
    )
    assert float(relabelled.loss.total) == pytest.approx(float(plain.loss.total), rel=1e-5)
    np.testing.assert_allclose(
        relabelled.gradients["conv1/kernel"], plain.gradients["conv1/kernel"], rtol=1e-3, atol=1e-6
    )
