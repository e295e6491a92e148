import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfloop.errors import UserError
from tfloop.keras_optimizers import KerasOptimizer
from tfloop.optimizers import OPTIMIZERS, Optimizer, rmsprop
from tfloop.schedules import Schedule
from tfloop.vectors import Vector, flatten

KO = keras.optimizers
CASES = [
    ("sgd", {}, KO.SGD),
    ("sgd", dict(momentum=0.9), KO.SGD),
    ("sgd", dict(momentum=0.9, nesterov=True), KO.SGD),
    ("rmsprop", {}, KO.RMSprop),
    ("rmsprop", dict(momentum=0.8, rho=0.95, epsilon=1e-5), KO.RMSprop),
    ("rmsprop", dict(momentum=0.5, centered=True, epsilon=1e-4), KO.RMSprop),
    ("adam", {}, KO.Adam),
    ("adam", dict(beta_1=0.8, beta_2=0.99, epsilon=1e-4), KO.Adam),
    ("adamw", dict(weight_decay=0.1), KO.AdamW),
    ("nadam", {}, KO.Nadam),
    ("adamax", {}, KO.Adamax),
]


def weights(random):
    return {
        "a": tf.Variable(random.normal(size=(4, 3)).astype(np.float32)),
        "b": tf.Variable(random.normal(size=(3,)).astype(np.float32)),
    }


@pytest.mark.parametrize(
    "name, hyper, reference", CASES, ids=lambda case: getattr(case, "__name__", str(case))
)
def test_200_steps_follow_keras_to_float32_rounding(random, name, hyper, reference):
    ours = weights(random)
    theirs = [keras.Variable(weight.numpy()) for weight in ours.values()]
    optimizer, keras_optimizer = Optimizer(name, **hyper), reference(learning_rate=0.01, **hyper)
    optimizer.build(ours)
    for _ in range(200):
        gradients = {
            key: tf.constant(random.normal(size=w.shape).astype(np.float32))
            for key, w in ours.items()
        }
        optimizer.apply(
            *optimizer.updates(Vector.of(gradients), ours, 0.01), ours, tf.constant(True)
        )
        keras_optimizer.apply(list(gradients.values()), theirs)
    for mine, other in zip(ours.values(), theirs):
        np.testing.assert_allclose(mine.numpy(), other.numpy(), rtol=2e-5, atol=2e-6)
    assert int(optimizer.count) == 200


