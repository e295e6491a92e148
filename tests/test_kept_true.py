"""What a run gives is what was trained: in exports, on other data, by other names, half made."""

import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfloop
from tfloop.assembly import make_state
from tfloop.cli import main
from tfloop.config import PRESETS, Config
from tfloop.data.dataset import with_classes_of
from tfloop.data.spec import of_data
from tfloop.errors import UserError
from tfloop.training import folders, saved_run
from tfloop.training.export import export, plain_model

SMALL = ["--conv=2", "--pool=", "--dense=4", "--batch_size=20", "--epochs=1", "--quiet"]


@pytest.fixture(scope="module")
def mnist():
    return tfloop.load("mnist")


@pytest.mark.parametrize("preset", PRESETS)
def test_an_export_gives_what_predict_gives(mnist, digits, preset):
    config = Config.make(preset)
    data = digits if config.dataset == "digits" else mnist
    state = make_state(config, of_data(data), 100, data.standardizer)
    images = data.test.inputs[:16]
    exported = plain_model(state).predict(images.astype(np.float32), verbose=0)
    np.testing.assert_allclose(exported, tfloop.predict(state, images), atol=1e-5)


def test_layers_that_augment_operators_and_models_in_models_are_exported_as_they_predict(
    digits, tmp_path
):
    """A layer that augments would do so in a saved model, unless it is told not to."""
    keras.utils.set_random_seed(0)
    outer = keras.Input((8, 8, 1))
    inner = keras.Sequential([layers.Flatten(), layers.Dense(8, "relu")], name="inner")
    x = inner(layers.RandomRotation(0.5)(outer)) * 0.5
    state = tfloop.TrainState(keras.Model(outer, layers.Dense(10)(x)))
    tfloop.Loop(state, digits)
    images = digits.test.inputs[:16].astype(np.float32)
    expected = tfloop.predict(state, images)
    export(state, "saved_model", tmp_path / "model")
    served = tf.saved_model.load(tmp_path / "model").signatures["serving_default"]
    np.testing.assert_allclose(served(tf.constant(images))["output_0"], expected, atol=1e-5)
    mixed = keras.Sequential([keras.Input((8, 8, 1)), inner, layers.Dense(10)])
    for layer in inner.layers:
        layer.dtype_policy = "mixed_float16"
    plain = plain_model(tfloop.TrainState(mixed))
    assert {each.compute_dtype for each in plain._flatten_layers()} == {"float32"}


def test_a_scale_that_keras_does_not_divide_by_is_not_exported(random):
    inputs = random.normal(size=(40, 4)).astype(np.float32) * 1e-9
    data = tfloop.from_arrays(inputs, np.arange(40) % 2, test_size=4)
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
    state = tfloop.TrainState(model, standardizer=data.standardizer)
    with pytest.raises(UserError, match=r"deviations from \d\S*e-\d+ to .* does not divide by"):
        plain_model(state)


def arrays(path, rows=60, seed=0, tested=9):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (rows, 8, 8), dtype=np.uint8)
    labels = np.arange(rows) % 3
    np.savez(path, x_train=images, y_train=labels, x_test=images[:tested], y_test=labels[:tested])
    return f"--dataset={path}"


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(rows=40, seed=1), "does not hold what the run was trained on"),
        (dict(tested=8), "holds other test examples than the run had"),
    ],
)
def test_a_run_is_not_resumed_on_other_data(tmp_path, capsys, other, message):
    dataset, logdir = arrays(tmp_path / "d.npz"), f"--logdir={tmp_path}/r"
    assert main(["train", dataset, logdir, *SMALL]) == 0
    run = tmp_path / "r/article2-001"
    arrays(tmp_path / "d.npz", **other)
    assert main(["evaluate", str(run)]) == 0
    assert message in capsys.readouterr().err
    assert main(["train", f"--resume={run}", "--epochs=2", "--quiet"]) == 2
    assert message in capsys.readouterr().err
    assert main(["train", f"--resume={run}", "--epochs=2", "--quiet", "--override"]) == 0


