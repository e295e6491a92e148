"""Numbers that the tests of Keras 3.15 hold its optimizers and schedules to, met by the rules here.

Taken over as numbers only. Left out is what has no rule here: amsgrad, cycles of PolynomialDecay,
and the trajectory of a whole `fit` on targets that are no classes.
"""

import math

import numpy as np
import pytest
import tensorflow as tf

from tfloop.optimizers import Optimizer
from tfloop.schedules import Schedule
from tfloop.vectors import Vector

pytestmark = pytest.mark.quick


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split()]


# One step with the gradient 0.01, then four with 0.1, 0.2, …, 1.0, from ten weights that are 1.
TRAJECTORIES = {
    ("sgd", "nesterov"): (
        dict(nesterov=True),
        0.01,
        [[1 - 1e-4 - step * 0.001 * (i + 1) for i in range(10)] for step in range(5)],
    ),
    ("rmsprop", "centered"): (
        dict(centered=True),
        0.001,
        [[x] * 10 for x in (0.9967, 0.9933, 0.9908, 0.9885, 0.9864)],
    ),
    ("nadam", "rate 0.5"): (
        dict(beta_1=0.5, beta_2=0.67, epsilon=1e-5),
        0.5,
        [
            [0.4281] * 10,
            [
                -0.1738,
                -0.1731,
                -0.1726,
                -0.1723,
                -0.1721,
                -0.172,
                -0.1719,
                -0.1718,
                -0.1718,
                -0.1717,
            ],
            [
                -0.7115,
                -0.7103,
                -0.7096,
                -0.7092,
                -0.709,
                -0.7088,
                -0.7086,
                -0.7085,
                -0.7085,
                -0.7084,
            ],
            [
                -1.2335,
                -1.2322,
                -1.2313,
                -1.2309,
                -1.2306,
                -1.2304,
                -1.2302,
                -1.2301,
                -1.23,
                -1.2299,
            ],
            [
                -1.7492,
                -1.7478,
                -1.7469,
                -1.7464,
                -1.7461,
                -1.7459,
                -1.7457,
                -1.7456,
                -1.7455,
                -1.7454,
            ],
        ],
    ),
    ("adamax", "rate 0.2"): (
        dict(beta_1=0.85, beta_2=0.95, epsilon=1e-6),
        0.2,
        [
            [0.8] * 10,
            numbers("0.6827 0.6873 0.6888 0.6896 0.6901 0.6904 0.6906 0.6908 0.6909 0.691"),
            numbers("0.5333 0.5407 0.5431 0.5444 0.5451 0.5456 0.546 0.5462 0.5464 0.5466"),
            numbers("0.368 0.3773 0.3804 0.382 0.3829 0.3835 0.384 0.3843 0.3846 0.3848"),
            numbers("0.1933 0.204 0.2076 0.2094 0.2105 0.2112 0.2117 0.2121 0.2124 0.2126"),
        ],
    ),
    ("adamw", "rate 1"): (
        dict(weight_decay=0.5, epsilon=2.0),
        1.0,
        [
            [0.4998] * 10,
            numbers("0.2486 0.2475 0.2463 0.2451 0.244 0.2428 0.2417 0.2405 0.2394 0.2382"),
            numbers("0.1223 0.1198 0.1174 0.1149 0.1124 0.11 0.1075 0.1051 0.1027 0.1003"),
            numbers("0.0586 0.0549 0.0512 0.0475 0.0439 0.0402 0.0366 0.033 0.0294 0.0258"),
            numbers("0.0263 0.0215 0.0167 0.012 0.0073 0.0026 -0.0021 -0.0067 -0.0113 -0.0159"),
        ],
    ),
}


def optimizer_on(name: str, start: list[float], **hyper):
    """(a function gradient, rate → the weights after a step with it)."""
    weights = {"w": tf.Variable(np.array(start, np.float32))}
    optimizer = Optimizer(name, **hyper)
    optimizer.build(weights)

    def step(gradient, rate: float) -> np.ndarray:
        gradients = Vector.of({"w": tf.constant(np.array(gradient, np.float32))})
        updates, slots = optimizer.updates(gradients, weights, tf.constant(rate))
        optimizer.apply(updates, slots, weights, tf.constant(True))
        return weights["w"].numpy()

    return step


@pytest.mark.parametrize("case", TRAJECTORIES, ids=" ".join)
def test_trajectories_are_kerass(case):
    hyper, rate, golden = TRAJECTORIES[case]
    step = optimizer_on(case[0], [1.0] * 10, **hyper)
    gradient = [0.01] * 10
    for expected in golden:
        np.testing.assert_allclose(step(gradient, rate), expected, rtol=5e-4, atol=5e-4)
        gradient = np.arange(0.1, 1.05, 0.1)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("sgd", [0.5, -1.0, -0.5, 3.0]),
        ("rmsprop", [-0.5811, 0.4189, 1.4189, 2.4189]),
        ("adam", [0.5, 1.5, 2.5, 3.5]),
        ("adamw", [0.4980, 1.4960, 2.494, 3.492]),
        ("nadam", [0.4686, 1.4686, 2.4686, 3.4686]),
        ("adamax", [0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_a_single_step_is_kerass(name, expected):
    found = optimizer_on(name, [1.0, 2.0, 3.0, 4.0])([1.0, 6.0, 7.0, 2.0], 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "clip, expected", [(dict(clip_norm=1.0), 2**0.5 / 2), (dict(clip_value=1.0), 1.0)]
)
def test_clipped_gradients_are_kerass(clip, expected):
    found = optimizer_on("sgd", [0.0, 0.0], **clip)([100.0, 100.0], 1.0)
    np.testing.assert_allclose(found, [-expected] * 2, rtol=1e-6)


def schedule(name, rate, **hyper):
    return Schedule(name, learning_rate=rate, **hyper)


def half_cosine(step, steps, alpha=0.0):
    return (1 - alpha) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)) + alpha


