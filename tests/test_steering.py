"""What a run is chosen by, stopped by and steered by; rates and weights by name; mixed examples."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfloop
from tfloop import criterion
from tfloop.data import augmentation
from tfloop.errors import UserError
from tfloop.optimizers import Optimizer
from tfloop.randomness import Key, seed_of
from tfloop.training import checkpoints, session

from conftest import SMALL


@pytest.fixture
def config(tmp_path):
    def make(**settings):
        quiet = dict(quiet=True, logdir=str(tmp_path), name="run", summaries="none")
        return tfloop.Config.make(**{**SMALL, **quiet, **settings})

    return make


@pytest.mark.quick
@pytest.mark.parametrize(
    "text, expected",
    [
        ("accuracy", ("validation", "accuracy", True)),
        ("test loss", ("test", "loss", False)),
        ("mean_absolute_error", ("validation", "mean_absolute_error", False)),
        ("max validation my_error", ("validation", "my_error", True)),
        ("min train r2", ("train", "r2", False)),
        ("kind/accuracy", ("validation", "kind/accuracy", True)),
    ],
)
def test_a_criterion_is_read_with_its_direction(text, expected):
    assert tuple(criterion.parse(text)) == expected


@pytest.mark.quick
def test_a_goal_a_time_and_a_period_are_read():
    goal = criterion.parse_goal("test accuracy > 0.993")
    assert goal.is_reached({"test": {"accuracy": 0.994}})
    assert not goal.is_reached({"test": {"accuracy": 0.993}}) and not goal.is_reached({})
    assert [criterion.seconds(text) for text in ("90s", "10m", "1.5h")] == [90, 600, 5400]
    assert criterion.every("500") == (1, 500) and criterion.every("2epochs") == (2, 0)
    for bad in ("", "0", "x", "-1", "2 epochs"):
        with pytest.raises(UserError, match="evaluate_every"):
            criterion.every(bad)


def test_a_run_stops_when_its_goal_is_reached_and_is_finished(config, capsys):
    settings = dict(epochs=30, learning_rate=0.01, until="test accuracy > 0.8", quiet=False)
    found = session.train(config(**settings))[0]
    accuracies = [epoch["test"]["accuracy"] for epoch in found["epochs"]]
    assert found["finished"] and accuracies[-1] > 0.8 and max(accuracies[:-1]) <= 0.8
    assert "stopped: test accuracy > 0.8 is reached" in capsys.readouterr().out


def test_the_best_goes_by_any_metric_and_direction(config):
    settings = dict(epochs=6, learning_rate=0.02, choose_by="test loss", keep=1)
    found = session.train(config(**settings))[0]
    losses = [epoch["test"]["total"] for epoch in found["epochs"]]
    best = found["best"]
    assert best["metric"] == "test loss" and best["value"] == min(losses)
    assert best["epoch"] == 1 + losses.index(min(losses))
    _, state, _ = tfloop.open_run(found["folder"], best=True)
    assert int(state.epoch) == best["epoch"]


def test_evaluations_within_an_epoch_are_recorded_and_change_nothing(config):
    """15 steps an epoch: after steps 4, 8, 12, and at the epoch's end."""
    plain = session.train(config(epochs=2))[0]
    often = session.train(config(epochs=2, evaluate_every="4"))[0]
    assert [entry["step"] for entry in often["evaluations"]] == [4, 8, 12, 16, 20, 24, 28]
    assert [entry["step"] for entry in often["epochs"]] == [15, 30]
    assert often["weights_sha256"] == plain["weights_sha256"]
    assert often["final"]["test"] == plain["final"]["test"]
    seldom = session.train(config(epochs=3, evaluate_every="2epochs"))[0]
    assert ["test" in entry for entry in seldom["epochs"]] == [False, True, True]


def test_a_run_on_a_plateau_resumes_with_the_same_bits(config):
    settings = dict(
        epochs=4,
        schedule="plateau",
        plateau_patience=1,
        plateau_factor=0.5,
        choose_by="test loss",
        learning_rate=0.05,
        evaluate_every="4",
        checkpoint_every="4",
    )
    whole = session.train(config(**settings))[0]
    rates = [entry["learning_rate"] for entry in whole["epochs"]]
    assert rates[-1] < rates[0]
    stops = iter([False] * 9 + [True] * 99)
    cut = session.train(config(**settings), stop=lambda: next(stops))[0]
    assert 0 < cut["steps"] < whole["steps"]
    folder = Path(cut["folder"])
    ended = session.train(config(**settings), resume=[folder])[0]
    assert ended["state_sha256"] == whole["state_sha256"]
    assert ended["evaluations"] == whole["evaluations"]


