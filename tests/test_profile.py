"""Where the time of a step goes: what is counted, how it is told apart, and the verdict."""

import json
import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfloop
from tfloop.cli import main
from tfloop.inspection import step_profile
from tfloop.inspection.event_files import read_scalars
from tfloop.inspection.step_profile import Event, layers_of, place_of, summed_up
from tfloop.machine import arithmetic, usage


def loop_of(model, data, batch_size=32, **settings):
    return tfloop.Loop(
        tfloop.TrainState(model, "sgd", 0.01), data, batch_size=batch_size, **settings
    )


def data_of(random, shape, rows=640):
    x = random.normal(size=(rows, *shape)).astype(np.float32)
    return tfloop.from_arrays(x, random.integers(0, 10, rows), x[:10], np.arange(10))


def test_the_multiplications_of_a_step_are_those_of_a_hand_made_count(random):
    model = keras.Sequential(
        [
            keras.Input((9, 9, 3)),
            layers.Conv2D(4, 3),
            layers.DepthwiseConv2D(2, use_bias=False),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    loop = loop_of(model, data_of(random, (9, 9, 3)), shards=1)
    loop.warm_up()
    conv, depthwise, dense = 7 * 7 * 9 * 3 * 4, 6 * 6 * 4 * 4, 6 * 6 * 4 * 10
    # Forward, for the kernel, and for the input, which the first layer needs no gradient of.
    assert arithmetic.flop_per_step(loop) == 2 * 32 * (2 * conv + 3 * depthwise + 3 * dense)


@pytest.mark.quick
def test_a_layer_is_known_by_its_scope_on_both_ways():
    names = ("conv1", "norm", "update", "loss", "in/input")
    layers = {name: name for name in names}
    for path, place in {
        "while/body/_1/forward/conv1/conv1_1/convolution": ("conv1", "forward"),
        "while/body/_1/gradient_tape/forward/conv1/conv1_1/Conv2DBackpropFilter": (
            "conv1",
            "backward",
        ),
        "while/body/_1/gradient_tape/forward/norm/sub": ("norm", "backward"),
        "while/body/_1/forward/update/MatMul": ("update", "forward"),
        "while/body/_1/forward/loss_1/MatMul": ("loss", "forward"),
        "while/body/_1/forward/in/input/Cast": ("in/input", "forward"),
        "while/body/_1/forward/AddN": ("other", "forward"),
        "while/body/_1/update/sgd/mul": ("update", "update"),
        "while/body/_1/loss/penalties/cond/Abs": ("update", "update"),
        "while/body/_1/input/GatherV2": ("input", "forward"),
        "while/body/_1/loss/Softmax": ("loss", "forward"),
        "while/body/_1/gradient_tape/loss/Tile": ("loss", "backward"),
        "while/body/_1/AddN": ("other", "forward"),
    }.items():
        assert place_of(path, layers) == place, path


def test_times_are_summed_up_by_layer_and_step(random):
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(10)])
    loop = loop_of(model, data_of(random, (8, 8, 1)))
    dense = model.layers[-1].name
    events = [
        Event(f"while/body/_1/forward/{dense}/MatMul", "MatMul", 3.0),
        Event(f"while/body/_1/gradient_tape/forward/{dense}/MatMul_1", "_MklMatMul", 5.0),
        Event("while/body/_1/update/sgd/Sub", "Sub", 1.0),
        Event("while", "While", 99.0),
    ]
    found = summed_up(loop, events, 2, (6.0, 0.5, 0.1), "CPU")
    rows = {row.layer: row for row in found.rows}
    assert rows[dense][1:4] == (1.5, 2.5, 0.0) and rows["update"].update == 0.5
    assert (found.busy, found.products, found.operations) == (4.5, 4.0, 1.5)
    assert "all" in "".join(step_profile.lines(found, "CPU"))


class Made(types.SimpleNamespace):
    """A Profile with numbers of its own choice."""

    @staticmethod
    def of(**numbers):
        usual = dict(
            rows=(), step=10.0, waiting=0.1, between=0.1, busy=18.0, lanes=2, products=15.0,
            preparing=0.0, operations=60.0, recorded=1.0, flop=1e9, peak=2e11, pipeline="prefetch",
            steps_per_call=50, batch_size=64, steps=900, device="CPU",
        )  # fmt: skip
        return step_profile.Profile(**{**usual, **numbers})


SHORT = dict(step=0.2, waiting=0.0, busy=0.1)