def test_classes_of_other_names_are_other_data():
    images, labels = np.zeros((4, 8, 8), np.uint8), [0, 1, 0, 1]
    one, other = (
        tfloop.from_arrays(images, labels, images, labels, class_names=names)
        for names in ("ab", "ba")
    )
    manifest = {"data": of_data(one).to_json()}
    assert saved_run.difference_of_data(manifest, one) == ""
    found = saved_run.difference_of_data(manifest, other)
    assert found == "names the classes b, a, the run had a, b"


def test_classes_of_one_name_are_matched_by_number_and_shares_by_name():
    x, shares = np.zeros((4, 3)), np.eye(2)[[0, 1, 1, 0]]
    twice = tfloop.from_arrays(x, [0, 1, 1, 0], x, [0, 1, 1, 0], class_names=["crane", "crane"])
    assert with_classes_of(twice, twice.kinds, "x").test.targets.tolist() == [0, 1, 1, 0]
    one = tfloop.from_arrays(x, shares, x, shares, class_names=["a", "b"])
    other = tfloop.from_arrays(x, shares[:, ::-1], x, shares[:, ::-1], class_names=["b", "a"])
    np.testing.assert_array_equal(with_classes_of(other, one.kinds, "x").test.targets, shares)
    with pytest.raises(UserError, match="x: has the class 'c', which the run was not trained on"):
        unknown = tfloop.from_arrays(x, shares, x, shares, class_names=["a", "c"])
        with_classes_of(unknown, one.kinds, "x")


def test_an_input_that_would_cut_fractions_off_is_refused(random):
    inputs = keras.Input((4,), dtype="int32")
    model = keras.Model(inputs, layers.Dense(2)(layers.Rescaling(0.5)(inputs)))
    x, y = random.normal(size=(20, 4)), np.arange(20) % 2
    with pytest.raises(UserError, match="takes int32, and is given fractions"):
        tfloop.Loop(tfloop.TrainState(model), tfloop.from_arrays(x, y), batch_size=5)
    whole = tfloop.from_arrays(np.round(9 * x), y, standardize=False)
    tfloop.Loop(tfloop.TrainState(model), whole, batch_size=5)


def test_a_trial_of_a_search_which_sees_no_test_is_of_the_data_with_one(digits):
    manifest = {"held_out_fingerprints": digits.without_test().held_out_fingerprints}
    assert (
        saved_run.difference_of_data(manifest | {"data": of_data(digits).to_json()}, digits) == ""
    )