@pytest.mark.quick
def test_the_rate_falls_as_with_keras_and_begins_anew_with_the_schedule():
    values = [1.0, 0.9, 0.95, 0.91, 0.92, 0.8, 0.85, 0.85, 0.85, 0.85, 0.85, 0.1, 0.2, 0.3]
    schedule = tfloop.Schedule(
        "plateau", learning_rate=0.1, plateau_factor=0.5, plateau_patience=2, min_rate=0.02
    )
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    theirs = keras.callbacks.ReduceLROnPlateau(
        "loss", factor=0.5, patience=2, min_delta=0.0, min_lr=0.02
    )
    theirs.set_model(model)
    theirs.on_train_begin()
    for epoch, value in enumerate(values):
        schedule.note(value, is_max=False)
        theirs.on_epoch_end(epoch, {"loss": value})
        assert float(schedule(0)) == pytest.approx(float(model.optimizer.learning_rate))
    assert float(schedule(0)) == pytest.approx(0.02)
    schedule.reset()
    assert float(schedule(0)) == pytest.approx(0.1)


def test_what_a_plateau_keeps_is_saved_and_reset_with_the_state(loop, tmp_path):
    one = loop(schedule="plateau", plateau_patience=1)
    one.state.schedule.note(1.0, is_max=True)
    one.state.schedule.note(1.0, is_max=True)
    assert float(one.state.schedule.slots["falls"]) == 1
    path = checkpoints.Checkpoints(one.state, tmp_path).save({})
    other = loop(schedule="plateau", plateau_patience=1)
    checkpoints.restore(other.state, path)
    assert float(other.state.schedule.slots["falls"]) == 1
    one.state.reset()
    assert float(one.state.schedule.slots["falls"]) == 0


# --- weights by name


def test_frozen_weights_do_not_move_and_batch_normalisation_goes_by_its_averages(loop):
    one = loop(freeze="conv1|norm1", batch_norm=True, ema=0.9)
    assert not any(name.startswith(("conv1", "norm1")) for name in one.state.weights)
    before = {name: v.numpy() for name, v in one.state.non_trainable.items()}
    one.fit(1)
    for name, value in before.items():
        if name.startswith(("conv1", "norm1")):
            np.testing.assert_array_equal(one.state.non_trainable[name], value)
    assert one.state.non_trainable["norm2/moving_mean"].numpy().any()


def test_the_rate_of_some_weights_is_a_factor_of_the_others(loop):
    plain, other = loop(optimizer="sgd"), loop(optimizer="sgd", rate_of="conv.*:0.1,conv2:0")
    factors = {"conv1": 0.1, "conv2": 0.0}
    before = {name: v.numpy() for name, v in plain.state.weights.items()}
    for one in (plain, other):
        tfloop.train_step(one.state, one.batch(0))
    for name, start in before.items():
        moved = plain.state.weights[name].numpy() - start
        factor = factors.get(name.split("/")[0], 1.0)
        found = other.state.weights[name].numpy() - start
        np.testing.assert_allclose(found, factor * moved, rtol=1e-3, atol=1e-7)


def twins():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)])


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (
            lambda: Optimizer("adamw", weight_decay=0.1, exclude_from_weight_decay="bias"),
            lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        ),
        (
            lambda: Optimizer("lion", weight_decay=0.1, exclude_from_weight_decay="bias"),
            lambda: keras.optimizers.Lion(0.01, weight_decay=0.1),
        ),
        (lambda: Optimizer("lion"), lambda: keras.optimizers.Lion(0.01)),
    ],
    ids=["adamw", "lion with decay", "lion"],
)
def test_decay_leaves_out_what_is_excluded_as_with_keras(ours, theirs, random):
    data = tfloop.from_arrays(random.normal(size=(20, 3)), np.arange(20) % 2, standardize=False)
    state = tfloop.TrainState(twins(), ours(), 0.01)
    loop = tfloop.Loop(state, data, batch_size=20)
    model, optimizer = twins(), theirs()
    for layer in model.layers:  # that biases decay, too, would show
        layer.bias.assign(np.ones(layer.bias.shape))
    for name, weight in state.weights.items():
        if "bias" in name:
            weight.assign(tf.ones_like(weight))
    if optimizer.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.build(model.trainable_variables)
    check_steps(state, loop, model, optimizer)