@pytest.mark.quick
@pytest.mark.parametrize(
    "numbers, verdict",
    [
        ({}, "compute-bound at 50 % of the floor; --device=gpu"),
        (dict(waiting=4.1), "input-bound: 41 % waiting; --cache=FOLDER"),
        (dict(waiting=4.1, pipeline="resident"), "input-bound: 41 % waiting; rows are gathered"),
        (dict(waiting=1.7, preparing=5.0), "input-bound: 17 % waiting, and batches are pre"),
        (dict(SHORT, between=0.1), "overhead-bound: steps of 0.2 ms; --steps_per_call=500"),
        (
            dict(step=1.2, waiting=0.0, between=0.0, busy=2.3, products=2.0, flop=4e7),
            "overhead-bound: steps of 1.2 ms; a larger --batch_size",
        ),
        (dict(SHORT, between=0.0), "overhead-bound: steps of 0.2 ms; a larger --batch_size"),
        (dict(products=6.0), "memory-bound: 67 % of the time is in operations that move numbers"),
    ],
)  # fmt: skip
def test_the_verdict_names_what_a_step_waits_for_and_the_flag(numbers, verdict):
    assert Made.of(**numbers).verdict.startswith(verdict)


def test_a_slow_input_a_tiny_model_and_a_large_matmul_are_told_apart(random):
    def slow():
        for row in range(600):
            time.sleep(0.002)
            yield np.full([4], row, np.float32), row % 10

    signature = (tf.TensorSpec([4]), tf.TensorSpec([], tf.int64))
    stream = tf.data.Dataset.from_generator(slow, output_signature=signature).batch(20)
    data = tfloop.from_dataset(stream, stream.take(1))
    tiny = keras.Sequential([keras.Input((4,)), layers.Dense(10)])
    found = step_profile.profile(loop_of(tiny, data, batch_size=20, steps_per_call=5), 0.3)
    assert found.verdict.startswith("input-bound: ") and found.waiting > 0.8 * found.step
    assert ".cache() or .prefetch()" in found.verdict

    tiny = keras.Sequential([keras.Input((4,)), layers.Dense(10)])
    found = step_profile.profile(loop_of(tiny, data_of(random, (4,))), 0.3)
    assert found.verdict.startswith("overhead-bound: steps of 0.")

    width = 1500
    large = keras.Sequential(
        [keras.Input((width,)), layers.Dense(width, activation="relu"), layers.Dense(10)]
    )
    data = data_of(random, (width,), rows=4096)
    found = step_profile.profile(loop_of(large, data, batch_size=1024), 0.3)
    assert found.verdict.startswith("compute-bound at "), found.verdict
    rows = {row.layer: row for row in found.rows}
    assert rows[large.layers[0].name].milliseconds > 0.4 * found.busy


def test_every_layer_of_a_functional_model_has_its_time_and_the_rest_is_small(random):
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(16, 3, name="first")(inputs)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    x = layers.GlobalAveragePooling2D(name="mean")(layers.Conv2D(32, 3, name="second")(x))
    model = keras.Model(inputs, layers.Dense(10, name="last")(x))
    found = step_profile.profile(loop_of(model, data_of(random, (16, 16, 3)), shards=2), 0.3)
    rows = {row.layer: row for row in found.rows}
    for name in ("first", "norm", "second"):
        assert rows[name].forward > 0 and rows[name].backward > 0, name
    assert "other" not in rows or rows["other"].milliseconds < 0.1 * found.busy
    assert rows["second"].flop > rows["first"].flop > 0 and rows["norm"].flop < rows["first"].flop


def test_the_command_prints_the_table_of_flags_and_of_a_run(tmp_path, capsys):
    small = ["--preset=digits", "--conv=4", "--dense=8", "--batch_size=100"]
    train = [*small, "--epochs=1", f"--logdir={tmp_path}"]
    assert main(["train", *train]) == 0
    told = capsys.readouterr().out
    assert " GFLOP at " in told and " % of matmul's speed), " in told
    tags = {s.tag: s.value for s in read_scalars(tmp_path / "digits-001")}
    assert tags["speed/gflop_per_step"] > 0 and 0 < tags["speed/of_floor"] < 1.5
    for command in (["profile", str(tmp_path / "digits-001")], ["profile", *small]):
        picture, figures = tmp_path / "profile.png", tmp_path / "profile.json"
        assert main([*command, f"--plot={picture}", f"--json={figures}"]) == 0
        told = capsys.readouterr().out
        assert "conv1 " in told and "update" in told and "bound" in told.splitlines()[-3]
        found = json.loads(figures.read_text())
        assert found["verdict"] == told.splitlines()[-3] and found["rows"][0]["layer"] == "conv1"
        assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.quick
