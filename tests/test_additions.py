"""What a user adds: one registration in one place, and the rest of the program knows it."""

import re
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfloop
from tfloop import commands, models
from tfloop.cli import main
from tfloop.commands.command import Command
from tfloop.data import sources
from tfloop.data.arrays import from_arrays
from tfloop.inspection.dashboards import scalars
from tfloop.inspection.event_files import read_scalars
from tfloop.inspection.moments import summary
from tfloop.models import layer_rules
from tfloop.optimizers import OPTIMIZERS, f32, keeps
from tfloop.schedules import SCHEDULES
from tfloop.search import sweeps
from tfloop.training import folders
from tfloop.vectors import Vector

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("registries")]
SMALL = ["--preset=digits", "--conv=4", "--pool=2", "--dense=8", "--batch_size=200", "--quiet"]


def test_an_optimizer(tmp_path, capsys):
    @OPTIMIZERS.register
    @keeps("velocity")
    def heavy_ball(gradient, weights, slots, count, rate, *, momentum=0.9):
        velocity = f32(momentum) * slots["velocity"] + gradient
        return -rate * velocity, {"velocity": velocity}

    flags = ["--optimizer=heavy_ball", "--momentum=0.5", "--epochs=2", f"--logdir={tmp_path}"]
    assert main(["train", *SMALL, *flags]) == 0
    _, state, _ = tfloop.open_run(tmp_path / "digits-001")
    assert float(tf.norm(state.optimizer.slots["velocity"])) > 0
    assert float(state.hyper["momentum"]) == 0.5

    weights = {"w": tf.Variable([1.0, 2.0])}
    optimizer = tfloop.Optimizer("heavy_ball", momentum=0.5)
    optimizer.build(weights)
    for _ in range(2):
        gradient = Vector.of({"w": tf.constant([1.0, -1.0])})
        updates, slots = optimizer.updates(gradient, weights, tf.constant(0.1))
        optimizer.apply(updates, slots, weights, tf.constant(True))
    # v: 1, 1.5; w: 1 - 0.1 - 0.15.
    np.testing.assert_allclose(weights["w"], [0.75, 2.25], rtol=1e-6)

    assert main(["train", "--optimizer=heavy_ball", "--rho=0.9"]) == 2
    assert "'heavy_ball' has no rho; it has momentum" in capsys.readouterr().err
    main(["train", "--help"])
    assert re.search("--momentum= +sgd, rmsprop, heavy_ball: ", capsys.readouterr().out)


def test_a_schedule(tmp_path, capsys):
    @SCHEDULES.register
    def square_root(step, *, learning_rate, decay_steps):
        return learning_rate / tf.sqrt(1.0 + tf.cast(step, tf.float32) / decay_steps)

    schedule = tfloop.Schedule("square_root", learning_rate=0.1, decay_steps=4)
    assert float(schedule(tf.constant(12))) == pytest.approx(0.05)

    flags = ["--schedule=square_root", f"--logdir={tmp_path}"]
    assert main(["train", *SMALL, *flags, "--epochs=2"]) == 0
    rates = [s.value for s in read_scalars(tmp_path / "digits-001") if s.tag == "learning_rate"]
    # Its length is that of the run: the last of 16 steps is made at step 15.
    assert rates[-1] == pytest.approx(0.001 / np.sqrt(1 + 15 / 16), rel=1e-6)

    # So a resumed run cannot be longer without a word.
    given = {"epochs": "9"}
    with pytest.raises(tfloop.UserError, match="epochs is 2 in this run, not 9"):
        folders.resumed(tmp_path / "digits-001", tfloop.Config.make(), given, override=False)

    base = tfloop.Config.make("digits")
    shapes = {sweeps.structure(base.replace(schedule=s)) for s in ("square_root", "constant")}
    assert len(shapes) == 2  # a search knows that it is another graph


class Double(keras.layers.Layer):
    rows: list = []  # noqa: RUF012 (one list for all)

    def call(self, x):
        self.rows.append(x.shape[0])
        return 2.0 * x


def test_a_layer_kind(random):
    model = keras.Sequential([keras.layers.Flatten(), Double(), keras.layers.Dense(10)])
    images = tf.constant(random.normal(size=(7, 8, 8, 1)).astype(np.float32))
    expected = model(images)

    def rows():
        Double.rows.clear()
        outputs = models.outputs(model, images, training=True, fast=True, shards=2)
        np.testing.assert_allclose(outputs, expected, atol=1e-6)
        return Double.rows

    assert rows() == [7]  # a layer of which nothing is known sees the whole batch
    layer_rules.register(Double, layer_rules.LayerRule(by_example="always"))
    assert rows() == [4, 3]  # now each shard goes through on its own


def test_a_summary(tmp_path):
    @summary("epoch", run="test", levels=("scalars",))
    def accuracy_squared(context):
        yield scalars({"accuracy/squared": context.epoch.test.accuracy**2})

    flags = ["--epochs=2", "--summaries=scalars", f"--logdir={tmp_path}"]
    assert main(["train", *SMALL, *flags]) == 0
    found = {}
    for scalar in read_scalars(tmp_path / "digits-001"):
        if scalar.run == "test":
            found.setdefault(scalar.tag, []).append(scalar.value)
    assert len(found["accuracy/squared"]) == 2
    np.testing.assert_allclose(found["accuracy/squared"], np.square(found["accuracy"]), rtol=1e-6)


def test_a_data_format(tmp_path, capsys):
    (tmp_path / "my.stripes").mkdir()  # a folder, which would pass for one of IDX files

    def read(dataset, cut):
        labels = np.arange(300) % 3
        images = np.full((300, 6, 6), 80, np.uint8) * labels[:, None, None].astype(np.uint8)
        return from_arrays(
            images[:200], labels[:200], images[200:], labels[200:], name=dataset, seed=cut.seed
        )

    sources.register(sources.Source("stripes", lambda name: name.endswith(".stripes"), read))
    flags = ["--conv=2", "--pool=", "--dense=8", "--batch_size=20", "--epochs=9"]
    assert (
        main(
            [
                "train",
                f"--dataset={tmp_path}/my.stripes",
                *flags,
                f"--logdir={tmp_path}",
                "--name=a",
            ]
        )
        == 0
    )
    assert "200 training and 100 test images of 6×6×1, 3 classes" in capsys.readouterr().out
    assert tfloop.load(f"{tmp_path}/my.stripes").classes == 3
    with pytest.raises(tfloop.UserError, match="name stripes, mnist"):
        tfloop.load("nothing")


def test_a_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "greet.py").write_text(
        textwrap.dedent(
            """
            from tfloop.commands.command import Command

            def greet(config, options, arguments):
                print(f"{options['greeting']}, batch size {config.batch_size}, {arguments}")
                return 0

            COMMAND = Command(
                greet,
                "say what the batch size is",
                topic="look",
                arguments="NAME…",
                settings=("preset", "batch_size"),
                options={"greeting": ("hello", "what to say")},
            )
            """
        )
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    found = commands.find()
    assert next(iter(found)) == "train" and isinstance(found["greet"], Command)
    monkeypatch.setitem(commands.COMMANDS, "greet", found["greet"])
    assert main(["greet", "--batch_size=7", "--greeting=hi", "you"]) == 0
    assert capsys.readouterr().out == "hi, batch size 7, ['you']\n"
    main(["--help"])
    assert "say what the batch size is" in capsys.readouterr().out
    assert main(["greet", "--epochs=3"]) == 2
    assert "epochs" in capsys.readouterr().err
