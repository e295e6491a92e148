"""The heart of the project: a reset is exact, in place, and traces nothing."""

import itertools
import subprocess
import sys

import keras
import numpy as np
import pytest

import tfloop
from tfloop.optimizers import OPTIMIZERS

from conftest import SMALL

PIPELINES = ("resident", "host", "prefetch")
RICH = dict(schedule="inverse_time", decay_rate=0.01, l2=0.01, dropout=0.2, batch_norm=True)
FRESH = """
import sys, tfloop
for optimizer in sys.argv[1].split(","):
    loop = tfloop.make_loop(tfloop.Config.make(optimizer=optimizer, **{settings!r}))
    loop.fit(2)
    print(optimizer, loop.state.digest())
"""


@pytest.fixture(scope="module")
def fresh_process() -> dict[str, str]:
    """The digest of the whole state after a run of two epochs in a process of its own, by
    optimizer."""
    code = FRESH.replace("{settings!r}", repr({**SMALL, **RICH}))
    lines = subprocess.run(
        [sys.executable, "-c", code, ",".join(OPTIMIZERS)],
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(line.split() for line in lines.stdout.splitlines())


@pytest.mark.parametrize("optimizer, pipeline", zip(OPTIMIZERS, itertools.cycle(PIPELINES)))
def test_reset_repeats_the_first_run_bit_for_bit(loop, fresh_process, optimizer, pipeline):
    trained = loop(optimizer=optimizer, pipeline=pipeline, **RICH)
    first, digest = trained.fit(2), trained.state.digest()
    assert digest == fresh_process[optimizer]

    trained.state.reset()
    second = trained.fit(2)

    assert (second.train, second.test) == (first.train, first.test)
    assert trained.traces == {"train": 1, "evaluate": 1}
    assert int(trained.state.global_step) == 60  # it alone goes on
    trained.state.global_step.assign(30)
    assert trained.state.digest() == digest


def test_without_a_reset_the_second_run_is_another(loop):
    """Otherwise the test above could not fail."""
    trained = loop(**RICH)
    first = trained.fit(2)
    trained.state.epoch.assign(0)
    assert trained.fit(2).train != first.train


def test_a_new_seed_gives_the_run_that_a_fresh_state_with_it_gives(loop):
    trained, fresh = loop(), loop(seed=5)
    trained.fit(1)
    trained.state.reset(seed=5)
    assert trained.fit(2).train == fresh.fit(2).train


@pytest.mark.quick
def test_begin_is_as_good_as_new(loop):
    trained = loop(**RICH)
    new = trained.state.digest()
    trained.fit(1)
    assert trained.state.digest() != new
    trained.state.begin(0)
    assert trained.state.digest() == new


@pytest.mark.parametrize(
    "part, moved",
    [
        ("weights", {"weights", "moving"}),
        ("slots", {"slots", "count"}),
        ("schedule", {"schedule_step"}),
        ("data", {"epoch", "batch"}),
    ],
)
def test_any_part_is_reset_alone(loop, part, moved):
    trained = loop(optimizer="nadam", steps_per_call=4, **RICH)
    start = {name: v.numpy() for name, v in trained.state.named().items()}
    for record in trained.run(2):
        if record.step == 19:
            break
    before = {name: v.numpy() for name, v in trained.state.named().items()}
    trained.state.reset(**{name: name == part for name in ("weights", "slots", "schedule", "data")})
    for name, variable in trained.state.named().items():
        belongs = name.split("/")[0] in moved or (name == "totals" and part == "data")
        np.testing.assert_array_equal(
            variable.numpy(), (start if belongs else before)[name], err_msg=name
        )
        if belongs and "beta" not in name:
            assert not np.array_equal(before[name], start[name]), name


def test_numbers_stay_unless_they_are_reset_too(loop):
    state = loop(l2=0.5).state
    state.hyper["l2"].assign(0.25)
    state.reset()
    assert float(state.hyper["l2"]) == 0.25
    state.reset(hyper=True)
    assert float(state.hyper["l2"]) == 0.5
    with pytest.raises(TypeError):
        state.hyper["l2"] = 1.0


def test_a_warm_restart_keeps_the_weights_and_starts_the_rate_again(loop):
    trained = loop(schedule="inverse_time", decay_rate=0.1)
    late = trained.fit(3).learning_rate
    weights = trained.state.digest("weights")
    trained.state.reset(weights=False, slots=False, data=False)
    assert trained.state.digest("weights") == weights and int(trained.state.epoch) == 3
    again = next(iter(trained.run(4)))
    assert late == pytest.approx(0.001 / (1 + 0.1 * 44)) and again.learning_rate == pytest.approx(
        0.001 / (1 + 0.1 * 14)
    )


@pytest.mark.quick
def test_every_variable_that_a_step_reads_or_writes_is_in_the_state(loop):
    """What TensorFlow's graph captures, but for the images and their order, is named."""
    trained = loop(optimizer="nadam", **RICH)
    data = [trained.pipeline._order, *trained.data.train.tensors]
    named = {id(v) for v in [*trained.state.named().values(), *data]}
    so_far = np.zeros(trained.state.totals.shape), np.float32(0)
    captured = trained.compiled.call.get_concrete_function((), np.int32(1), *so_far).variables
    missing = [v.name for v in captured if id(v) not in named]
    assert not missing


@pytest.mark.quick
def test_digest_sees_one_bit(loop):
    state = loop().state
    before = state.digest()
    state.weights["output/bias"][3].assign(np.float32(1e-45))
    assert state.digest() != before and state.digest("slots") == loop().state.digest("slots")


def test_a_model_without_weights_is_refused():
    with pytest.raises(tfloop.UserError, match="no trainable variables"):
        tfloop.TrainState(keras.Sequential([keras.Input((4,)), keras.layers.Flatten()]))


def test_the_average_of_the_weights_follows_keras_and_is_what_is_evaluated(loop):
    one = loop(ema=0.9, optimizer="sgd", learning_rate=0.1, steps_per_call=1)
    variables = [keras.Variable(weight.numpy()) for weight in one.state.weights.values()]
    reference = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)
    reference.build(variables)
    for record in itertools.islice(one.run(1), 12):
        reference.apply(list(record.gradients.parts().values()), variables)
    with one.state.using_ema():
        for (name, weight), average, variable in zip(
            one.state.weights.items(), reference._model_variables_moving_average, variables
        ):
            np.testing.assert_allclose(weight, average, rtol=1e-4, atol=1e-6, err_msg=name)
            assert not np.allclose(weight, variable, rtol=1e-4, atol=1e-6)
        metrics = one.evaluate(one.data.test)
    assert one.evaluate(one.data.test) == metrics  # and the weights are back in their place
    np.testing.assert_allclose(
        one.state.weights["conv1/kernel"], variables[0], rtol=1e-4, atol=1e-6
    )


def test_the_average_resets_with_the_weights(loop):
    one = loop(ema=0.99, batch_norm=True)
    begin = one.state.ema_weights.numpy()
    first, digest = one.fit(2), one.state.digest()
    one.state.reset()
    np.testing.assert_array_equal(one.state.ema_weights, begin)
    assert one.fit(2).test == first.test
    one.state.begin(0)
    one.fit(2)
    assert one.state.digest() == digest and one.traces["train"] == 1