def test_bad_input_of_profile_is_one_line(tmp_path, capsys):
    assert main(["profile", "a", "b"]) == 2
    assert "expected one RUN or none; found 2 arguments" in capsys.readouterr().err
    assert main(["profile", "--jit_compile", "--device=cpu"]) == 2
    assert "does not see inside XLA's program" in capsys.readouterr().err
    assert main(["profile", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.quick
def test_the_speed_of_the_machine_is_kept_and_the_best_counts(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    found = iter([2e11, 1e11, 3e11])
    monkeypatch.setattr(arithmetic, "_measure", lambda: next(found))
    assert arithmetic.peak() == 2e11 and arithmetic.peak() == 2e11  # not measured again
    assert arithmetic.peak(again=True) == 2e11 and arithmetic.peak(again=True) == 3e11
    (tmp_path / "tfloop" / "peak.json").write_text("[]")
    found = iter([1e11])
    assert arithmetic.peak() == 1e11


@pytest.mark.quick
def test_the_use_of_each_core_is_a_share_of_the_time_since_the_last_look(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    monkeypatch.setattr(usage.os, "sched_getaffinity", lambda _: {0, 1})

    def write(*idle):
        lines = [f"cpu{i} {100 - x} 0 0 {x} 0 0 0 0" for i, x in enumerate(idle)]
        stat.write_text("\n".join(["cpu  1 2 3 4", *lines, "intr 5"]))

    stat.write_text("cpu0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0")
    watch = usage.Usage(stat)
    write(25, 100, 50)
    assert watch.scalars() == {"machine/core_0": 75.0, "machine/core_1": 0.0}
    assert watch.scalars()["machine/core_0"] == 75.0  # where no tick of the clock came between
    assert usage.Usage(tmp_path / "none").scalars() == {}


@pytest.mark.quick
def test_what_nvidias_library_tells_of_a_gpu_becomes_scalars(tmp_path, monkeypatch):
    class NVMLError(Exception):
        pass

    def power(gpu):
        raise NVMLError

    nvml = types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetUtilizationRates=lambda gpu: types.SimpleNamespace(gpu=83),
        nvmlDeviceGetMemoryInfo=lambda gpu: types.SimpleNamespace(used=2**30),
        nvmlDeviceGetTemperature=lambda gpu, kind: 61,
        nvmlDeviceGetPowerUsage=power,
    )
    monkeypatch.setattr(usage, "_nvml", lambda: (nvml, "gpu 0"))
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["GPU:0"])
    found = usage.Usage(tmp_path / "none").scalars()
    expected = {"utilisation_percent": 83.0, "memory_mib": 1024.0, "temperature_c": 61.0}
    assert found == {f"machine/gpu_{tag}": value for tag, value in expected.items()}


def test_a_model_that_shows_no_graph_is_told_apart_by_its_keras_layers(random):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.body, self.head = layers.Dense(64, name="body"), layers.Dense(10, name="head")

        def call(self, x):
            return self.head(tf.nn.relu(self.body(x)))

    model = Own()
    model(tf.zeros([1, 300]))
    assert {"body", "head"} <= set(layers_of(model))
    found = step_profile.profile(loop_of(model, data_of(random, (300,))), 0.2)
    rows = {row.layer: row for row in found.rows}
    assert rows["body"].backward > 0 and rows["body"].flop > rows["head"].flop


@pytest.mark.quick
def test_where_the_profiler_saw_a_part_speeds_are_left_out():
    row = step_profile.Row("lstm", 0.1, 0.0, 0.0, 1e8)
    whole, part = (
        "\n".join(step_profile.lines(Made.of(rows=(row,), recorded=share), "CPU"))
        for share in (0.95, 0.3)
    )
    assert " 1,000 " in whole and "none of these operations runs" in whole
    assert " 1,000 " not in part and "recorded 30 % of the step's products" in part


@pytest.mark.quick
def test_a_gpu_is_known_by_its_place_among_all():
    for shown, number, place in [("", 1, "1"), ("2,3", 1, "3"), ("GPU-ab, GPU-cd", 0, "GPU-ab")]:
        assert usage._place(shown, number) == place
