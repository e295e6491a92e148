import keras
import numpy as np
import pytest

from tfloop.assembly import make_schedule
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.schedules import SCHEDULES, Schedule

pytestmark = pytest.mark.quick

KS = keras.optimizers.schedules


@pytest.mark.parametrize(
    "step, rate",
    [
        (12194, 7.57920279e-05),
        (20636, 4.6219262e-05),
        (51590, 1.90150222e-05),
        (65660, 1.50015e-05),
    ],
)
def test_inverse_time_gives_the_rates_of_the_articles_log(step, rate):
    schedule = Schedule("inverse_time", learning_rate=0.001, decay_steps=1, decay_rate=0.001)
    assert float(schedule(step)) == pytest.approx(rate, rel=1e-7)


@pytest.mark.parametrize(
    "name, hyper, reference",
    [
        ("inverse_time", dict(decay_steps=7, decay_rate=0.3), KS.InverseTimeDecay(0.1, 7, 0.3)),
        (
            "inverse_time",
            dict(decay_steps=7, decay_rate=0.3, staircase=True),
            KS.InverseTimeDecay(0.1, 7, 0.3, True),
        ),
        ("exponential", dict(decay_steps=7, decay_rate=0.9), KS.ExponentialDecay(0.1, 7, 0.9)),
        (
            "exponential",
            dict(decay_steps=7, decay_rate=0.9, staircase=True),
            KS.ExponentialDecay(0.1, 7, 0.9, True),
        ),
        (
            "polynomial",
            dict(decay_steps=60, end_rate=0.01, power=2),
            KS.PolynomialDecay(0.1, 60, 0.01, 2.0),
        ),
        (
            "piecewise",
            dict(boundaries=[10, 30], rates=[0.05, 0.02]),
            KS.PiecewiseConstantDecay([10, 30], [0.1, 0.05, 0.02]),
        ),
        ("cosine", dict(decay_steps=60, end_rate=0.01), KS.CosineDecay(0.1, 60, alpha=0.1)),
        ("cosine", dict(decay_steps=10, restarts=True), KS.CosineDecayRestarts(0.1, 10)),
        (
            "cosine",
            dict(decay_steps=10, t_mul=1, m_mul=0.5, restarts=True),
            KS.CosineDecayRestarts(0.1, 10, 1.0, 0.5),
        ),
        (
            "cosine",
            dict(decay_steps=10, t_mul=1.5, restarts=True),
            KS.CosineDecayRestarts(0.1, 10, 1.5),
        ),
    ],
)
def test_a_schedule_is_keras_own(name, hyper, reference):
    schedule = Schedule(name, learning_rate=0.1, **hyper)
    steps = range(100)
    np.testing.assert_allclose(
        [schedule(s) for s in steps], [reference(s) for s in steps], rtol=2e-5, atol=2e-7
    )


def test_constant_is_constant():
    assert [float(Schedule("constant", learning_rate=0.5)(step)) for step in (0, 10**6)] == [
        0.5,
        0.5,
    ]


def test_one_cycle_is_a_triangle_worked_by_hand():
    schedule = Schedule(
        "one_cycle", learning_rate=0.4, decay_steps=100, peak_at=0.25, start_rate=0.1, end_rate=0.0
    )
    at = {0: 0.1, 10: 0.1 + 0.3 * 10 / 25, 25: 0.4, 50: 0.4 * 50 / 75, 100: 0.0, 200: 0.0}
    np.testing.assert_allclose(
        [schedule(step) for step in at], list(at.values()), rtol=1e-6, atol=1e-8
    )


def test_warm_up_rises_linearly_and_shifts_the_schedule():
    plain = Schedule("exponential", learning_rate=0.1, decay_rate=0.9)
    warm = Schedule("exponential", learning_rate=0.1, decay_rate=0.9, warmup_steps=4)
    np.testing.assert_allclose([warm(s) for s in range(4)], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    np.testing.assert_allclose(
        [warm(4 + s) for s in range(9)], [plain(s) for s in range(9)], rtol=1e-6
    )


def test_warm_up_counted_in_epochs_rises_with_every_step():
    warm = Schedule("constant", learning_rate=0.1, warmup_steps=0.5, unit_steps=10)
    np.testing.assert_allclose(
        [warm(s) for s in range(7)], [0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1], rtol=1e-6
    )


def test_counted_in_epochs_a_schedule_is_stretched_by_the_steps_of_one():
    steps, epochs = (
        Schedule("inverse_time", learning_rate=0.1, decay_rate=0.5, unit_steps=u) for u in (1, 10)
    )
    assert float(epochs(70)) == float(steps(7))


@pytest.mark.parametrize("name", SCHEDULES)
def test_doubling_decay_steps_halves_the_speed(name):
    if name in ("constant", "piecewise", "plateau"):
        pytest.skip(f"{name} has no decay_steps")
    slow, fast = (Schedule(name, learning_rate=0.1, decay_steps=n) for n in (80, 40))
    np.testing.assert_allclose(
        [slow(2 * s) for s in range(50)], [fast(s) for s in range(50)], rtol=1e-6
    )


def test_assigning_a_number_changes_the_rate():
    schedule = Schedule("exponential", learning_rate=0.1, decay_rate=0.5)
    schedule.hyper["decay_rate"].assign(0.25)
    assert float(schedule(1)) == pytest.approx(0.025)


@pytest.mark.parametrize(
    "name, hyper, message",
    [
        ("linear", {}, "schedule=linear is unknown; choose from constant, inverse_time"),
        (
            "constant",
            dict(learning_rate=1, decay_rate=1),
            "decay_rate: schedule 'constant' has no decay_rate",
        ),
        ("cosine", dict(learning_rate=1), "decay_steps: schedule 'cosine' needs it"),
    ],
)
def test_what_a_schedule_does_not_have_is_named(name, hyper, message):
    with pytest.raises(UserError, match=message):
        Schedule(name, **hyper)


@pytest.mark.parametrize("epochs", [1, 3])
def test_what_has_no_length_of_its_own_ends_with_the_run(epochs):
    """With a warm-up of half an epoch too, in whatever it is counted."""
    by_epochs = make_schedule(
        Config.make(
            "digits", schedule="cosine", warmup_steps=0.5, epochs=epochs, schedule_unit="epoch"
        ),
        40,
    )
    by_steps = make_schedule(
        Config.make("digits", schedule="cosine", warmup_steps=20, epochs=epochs), 40
    )
    np.testing.assert_allclose(
        [by_epochs(s) for s in range(40 * epochs + 1)],
        [by_steps(s) for s in range(40 * epochs + 1)],
        atol=1e-9,
    )
    assert float(by_steps(40 * epochs)) == pytest.approx(0.0, abs=1e-9) and float(
        by_steps(20)
    ) == pytest.approx(0.001)