def test_three_steps_of_rmsprop_worked_by_hand():
    w, v, m = 1.0, 0.0, 0.0
    slots = {"mean_square": tf.zeros([1]), "momentum": tf.zeros([1])}
    weight = tf.constant([1.0])
    for g in (0.5, -1.0, 2.0):
        update, slots = rmsprop(
            tf.constant([g]), weight, slots, 0, 0.1, rho=0.9, momentum=0.8, epsilon=1e-7
        )
        weight += update
        v = 0.9 * v + 0.1 * g * g
        m = 0.8 * m + 0.1 * g / (v + 1e-7) ** 0.5
        w -= m
        np.testing.assert_allclose(weight, [w], rtol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_makes_the_next_run_the_same_bit_for_bit(random, name):
    gradients = random.normal(size=(20, 15)).astype(np.float32)
    start, optimizer = weights(random), Optimizer(name)
    optimizer.build(start)

    def run():
        own = {key: tf.Variable(weight) for key, weight in start.items()}
        for gradient in gradients:
            optimizer.apply(
                *optimizer.updates(Vector(tf.constant(gradient), own), own, 0.1),
                own,
                tf.constant(True),
            )
        return flatten(own.values()).numpy()

    first = run()
    optimizer.reset()
    np.testing.assert_array_equal(run(), first)


@pytest.mark.quick
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_invalid_step_changes_nothing(random, name):
    own, optimizer = weights(random), Optimizer(name)
    optimizer.build(own)
    before = [v.numpy() for v in (*own.values(), *optimizer.slots.values(), optimizer.count)]
    optimizer.apply(
        *optimizer.updates(Vector(tf.fill([15], np.nan), own), own, 0.1), own, tf.constant(False)
    )
    for old, variable in zip(before, (*own.values(), *optimizer.slots.values(), optimizer.count)):
        np.testing.assert_array_equal(variable.numpy(), old)


def test_numbers_are_variables_that_the_next_update_reads(random):
    own, optimizer = weights(random), Optimizer("sgd", momentum=0.9)
    optimizer.build(own)
    optimizer.slots["momentum"].assign(tf.ones([15]))
    optimizer.hyper["momentum"].assign(0.5)
    np.testing.assert_allclose(
        optimizer.updates(Vector(tf.zeros([15]), own), own, 0.1)[0].flat, 0.5
    )


def test_a_vector_reads_by_name_and_has_a_norm(random):
    own = weights(random)
    vector = Vector.of(own)
    assert list(vector) == ["a", "b"] and len(vector) == 2
    for name, part in vector.items():
        np.testing.assert_array_equal(part, own[name])
    assert float(vector.norm) == pytest.approx(
        np.sqrt(sum((w.numpy() ** 2).sum() for w in own.values())), rel=1e-6
    )
    with pytest.raises(KeyError, match="there are a, b"):
        vector["c"]


@pytest.mark.quick
@pytest.mark.parametrize(
    "name, hyper, message",
    [
        ("lamb", {}, "optimizer=lamb is unknown"),
        (
            "nadam",
            dict(momentum=0.9),
            "momentum: optimizer 'nadam' has no momentum; it has beta_1, beta_2, epsilon",
        ),
        ("adamax", dict(momentum=0.9), "momentum: optimizer 'adamax' has no momentum"),
        ("sgd", dict(rho=0.9), "rho: optimizer 'sgd' has no rho"),
    ],
)
def test_a_hyperparameter_that_the_rule_lacks_is_named(name, hyper, message):
    with pytest.raises(UserError, match=message):
        Optimizer(name, **hyper)


def model_of(variables):
    return types.SimpleNamespace(variables=variables)


def test_a_keras_optimizer_with_a_schedule_of_its_own_is_refused():
    inner = KO.SGD(KO.schedules.CosineDecay(0.1, 10))
    with pytest.raises(UserError, match="SGD: hand it in with a plain learning rate"):
        KerasOptimizer(inner, model_of([]))


def test_the_loop_drives_a_keras_optimizers_rate(random):
    variables = [keras.Variable(np.ones(3, np.float32))]
    optimizer = KerasOptimizer(KO.SGD(0.7), model_of(variables))
    own = {"w": variables[0].value}
    optimizer.build(own)
    rate = Schedule("constant", learning_rate=0.1)(0)
    updates, after = optimizer.updates(Vector.of({"w": tf.ones([3])}), own, rate)
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)
    optimizer.apply(updates, after, own, tf.constant(False))
    np.testing.assert_array_equal(own["w"], 1.0)
    optimizer.apply(updates, after, own, tf.constant(True))
    np.testing.assert_allclose(own["w"], 0.9, rtol=1e-6)
    optimizer.reset()
    assert int(optimizer.count) == 0 and float(optimizer.inner.learning_rate) == pytest.approx(0.7)


@pytest.mark.quick
@pytest.mark.parametrize(
    "ours, theirs",
    [
        (dict(clip_value=0.3), dict(clipvalue=0.3)),
        (dict(clip_norm=0.8), dict(clipnorm=0.8)),
        (dict(clip_global_norm=1.1), dict(global_clipnorm=1.1)),
        (dict(clip_global_norm=1e6), {}),
    ],
    ids=["value", "norm", "global norm", "a limit that is not reached"],
)
def test_clipping_follows_keras(random, ours, theirs):
    shapes = {"a": (3, 4), "b": (5,)}
    mine = {
        name: tf.Variable(random.normal(size=shape).astype(np.float32))
        for name, shape in shapes.items()
    }
    other = [keras.Variable(weight.numpy()) for weight in mine.values()]
    optimizer, reference = Optimizer("sgd", **ours), keras.optimizers.SGD(0.1, **theirs)
    optimizer.build(mine)
    for _ in range(5):
        gradients = {
            name: tf.constant(random.normal(size=shape).astype(np.float32))
            for name, shape in shapes.items()
        }
        updates, slots = optimizer.updates(Vector.of(gradients), mine, tf.constant(0.1))
        optimizer.apply(updates, slots, mine, tf.constant(True))
        reference.apply(list(gradients.values()), other)
        for weight, expected in zip(mine.values(), other):
            np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-7)
    assert set(ours) <= set(optimizer.hyper)