def check_steps(state, loop, model, optimizer):
    """Five steps of ours on one batch are those of a plain GradientTape loop with Keras's."""
    batch, weights = loop.batch(0), model.trainable_variables
    for _ in range(5):
        tfloop.train_step(state, batch)
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                batch.targets, model(batch.inputs)
            )
            loss = tf.reduce_mean(losses)
        optimizer.apply(tape.gradient(loss, weights), weights)
    for ours, theirs in zip(state.weights.values(), weights):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


# --- flip, mixup, cutmix


def key():
    return Key(seed_of(0, 0))


@pytest.mark.quick
def test_half_of_the_images_are_flipped(random):
    images = tf.constant(random.normal(size=(400, 3, 4, 1)), tf.float32)
    found = augmentation.flip(images, key())
    same = np.all(found == images, axis=(1, 2, 3))
    other = np.all(found == images[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same ^ other) and 150 < same.sum() < 250
    np.testing.assert_array_equal(found, augmentation.flip(images, key()))


@pytest.mark.quick
@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_come_from_a_beta_distribution(alpha):
    """Its variance is 1 / (4 · (2 · alpha + 1))."""
    quantiles = augmentation.beta_quantiles(alpha)
    draws = [float(augmentation.draw_share(key().fold_in(i), quantiles)) for i in range(500)]
    assert np.mean(draws) == pytest.approx(0.5, abs=0.06)
    assert np.var(quantiles) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.01)
    assert np.var(draws) == pytest.approx(np.var(quantiles), rel=0.15)


@pytest.mark.quick
def test_a_box_of_the_other_image_has_the_share_that_is_told(random):
    images = tf.constant(np.arange(6.0).repeat(48).reshape(6, 8, 6, 1), tf.float32)
    for number in range(20):
        found, share = augmentation.cut_mixed(images, key().fold_in(number), tf.constant(0.6))
        own = np.mean(found.numpy() == images.numpy(), axis=(1, 2, 3))
        np.testing.assert_allclose(own, float(share), atol=1e-6)
        assert set(np.unique(found[0])) <= {0.0, 5.0}


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_the_loss_of_mixed_examples_is_the_mixed_loss(loop, settings):
    """λ · loss for the own class + (1 - λ) · loss for the other's, of the mixed images."""
    one = loop(**settings)
    state, batch = one.state, one.batch(0)
    images, share = state.augmentation.mix(batch.inputs, state.key().fold_in(-3))
    logits = state.forward(state.standardize(images))
    both = [
        tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        for labels in (batch.targets, batch.targets[::-1])
    ]
    expected = tf.reduce_mean(share * both[0] + (1 - share) * both[1])
    step = tfloop.train_step(state, batch)
    assert float(step.sums[3] / step.sums[1]) == pytest.approx(float(expected), rel=1e-5)


def test_mixing_is_a_function_of_the_position_and_parts_share_it(loop):
    one, parts = loop(mixup=0.4), loop(mixup=0.4, accumulate=2)
    one.fit(1)
    parts.fit(1)
    for ours, theirs in zip(one.state.weights.values(), parts.state.weights.values()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.quick
def test_what_cannot_be_mixed_is_refused(digits):
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(10)])
    mixing = tfloop.Augmentation(mixup=0.2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with pytest.raises(UserError, match="mixup: makes shares of class numbers, which the loss"):
        tfloop.Loop(tfloop.TrainState(model, loss=loss, augmentation=mixing), digits)
    table = tfloop.from_arrays(np.zeros((9, 2)), np.arange(9) % 2)
    flat = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    with pytest.raises(UserError, match="mixup: the inputs are 2 float32; images"):
        tfloop.Loop(tfloop.TrainState(flat, augmentation=mixing), table, batch_size=3)


def test_results_are_json_with_the_metrics_of_every_evaluation(config, tmp_path):
    found = session.train(config(epochs=1, metrics="f1_macro"))[0]
    stored = json.loads((tmp_path / "run-001" / "result.json").read_text())
    assert stored["final"]["test"]["f1_macro"] == found["final"]["test"]["f1_macro"]
    assert "f1_macro" not in stored["final"]["train"]


def test_muon_is_kerass(random):
    data = tfloop.from_arrays(random.normal(size=(20, 3)), np.arange(20) % 2, standardize=False)
    config = tfloop.Config.make(optimizer="muon", weight_decay=0.05, batch_size=20)
    from tfloop.assembly import make_optimizer

    state = tfloop.TrainState(twins(), make_optimizer(config), tfloop.Schedule(learning_rate=0.01))
    loop = tfloop.Loop(state, data, batch_size=20)
    model, optimizer = twins(), keras.optimizers.Muon(0.01, weight_decay=0.05)
    check_steps(state, loop, model, optimizer)