def test_from_another_folder_a_run_is_evaluated_on_its_own_data(tmp_path, monkeypatch, capsys):
    """Also where a file of the same name lies there."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    arrays("d.npz")
    assert main(["train", "--dataset=d.npz", "--logdir=r", *SMALL]) == 0
    capsys.readouterr()
    assert main(["evaluate", "r/article2-001"]) == 0
    expected = capsys.readouterr().out.partition(": loss")[2]
    monkeypatch.chdir(tmp_path / "b")
    arrays("d.npz", seed=1)
    assert main(["evaluate", "../a/r/article2-001"]) == 0
    assert capsys.readouterr().out.partition(": loss")[2] == expected


@pytest.mark.parametrize("name", ["[1] *a?", "back\\slash {x}"])
def test_a_name_is_no_pattern(tmp_path, name):
    flags = [arrays(tmp_path / "d.npz"), f"--logdir={tmp_path / name}", f"--name={name}"]
    assert main(["train", *flags, *SMALL]) == 0
    assert main(["train", *flags, *SMALL, "--epochs=2", "--resume=auto"]) == 0
    run = tmp_path / name / f"{name}-001"
    assert folders.result(run)["steps"] in (3, 6)
    assert main(["evaluate", str(run)]) == 0
    assert main(["train", f"--resume={run}", "--epochs=3", "--quiet"]) == 0
    assert folders.result(run)["steps"] == 9


def test_classes_are_matched_by_name(tmp_path, capsys):
    shades = {"cat": 20, "dog": 120, "frog": 220}
    from PIL import Image

    for root, names in (("all", ("cat", "dog", "frog")), ("two", ("cat", "frog")), ("new", "ab")):
        for name in names:
            (tmp_path / root / name).mkdir(parents=True)
            for number in range(10):
                pixels = np.full((8, 8), shades.get(name, 0) + number, np.uint8)
                Image.fromarray(pixels).save(tmp_path / root / name / f"{number}.png")
        assert main(["pack", str(tmp_path / root), str(tmp_path / f"{root}.s")]) == 0
    flags = [
        f"--dataset={tmp_path}/all.s",
        f"--logdir={tmp_path}/r",
        *SMALL,
        "--conv=2",
        "--dense=4",
        "--epochs=1",
    ]
    assert main(["train", *flags, "--batch_size=9"]) == 0
    run = str(tmp_path / "r/article2-001")
    capsys.readouterr()
    assert main(["evaluate", run, f"--dataset={tmp_path}/two.s"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    images = {row[0]: row[-1] for row in rows if row and row[0] in shades}
    assert images == {"cat": "1", "dog": "0", "frog": "1"}
    assert main(["evaluate", run, f"--dataset={tmp_path}/new.s"]) == 2
    error = capsys.readouterr().err
    assert "has the class 'a', which the run was not trained on" in error and "frog" in error


def test_an_import_that_is_killed_leaves_no_run(tmp_path, monkeypatch):
    config = Config.make("digits", conv=(2,), dense=(4,), logdir=str(tmp_path / "r"), quiet=True)
    loop = tfloop.make_loop(config)
    loop.state.model.save_weights(tmp_path / "x.weights.h5")
    from tfloop.training import session

    def killed(self, events):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session.Run, "save", killed)
        session.adopt(config, tmp_path / "x.weights.h5")
    assert os.listdir(tmp_path / "r") == []
    litter = tmp_path / "r" / f"{folders.PARTIAL}x"  # as of a process that SIGKILL ended
    litter.mkdir()
    (litter / "config.json").write_text(config.to_json())
    os.utime(litter, (1, 1))
    assert folders.newest_unfinished(config) == ([], 1)
    run = session.adopt(config, tmp_path / "x.weights.h5")
    assert os.listdir(tmp_path / "r") == ["digits-001"] and run.name == "digits-001"


def test_a_second_run_into_one_folder_is_refused(tmp_path, loop):
    with tfloop.Summaries(tmp_path / "r", loop()):
        pass
    with pytest.raises(UserError, match="holds event files already"):
        tfloop.Summaries(tmp_path / "r", loop())
    with tfloop.Summaries(tmp_path / "r", loop(), resumed=True):
        pass


@pytest.mark.parametrize(
    "content",
    [
        {"steps": "many"},
        {"steps": True},
        {"epochs": 3},
        {"epochs": [{"epoch": 1}]},
        {"final": []},
        {"hyper": 4},
        {"rewound_to": ["x"]},
        {"ms_per_step": "3"},
    ],
)
def test_a_result_that_no_run_writes_is_named(tmp_path, content):
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"result\.json: is damaged: {next(iter(content))} is"):
        folders.result(tmp_path)


def test_a_run_finds_its_data_from_any_folder_and_says_where_they_are_scaled_otherwise(
    tmp_path, monkeypatch, capsys
):
    """Trained on floats from 0 to 1; pictures are scaled to that, numbers to 255 are noticed."""
    from PIL import Image

    chance = np.random.default_rng(0)
    x, y = chance.random((40, 8, 8, 1), dtype=np.float32), np.arange(40) % 4
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    np.savez("d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    flags = ["--conv=2", "--kernel=1", "--pool=", "--dense=4", "--batch_size=8", "--epochs=1"]
    assert main(["train", "--dataset=d.npz", *flags, "--quiet", "--summaries=none"]) == 0
    run = str(tmp_path / "here" / "runs" / "article2-001")
    monkeypatch.chdir(tmp_path / "there")
    assert main(["evaluate", run]) == 0
    assert main(["train", f"--resume={run}", "--epochs=2", "--quiet"]) == 0
    capsys.readouterr()
    np.savez("large.npz", x=255 * x)
    assert main(["predict", run, "large.npz"]) == 0
    assert "are they scaled otherwise?" in capsys.readouterr().err
    pixels = chance.integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    np.savez("a.npz", x=pixels[None, ..., None].astype(np.float32) / 255)
    given = {}
    for name in ("a.png", "a.npz"):
        assert main(["predict", run, name]) == 0
        captured = capsys.readouterr()
        given[name] = captured.out.splitlines()[1].split(",")[1:]
        assert ("pixels are scaled to 0 to 1" in captured.err) == (name == "a.png")
    assert given["a.png"] == given["a.npz"]