SCHEDULES = [
    (schedule("exponential", 0.05, decay_steps=10, decay_rate=0.96), {5: 0.05 * 0.96**0.5}),
    (
        schedule("exponential", 0.1, decay_steps=3, decay_rate=0.96, staircase=True),
        {1: 0.1, 2: 0.1, 100: 0.1 * 0.96**33},
    ),
    (
        schedule("piecewise", 1.0, boundaries=(100, 110, 120), rates=(0.1, 0.01, 0.001)),
        {0: 1.0, 100: 1.0, 105: 0.1, 110: 0.1, 120: 0.01, 999: 0.001},
    ),
    (
        schedule("piecewise", 0.4, boundaries=(1, 2, 3), rates=(0.5, 0.6, 0.7)),
        {0: 0.4, 1: 0.4, 2: 0.5, 3: 0.6, 4: 0.7},
    ),
    (schedule("polynomial", 0.05, decay_steps=10), {5: 0.025}),
    (
        schedule("polynomial", 0.05, decay_steps=10, end_rate=0.001),
        {5: 0.0255, 10: 0.001, 15: 0.001},
    ),
    (schedule("polynomial", 0.05, decay_steps=10, power=0.5), {5: 0.05 * 0.5**0.5}),
    (
        schedule("polynomial", 0.05, decay_steps=10, end_rate=0.001, power=0.5),
        {5: 0.049 * 0.5**0.5 + 0.001, 10: 0.001, 15: 0.001},
    ),
    (
        schedule("inverse_time", 0.1, decay_steps=10, decay_rate=0.96),
        {i: 0.1 / (1 + i / 10 * 0.96) for i in range(11)},
    ),
    (
        schedule("inverse_time", 0.1, decay_steps=10, decay_rate=0.96, staircase=True),
        {i: 0.1 / (1 + 0.96 * (i // 10)) for i in range(11)},
    ),
    (
        schedule("cosine", 1.0, decay_steps=1000),
        {i: half_cosine(i, 1000) for i in range(0, 1500, 250)},
    ),
    (
        schedule("cosine", 1.0, decay_steps=1000, end_rate=0.1),
        {i: half_cosine(i, 1000, 0.1) for i in range(0, 1500, 250)},
    ),
    # Restarts: the fraction of 1000 steps that has passed, here of periods of 1000.
    (
        schedule("cosine", 1.0, decay_steps=1000, restarts=True, t_mul=1.0),
        {i: half_cosine(i % 1000, 1000) for i in range(0, 1500, 250)},
    ),
    (
        schedule("cosine", 1.0, decay_steps=1000, restarts=True, t_mul=1.0, end_rate=0.1),
        {i: half_cosine(i % 1000, 1000, 0.1) for i in range(0, 1500, 250)},
    ),
    (
        schedule("cosine", 1.0, decay_steps=1000, restarts=True, t_mul=1.0, m_mul=0.9),
        {i: 0.9 ** (i // 1000) * half_cosine(i % 1000, 1000) for i in range(0, 1500, 250)},
    ),
    (
        schedule("cosine", 1.0, decay_steps=10, restarts=True, t_mul=1.0, m_mul=0.5, end_rate=0.1),
        {10: 0.55, 20: 0.325, 30: 0.2125},
    ),
    (
        schedule("cosine", 1.0, decay_steps=1000, restarts=True, t_mul=1.0, m_mul=0.0),
        {i: half_cosine(i, 1000) if i < 1000 else 0.0 for i in range(0, 1500, 250)},
    ),
]


@pytest.mark.parametrize("rule, golden", SCHEDULES, ids=lambda x: getattr(x, "name", ""))
def test_schedules_are_kerass(rule, golden):
    for step, expected in golden.items():
        assert float(rule(step)) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("cosine", [False, True], ids=["linear", "cosine"])
def test_one_cycle_is_pytorchs(cosine, three_phase):
    """OneCycleLR(max_lr=1, total_steps=50, pct_start=0.3, div_factor=25, final_div_factor=100)."""
    total, share, first, last = 50, 0.3, 1 / 25, 1 / 2500
    ends = [(share * total - 1, first, 1.0)]
    if three_phase:
        ends += [(2 * share * total - 2, 1.0, first), (total - 1, first, last)]
    else:
        ends += [(total - 1, 1.0, last)]

    def rate(step):
        begin = 0.0
        for end, start, goal in ends:
            if step <= end:
                passed = (step - begin) / (end - begin)
                if cosine:
                    return goal + (start - goal) / 2 * (1 + math.cos(math.pi * passed))
                return start + (goal - start) * passed
            begin = end
        raise AssertionError(step)

    rule = schedule(
        "one_cycle",
        1.0,
        decay_steps=total - 1,
        peak_at=(share * total - 1) / (total - 1),
        start_rate=first,
        end_rate=last,
        anneal_cosine=cosine,
        three_phase=three_phase,
    )
    for step in range(total):
        assert float(rule(step)) == pytest.approx(rate(step), abs=1e-6)
