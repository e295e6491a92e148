"""Stepping through gradients: the walk back agrees with the step, and pdb stops where it should."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

import tfloop
from tfloop.errors import UserError
from tfloop.inspection import debugger

SETTINGS = [
    {},
    dict(l1=1e-3, l2=1e-2, penalize="all"),
    dict(batch_norm=True, dropout=0.3),
    dict(output="sigmoid"),
]


@pytest.mark.quick
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_walk_back_gives_the_gradients_of_the_tape(loop, settings):
    one = loop(**settings)
    plain = tfloop.forward_and_backward(one.state, one.batch(0))
    walked = debugger.forward_and_backward(one.state, one.batch(0))
    np.testing.assert_array_equal(walked.outputs, plain.outputs)
    assert list(walked.gradients) == list(plain.gradients)
    for name, gradient in plain.gradients.items():
        np.testing.assert_allclose(walked.gradients[name], gradient, rtol=1e-5, atol=1e-7)


def test_without_penalties_it_does_so_bit_for_bit(loop):
    one = loop()
    plain, walked = (
        tfloop.forward_and_backward(one.state, one.batch(0)),
        debugger.forward_and_backward(one.state, one.batch(0)),
    )
    for name, gradient in plain.gradients.items():
        np.testing.assert_array_equal(walked.gradients[name], gradient)


@pytest.mark.quick
def test_the_sum_is_what_the_compiled_step_applies(loop):
    one = loop(l1=1e-3, l2=1e-2, momentum=0.8, fast=False, steps_per_call=1)
    layers = list(debugger.backward(one.state, one.batch(0)))
    call = next(one.train_epoch())
    for layer in layers:
        for name, gradient in layer.gradients.items():
            np.testing.assert_allclose(sum(gradient[1:]), gradient.total, rtol=1e-6)
            np.testing.assert_allclose(gradient.total, call.gradients[name], rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(
                layer.updates[name], call.updates[name], rtol=1e-2, atol=1e-5
            )


def test_layers_come_from_the_last_to_the_first_with_their_own_weights(loop):
    one = loop(l2=0.01)
    layers = list(debugger.backward(one.state, one.batch(0)))
    assert [layer.name for layer in layers] == [
        "output",
        "dense1",
        "flatten",
        "conv2",
        "pool1",
        "conv1",
    ]
    assert [list(layer.gradients) for layer in layers[:3]] == [
        ["output/kernel", "output/bias"],
        ["dense1/kernel", "dense1/bias"],
        [],
    ]
    for layer in layers:
        assert layer.upstream.shape == layer.activation.shape
    kernel = one.state.weights["output/kernel"]
    np.testing.assert_allclose(layers[0].gradients["output/kernel"].l2, 0.02 * kernel, rtol=1e-6)
    by_hand = (tf.nn.softmax(layers[0].activation) - tf.one_hot(one.batch(0).targets, 10)) / 100
    np.testing.assert_allclose(layers[0].upstream, by_hand, rtol=1e-3, atol=1e-8)
    np.testing.assert_allclose(
        layers[0].gradients["output/bias"].data,
        tf.reduce_sum(by_hand, axis=0),
        rtol=1e-3,
        atol=1e-7,
    )


@pytest.mark.quick
def test_looking_changes_nothing(loop):
    one = loop()
    before = one.state.digest()
    list(debugger.backward(one.state, one.batch(3)))
    assert one.state.digest() == before


def test_a_model_of_ones_own_is_one_layer(digits):
    class Linear(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(tf.random.stateless_normal([64, 10], [1, 2]), name="w")

        def __call__(self, images):
            return tf.reshape(images, [-1, 64]) @ self.w

    one = tfloop.Loop(tfloop.TrainState(Linear(), l2=0.1, standardizer=digits.standardizer), digits)
    (layer,) = debugger.backward(one.state, one.batch(0))
    np.testing.assert_allclose(
        layer.gradients["w"].total,
        tfloop.forward_and_backward(one.state, one.batch(0)).gradients["w"],
        rtol=1e-4,
        atol=1e-6,
    )


def test_a_model_in_a_stack_is_a_layer_with_its_weights(digits):
    import keras

    inner = keras.Sequential(
        [keras.Input([8, 8, 1]), keras.layers.Flatten(), keras.layers.Dense(6, "relu")],
        name="inner",
    )
    model = keras.Sequential([keras.Input([8, 8, 1]), inner, keras.layers.Dense(10)])
    one = tfloop.Loop(tfloop.TrainState(model, standardizer=digits.standardizer), digits)
    assert [len(layer.gradients) for layer in debugger.backward(one.state, one.batch(0))] == [
        2,
        2,
        0,
    ]
    plain, walked = (
        tfloop.forward_and_backward(one.state, one.batch(0)),
        debugger.forward_and_backward(one.state, one.batch(0)),
    )
    for name, gradient in plain.gradients.items():
        np.testing.assert_allclose(walked.gradients[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_batch_that_the_epoch_does_not_have_is_refused(loop):
    for index in (-1, 15):
        with pytest.raises(UserError, match=f"batch {index}: an epoch has the batches 0 to 14"):
            loop().batch(index)


def test_training_with_the_walk_follows_the_compiled_loop(loop):
    plain = loop(fast=False)
    walked = tfloop.make_loop(
        tfloop.Config.make(
            "digits", conv=(4, 6), pool=(2,), dense=(8,), batch_size=100, eager=True
        ),
        grad_fn=debugger.forward_and_backward,
    )
    assert walked.fit(1).train.total == pytest.approx(plain.fit(1).train.total, rel=1e-4)


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *flags, cwd=None):
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "tfloop", "debug", *(flags or ["--preset=digits"])]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            close_fds=True,
            cwd=cwd,
            env={**os.environ, "TERM": "dumb", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        os.close(slave)

    def until(self, text: str, seconds: float = 60) -> str:
        """What it prints until `text` comes."""
        found, deadline = "", time.monotonic() + seconds
        while text not in found:
            ready = select.select([self._master], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"no {text!r} in {found!r}"
            try:
                found += os.read(self._master, 4096).decode()
            except OSError:
                raise AssertionError(f"ended without {text!r}: {found!r}") from None
        return found

    def __call__(self, line: str) -> str:
        os.write(self._master, f"{line}\n".encode())
        return self.until("(tfloop) ")


def test_a_session_steps_from_the_forward_pass_to_the_update(tmp_path):
    pdb = Terminal("--preset=digits", "--l2=0.001", cwd=tmp_path)
    start = pdb.until("(tfloop) ")
    assert "train_step()" in start and "-> learning_rate = state.schedule(" in start
    while "-> loss, accuracy, examples, gradients, more, outputs = grad_fn" not in pdb("n"):
        pass
    assert "forward_and_backward()" in pdb("s")
    seen = []
    while "-> recording = record(state, batch, part)" not in (text := pdb("n")):
        pass
    pdb("s")
    while "--Return--" not in (text := pdb("n")):  # forward, layer by layer, and the loss
        seen.append(text)
    assert sum("activations.append(activation)" in text for text in seen) >= 5
    assert any("loss = losses(" in text for text in seen)
    pdb("n")
    layers = []
    while "--Return--" not in (text := pdb("n")):  # backward, layer by layer
        if "for name, gradient in by_weight.items()" in text and "layer" not in layers[-1:]:
            layers.append(re.search(r"'(\w+)'", pdb("p layer")).group(1))
    assert list(dict.fromkeys(layers)) == ["output", "dense1", "flatten", "conv2", "pool1", "conv1"]
    assert "valid = finite" in pdb("c")
    assert re.search(r"shape=\(3, 3, 1, 16\)", pdb('p gradients["conv1/kernel"]'))
    for expression in (
        "inputs",
        "targets",
        "outputs",
        "loss.data",
        "loss.l1",
        "loss.l2",
        'updates["conv1/kernel"]',
        "learning_rate",
        "gradients.norm",
    ):
        assert "tf.Tensor" in pdb(f"p {expression}")
    pdb("n")
    assert "state.optimizer.apply(" in pdb("n")
    text = pdb("s")
    assert "optimizers.py" in text and "apply()" in text
    os.write(pdb._master, b"q\n")
    assert "quit after 0 steps; nothing was written" in pdb.until("written")
    assert pdb.process.wait(timeout=30) == 0
    assert not list(tmp_path.iterdir())


def test_a_step_of_a_run_is_shown(tmp_path):
    """Through show, layers, loss, where and plot, at a step in the middle of a finished run."""
    config = tfloop.Config.make("digits", epochs=2, logdir=str(tmp_path), quiet=True)
    (result,) = tfloop.train(config)
    pdb = Terminal(result["folder"], "--at=70", cwd=tmp_path)
    start = pdb.until("(tfloop) ")
    assert "step 70 (epoch 2, batch 25): loss " in start and "the same, bit for bit" in start
    assert "uint8 [32, 8, 8, 1]: 0 to 16" in (text := pdb("show images"))
    assert "image 0" in text and len(text.splitlines()) >= 8
    assert re.search(r"int64 \[32\]: 0 to 9", pdb("show labels"))
    assert pdb("where").splitlines()[1].startswith("input")
    assert "no layer is computed yet" in pdb("layers")
    assert "not computed yet" in pdb("loss")
    while "= grad_fn(state, batch, part)" not in pdb("n"):
        pass
    pdb("s")
    while "activations.append(activation)" not in pdb("s"):
        pass  # never in a comprehension, a helper of one line, or TensorFlow
    assert "forward, after conv1" in pdb("where")
    pdb("n")
    pdb("n")
    assert re.search(r"conv1 +32×6×6×16 +\d", pdb("layers"))
    assert "valid = finite" in pdb("c")
    rows = [line.split() for line in pdb("layers").splitlines()[2:-1]]
    assert [row[0] for row in rows] == ["conv1", "pool1", "conv2", "flatten", "dense1", "output"]
    assert rows[0][-4:-3] == ["kernel"] and float(rows[0][2]) > 0
    assert re.search(r"total ([\d.]+) = data \1", pdb("loss"))
    assert "update" in pdb("where").splitlines()[1]
    assert "conv1/kernel   norm" in pdb("p gradients")
    assert "images.png" in pdb("plot images") and (tmp_path / "images.png").is_file()
    assert "NameError" in pdb("show nothing") and "holds no numbers" in pdb("plot state")
    os.write(pdb._master, b"q\n")
    assert "quit after 0 steps, from step 70 on; nothing was written" in pdb.until("written")
    assert pdb.process.wait(timeout=30) == 0


@pytest.mark.quick
def test_what_is_shown_of_a_value(random):
    image = np.zeros([2, 6, 6, 1], np.float32)
    image[1, 2, 3] = 9
    text = debugger.show(tf.constant(image))
    assert repr(text) == str(text)
    assert text.startswith("float32 [2, 6, 6, 1]: 0 to 9, mean 0.125; 98.6 % are 0, norm 9\n")
    assert "image 1, farthest from the mean" in text and "   @" in text
    odd = np.array([np.nan, np.inf, 0.5], np.float32)
    assert "0.5 to 0.5, mean 0.5; 0 % are 0, 1 NaN, 1 infinite" in debugger.show(odd)
    assert debugger.show(np.array([1, 0]), ("cat", "dog")).endswith("dog, cat")
    assert debugger.show(tf.constant(2.5)) == "2.5 (float32)"
    nest = debugger.show({"image": image, "name": "x"})
    assert nest.splitlines()[0].startswith("image  float32 [2, 6, 6, 1]") and "name   'x'" in nest
    assert debugger.show(None) == "None"


def test_gradients_come_through_a_loss_scale_as_in_the_step(digits):
    config = tfloop.Config.make("digits", precision="mixed_float16", fast=False, l2=0.01)
    one = tfloop.make_loop(config)
    plain = tfloop.forward_and_backward(one.state, one.batch(0))
    walked = debugger.forward_and_backward(one.state, one.batch(0))
    for name, gradient in plain.gradients.items():
        scale = max(float(tf.reduce_max(tf.abs(gradient))), 1e-3)
        np.testing.assert_allclose(walked.gradients[name] / scale, gradient / scale, atol=2e-2)


@pytest.mark.quick
def test_helpers_and_comprehensions_are_stepped_over():
    inner = [code for code in debugger.record.__code__.co_consts if hasattr(code, "co_name")]
    assert all(not debugger._is_to_be_seen(code) for code in inner)
    assert not debugger._is_to_be_seen(debugger._as_float32.__code__)
    assert debugger._is_to_be_seen(debugger.record.__code__)
    assert debugger._is_to_be_seen((lambda: None).__code__) is False


@pytest.mark.quick
def test_it_stops_once_at_a_step_and_then_goes_on(tmp_path):
    pdb = Terminal("--preset=digits", "--break_at=3", "--epochs=1", "--batch_size=400")
    pdb.until("(tfloop) ")
    assert "numpy=3" in pdb("p state.global_step")
    assert "valid = finite" in pdb("c")
    os.write(pdb._master, b"c\n")
    assert "done after 4 steps" in pdb.until("written")
    assert pdb.process.wait(timeout=30) == 0


def test_quitting_after_some_steps_is_quitting():
    pdb = Terminal("--preset=digits", "--epochs=1", "--batch_size=400")
    pdb.until("(tfloop) ")
    for _ in range(3):
        pdb("c")
    os.write(pdb._master, b"q\n")
    assert "quit after 1 steps" in pdb.until("written")
    assert pdb.process.wait(timeout=30) == 0


def test_a_step_that_is_never_reached_is_told():
    pdb = Terminal("--preset=digits", "--break_at=99", "--epochs=1", "--batch_size=400")
    assert "step 99 was not reached: the run has 4 steps" in pdb.until("written")
    assert pdb.process.wait(timeout=30) == 0


def test_it_stops_where_a_condition_holds():
    pdb = Terminal(
        "--preset=digits",
        "--break_if=state.global_step == 2 # the third",
        "--epochs=1",
        "--batch_size=400",
    )
    pdb.until("(tfloop) ")
    assert "numpy=2" in pdb("p state.global_step")
    os.write(pdb._master, b"q\n")
    assert pdb.process.wait(timeout=30) == 0


def test_it_stops_before_an_update_that_is_not_finite():
    pdb = Terminal("--preset=digits", "--break_on_nan", "--learning_rate=1e20")
    pdb.until("(tfloop) ")
    assert "numpy=False" in pdb("p finite")
    assert "inf" in pdb("p updates.norm")
    os.write(pdb._master, b"q\n")
    assert pdb.process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    "condition, message",
    [
        (
            "gradient.norm > 3",
            "NameError: name 'gradient' is not defined; the names are state, batch, inputs",
        ),
        ("gradients['conv9/kernel'] > 3", "there are conv1/kernel, conv1/bias"),
        ("outputs", "ValueError|TypeError"),
    ],
)
def test_a_condition_is_tried_before_training(loop, condition, message):
    one = loop(eager=True)
    before = one.state.digest()
    with pytest.raises(UserError, match=message):
        debugger.check_condition(condition, one)
    assert one.state.digest() == before


def test_installed_sources_are_not_stepped_into():
    assert debugger._is_readable(debugger.__file__) and debugger._is_readable(__file__)
    assert not debugger._is_readable(tf.__file__) and not debugger._is_readable(os.__file__)
    assert not debugger._is_readable("<frozen importlib._bootstrap>")


@pytest.mark.quick
def test_in_an_editors_debugger_it_stops_at_the_first_step_alone(loop, monkeypatch):
    stops = []
    monkeypatch.setattr("sys.breakpointhook", lambda: stops.append(True))
    one = loop(eager=True, steps_per_call=1)
    grad_fn = debugger.stop_once(debugger.forward_and_backward)
    for _ in range(3):
        grad_fn(one.state, one.batch(0))
    assert stops == [True] and not debugger.is_under_another_debugger()
