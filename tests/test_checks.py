"""check_gradients, parity, overfit: they pass where all is well, and they can fail."""

import numpy as np
import pytest
import tensorflow as tf

import tfloop
from tfloop import penalties
from tfloop.inspection import checks

SMALL = dict(preset="digits", conv=(3,), pool=(2,), dense=(6,), batch_size=50)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(batch_norm=True, dropout=0.4),
        dict(dense=1, conv=2, seed=2),
        dict(conv_activation="elu", padding="same", kernel=5),
    ],
    ids=str,
)
def test_gradients_agree_with_central_differences(settings):
    found = list(
        checks.check_gradients(
            tfloop.Config.make(**{**SMALL, **settings}), (8, 8, 1), 4, settings.get("seed", 0)
        )
    )
    assert {
        "conv1",
        "dense1",
        "output",
        "penalty l1",
        "penalty l2",
        "plain forward pass",
        "fast forward pass",
    } <= {c.what for c in found}
    assert all(check.passed for check in found), max(found, key=lambda check: check.error)
    assert any(abs(check.tape) > 0.1 for check in found)


def test_a_wrong_gradient_is_found(monkeypatch):
    @tf.custom_gradient
    def wrong(kernel):
        return tf.reduce_sum(kernel**2), lambda upstream: upstream * 2.001 * kernel

    monkeypatch.setattr(penalties, "l2", wrong)
    found = list(checks.check_gradients(tfloop.Config.make(**SMALL), (8, 8, 1), 4))
    assert [check.weight for check in found if not check.passed] == ["kernel"]


def test_units_in_the_last_place():
    one = np.float32(1)
    assert checks.ulps(
        np.array([one, 0.0, -1.0]), np.array([np.nextafter(one, np.float32(2)), -0.0, 1.0])
    ).tolist()[:2] == [1, 0]
    tiny = np.nextafter(np.float32(0), one)
    assert checks.ulps(np.array([tiny]), np.array([-tiny])) == 2


def test_parity_names_the_step_and_the_layer_where_modes_part():
    found = {mode.mode: mode for mode in checks.parity(tfloop.Config.make(**SMALL), 3)}
    for mode in ("compiled, again", "host pipeline", "prefetch pipeline", "many steps a call"):
        assert found[mode].step is None
    # Other orders of additions.
    assert found["XLA"].step is not None and found["fast, 2 shards"].step is not None
    for mode in found.values():
        if mode.step is not None:
            assert mode.step in (1, 2, 3) and mode.layer in (
                "conv1/kernel",
                "conv1/bias",
                "dense1/kernel",
                "dense1/bias",
                "output/kernel",
                "output/bias",
            )
            assert mode.ulps > 0 and mode.largest < 1e-3


def test_parity_compares_one_epoch_at_most():
    with pytest.raises(tfloop.UserError, match="steps=99: an epoch has 29 steps"):
        next(checks.parity(tfloop.Config.make(**SMALL), 99))


@pytest.mark.quick
def test_parity_can_tell_runs_apart():
    config = tfloop.Config.make(**SMALL)
    data = tfloop.load("digits")

    def run(learning_rate):
        return checks._weights(config.replace(learning_rate=learning_rate), data, 2)

    found = checks._compare_runs("other", dict(run(0.001)), run(0.002))
    assert found.step == 1 and found.layer == "conv1/kernel" and found.largest > 1e-3


@pytest.mark.quick
def test_one_batch_is_memorised():
    *_, last = checks.overfit(tfloop.Config.make(**{**SMALL, "learning_rate": 0.01}), 500)
    assert last.done and last.step < 500


@pytest.mark.quick
def test_a_loop_that_does_not_learn_is_told():
    *_, last = checks.overfit(tfloop.Config.make(**{**SMALL, "learning_rate": 0.0}), 5)
    assert last.step == 5 and not last.done


@pytest.mark.parametrize(
    "settings",
    [dict(schedule="cosine", label_smoothing=0.1), dict(label_smoothing=0.05, output="sigmoid")],
    ids=str,
)
def test_schedules_and_smoothed_labels_do_not_stand_in_the_way(settings):
    *_, last = checks.overfit(
        tfloop.Config.make(**{**SMALL, "learning_rate": 0.005, **settings}), 800
    )
    assert last.done, last