def large_and_small(random):
    """Two weights that lie in blocks of their own, around two that share one."""
    shapes = {"a": (300, 250), "b": (3,), "c": (70_000,), "d": (2, 2)}
    return {
        name: tf.Variable(random.normal(size=shape).astype(np.float32))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("name, hyper, reference", [CASES[1], CASES[7], CASES[9]])
def test_large_weights_have_slots_of_their_own_and_the_same_updates(random, name, hyper, reference):
    ours = large_and_small(random)
    theirs = [keras.Variable(weight.numpy()) for weight in ours.values()]
    optimizer, other = (
        Optimizer(name, clip_global_norm=3.0, **hyper),
        reference(0.01, global_clipnorm=3.0, **hyper),
    )
    optimizer.build(ours)
    for _ in range(3):
        gradients = {
            key: tf.constant(random.normal(size=w.shape).astype("f4")) for key, w in ours.items()
        }
        updates, slots = optimizer.updates(Vector.of(gradients), ours, tf.constant(0.01))
        optimizer.apply(updates, slots, ours, tf.constant(True))
        other.apply(list(gradients.values()), theirs)
        assert updates.flat.shape == [145_007] and list(updates) == ["a", "b", "c", "d"]
    for weight, expected in zip(ours.values(), theirs):
        np.testing.assert_allclose(weight, expected.value, rtol=2e-5, atol=1e-6)
    momentum = {key: v.shape[0] for key, v in optimizer.slots.items() if "momentum" in key}
    assert momentum == {"momentum": 7, "momentum/a": 75_000, "momentum/c": 70_000}
    optimizer.reset()
    vectors = [v for key, v in optimizer.slots.items() if key != "product"]
    assert all(not v.numpy().any() for v in vectors)


def test_a_rule_that_looks_at_the_whole_vector_is_given_it(random, registries):
    @OPTIMIZERS.register
    def along(gradient, weights, slots, count, rate):
        return -rate * gradient / tf.norm(gradient) + 0.0 * weights(), {}

    ours = large_and_small(random)
    optimizer = Optimizer("along")
    optimizer.build(ours)
    gradient = random.normal(size=145_007).astype(np.float32)
    updates, _ = optimizer.updates(Vector(tf.constant(gradient), ours), ours, tf.constant(0.5))
    np.testing.assert_allclose(
        updates.flat, -0.5 * gradient / np.linalg.norm(gradient), rtol=1e-4, atol=1e-7
    )


def test_a_vector_of_blocks_is_that_of_the_parts(random):
    tensors = {name: w.numpy() for name, w in large_and_small(random).items()}
    flat = np.concatenate([value.ravel() for value in tensors.values()])
    one = Vector.of({name: tf.constant(value) for name, value in tensors.items()})
    for vector in (one, Vector(tf.constant(flat), one), Vector(one.blocks, one)):
        assert [block.shape[0] for block in vector.blocks] == [7, 75_000, 70_000]
        np.testing.assert_array_equal(vector.flat, flat)
        for name, value in tensors.items():
            np.testing.assert_array_equal(vector[name], value)
        np.testing.assert_allclose(vector.norm, np.linalg.norm(flat), rtol=1e-5)
        expected = {name: np.linalg.norm(value) for name, value in tensors.items()}
        assert vector.norms() == pytest.approx(expected, rel=1e-4)
