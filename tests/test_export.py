"""Exported models: loaded by Keras and TensorFlow alone, where there is no tfloop, they predict the
same. And back."""

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import keras
import numpy as np
import pytest

import tfloop
from tfloop.cli import main
from tfloop.errors import UserError
from tfloop.training import export, predictions

LOAD = {
    "keras": "import keras; p = keras.saving.load_model(path).predict(x, verbose=0)",
    "saved_model": "import tensorflow as tf; m = tf.saved_model.load(path); p = "
    "m.serve(tf.constant(x)).numpy()",
    "tflite": """
import tensorflow as tf
i = tf.lite.Interpreter(path)
i.resize_tensor_input(i.get_input_details()[0]["index"], x.shape)
i.allocate_tensors()
i.set_tensor(i.get_input_details()[0]["index"], x)
i.invoke()
p = i.get_tensor(i.get_output_details()[0]["index"])""",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run with batch normalisation, some test images, their probabilities as `predict`
    has them)."""
    folder = tmp_path_factory.mktemp("runs")
    main(
        [
            "train",
            "--preset=digits",
            "--epochs=2",
            "--batch_norm",
            "--dropout=0.2",
            f"--logdir={folder}",
            "--quiet",
            "--summaries=none",
        ]
    )
    from tfloop.training import saved_run

    _, state, _ = saved_run.open_run(folder / "digits-001")
    images = tfloop.load("digits").test.inputs[:50]
    return folder / "digits-001", images, predictions.predict(state, images)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """The Python of a virtual environment with all that is installed here, but for tfloop."""
    folder = tmp_path_factory.mktemp("stranger")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "tfloop" not in path.name and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


@pytest.mark.parametrize("format", LOAD)
def test_it_predicts_the_same_where_there_is_no_tfloop(run, tmp_path, stranger, format):
    folder, images, expected = run
    path = tmp_path / f"model{export.FORMATS[format]}"
    assert main(["export", str(folder), f"--format={format}", f"--out={path}"]) == 0
    np.save(tmp_path / "x.npy", images.astype(np.float32))
    program = (
        f"import importlib.util, json; import numpy as np; assert not "
        f"importlib.util.find_spec('tfloop')\n"
        f"path = {str(path)!r}; x = "
        f"np.load({str(tmp_path / 'x.npy')!r})\n{LOAD[format]}\nprint(json.dumps(p.tolist()))"
    )
    done = subprocess.run(
        [stranger, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), expected, atol=1e-5)


@pytest.mark.quick
def test_weights_fit_a_stock_keras_model_of_the_same_layers(run, tmp_path):
    from tfloop.training import saved_run

    folder, _, _ = run
    assert main(["export", str(folder), "--format=weights", f"--out={tmp_path}/m.weights.h5"]) == 0
    _, state, _ = saved_run.open_run(folder)
    stock = keras.Sequential.from_config(state.model.get_config())
    stock.load_weights(tmp_path / "m.weights.h5")
    for one, other in zip(stock.weights, state.model.weights):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "settings, tolerance, images",
    [(["--ema=0.9"], 1e-5, 0), (["--precision=mixed_bfloat16"], 0.02, 1)],
    ids=["average", "16 bits"],
)
def test_what_is_evaluated_is_what_predicts_and_is_exported_in_float32(
    tmp_path, digits, settings, tolerance, images
):
    """In 16 bits the fast forward pass rounds in other places than the plain one, which may cost an
    image."""
    from tfloop.training import saved_run

    main(
        [
            "train",
            "--preset=digits",
            "--epochs=2",
            *settings,
            f"--logdir={tmp_path}",
            "--quiet",
            "--summaries=none",
        ]
    )
    _, state, manifest = saved_run.open_run(tmp_path / "digits-001")
    probabilities = predictions.predict(state, digits.test.inputs)
    hits = np.sum(probabilities.argmax(axis=1) == digits.test.targets)
    assert (
        abs(hits - len(digits.test) * manifest["reached"]["epochs"][-1]["test"]["accuracy"])
        < images + 0.01
    )
    model = export.plain_model(state)
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    np.testing.assert_allclose(
        model(digits.test.inputs.astype(np.float32)), probabilities, atol=tolerance
    )


def test_nothing_is_overwritten_and_endings_are_checked(run, tmp_path, loop):
    (tmp_path / "m.keras").write_text("precious")
    state = loop().state
    with pytest.raises(UserError, match="m.keras: exists already"):
        export.export(state, "keras", tmp_path / "m.keras")
    with pytest.raises(UserError, match="m.h5: a keras file ends in .keras"):
        export.export(state, "keras", tmp_path / "m.h5")
    with pytest.raises(UserError, match="cannot be written"):
        export.export(state, "keras", "/proc/nowhere/m.keras")
    assert [path.name for path in tmp_path.iterdir()] == ["m.keras"]


# --- import


MODEL = ["--preset=digits", "--conv=4,6", "--pool=2", "--dense=8", "--quiet"]


def stack(*front, activation="relu", dense=8, last="softmax"):
    """A model as a Keras user writes it, whose layers are those of MODEL."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *front,
            layers.Conv2D(4, 3, activation=activation),
            layers.MaxPooling2D(),
            layers.Conv2D(6, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(dense, activation="relu"),
            layers.Dense(10, activation=last),
        ]
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    "front, last, flags",
    [
        ((keras.layers.Rescaling(1 / 16, -0.5),), "softmax", ()),
        (
            (
                keras.layers.Normalization(
                    axis=(1, 2, 3),
                    mean=np.full((8, 8, 1), 5.0),
                    variance=np.arange(1.0, 65).reshape(8, 8, 1),
                ),
            ),
            None,
            (),
        ),
        ((), "softmax", ("--nostandardize",)),
    ],
    ids=["rescaling", "normalization and logits", "raw pixels"],
)
def test_an_imported_keras_model_predicts_the_same(tmp_path, digits, front, last, flags):
    from tfloop.training import saved_run

    theirs = stack(*front, last=last)
    theirs.save(tmp_path / "m.keras")
    assert main(["import", str(tmp_path / "m.keras"), *MODEL, *flags, f"--logdir={tmp_path}"]) == 0
    _, state, _ = saved_run.open_run(tmp_path / "digits-001")
    images = digits.test.inputs[:50]
    expected = theirs(images.astype(np.float32)).numpy()
    if last is None:
        expected = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predictions.predict(state, images), expected, atol=1e-5)


@pytest.mark.parametrize(
    "flags", [["--ema=0.99"], ["--precision=mixed_float16"]], ids=["average", "16 bits"]
)
def test_imported_weights_are_those_that_are_evaluated_and_functional_models_are_taken(
    tmp_path, digits, capsys, flags
):
    keras.utils.set_random_seed(3)
    plain = stack(keras.layers.Rescaling(1 / 16))
    inputs = keras.Input((8, 8, 1))
    keras.Model(inputs, plain(inputs))  # builds it
    x = inputs
    for layer in plain.layers:
        x = layer(x)
    keras.Model(inputs, x).save(tmp_path / "m.keras")
    assert main(["import", str(tmp_path / "m.keras"), *MODEL, *flags, f"--logdir={tmp_path}"]) == 0
    assert main(["evaluate", str(tmp_path / "digits-001")]) == 0
    found = plain(digits.test.inputs.astype(np.float32)).numpy().argmax(axis=1)
    accuracy = float(re.search(r"accuracy +([\d.]+) %", capsys.readouterr().out)[1])
    # In 16 bits one or two of the 360 images may go over to another class.
    assert accuracy == pytest.approx(100 * np.mean(found == digits.test.targets), abs=0.6)


def test_what_was_exported_can_be_imported_and_trained_on(run, tmp_path, capsys):
    from tfloop.training import saved_run

    folder, images, expected = run
    model = [
        "--preset=digits",
        "--epochs=1",
        "--batch_norm",
        "--dropout=0.2",
        f"--logdir={tmp_path}",
        "--quiet",
    ]
    for number, (format, ending) in enumerate(
        (("keras", ".keras"), ("weights", ".weights.h5")), start=1
    ):
        main(["export", str(folder), f"--format={format}", f"--out={tmp_path}/m{ending}"])
        assert main(["import", f"{tmp_path}/m{ending}", *model]) == 0
        _, state, _ = saved_run.open_run(tmp_path / f"digits-{number:03d}")
        np.testing.assert_allclose(predictions.predict(state, images), expected, atol=1e-5)
    assert main(["train", f"--resume={tmp_path}/digits-001"]) == 0
    result = json.loads((tmp_path / "digits-001" / "result.json").read_text())
    # From random weights: below 0.7.
    assert result["finished"] and result["final"]["train"]["accuracy"] > 0.85
    assert list((tmp_path / "digits-001").glob("train/*tfevents*"))


@pytest.mark.quick
@pytest.mark.parametrize(
    "made, ending, message",
    [
        (
            lambda: stack(dense=9),
            ".keras",
            r"layer 3 with weights is Dense \[\(6, 9\), \(9,\)\], the model has Dense \[\(6, 8\)",
        ),
        (
            lambda: stack(activation="tanh"),
            ".keras",
            "the weights fit, but its model computes something else",
        ),
        (lambda: stack(dense=9), ".weights.h5", "holds .* weights, the model has"),
        (
            lambda: keras.Sequential(
                [keras.Input((8, 8, 1)), keras.layers.Conv2D(6, 3), keras.layers.Conv2D(4, 1)]
            ),
            ".weights.h5",
            "holds",
        ),
        (lambda: None, ".keras", "is damaged: it is no archive"),
        (lambda: None, ".weights.h5", "cannot be read"),
        (lambda: None, ".h5", "expected a .keras"),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_leaves_nothing(
    tmp_path, capsys, made, ending, message
):
    import re

    path = tmp_path / f"m{ending}"
    model = made()
    if model is None:
        path.write_bytes(b"nothing of the kind")
    else:
        model.save(path) if ending == ".keras" else model.save_weights(path)
    assert main(["import", str(path), *MODEL, "--nostandardize", f"--logdir={tmp_path}/runs"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"tfloop: {path}: ")
        and re.search(message, error)
        and error.count("\n") == 1
    ), error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda name, content: content.replace(b'"units": 8', b'"units": 1000000000'), "a size of"),
        (lambda name, content: bytes(200 << 20) if name.endswith(".h5") else content, "unpacks to"),
    ],
    ids=["a layer of a billion units", "zeros by the hundred MiB"],
)
def test_an_archive_that_would_take_much_memory_is_refused_before_it_is_read(
    tmp_path, capsys, monkeypatch, change, message
):
    import zipfile

    stack().save(tmp_path / "good.keras")
    with (
        zipfile.ZipFile(tmp_path / "good.keras") as good,
        zipfile.ZipFile(tmp_path / "m.keras", "w", zipfile.ZIP_DEFLATED) as changed,
    ):
        for name in good.namelist():
            changed.writestr(name, change(name, good.read(name)))
    monkeypatch.setattr(keras.saving, "load_model", None)  # it must not come to that
    path = tmp_path / "m.keras"
    assert main(["import", str(path), *MODEL, "--nostandardize", f"--logdir={tmp_path}/runs"]) == 2
    assert message in capsys.readouterr().err


def test_numbers_that_a_model_was_compiled_with_are_no_sizes(tmp_path):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 100_000, 0.96)
    model = stack()
    model.compile(keras.optimizers.SGD(schedule), "sparse_categorical_crossentropy")
    model.save(tmp_path / "m.keras")
    flags = [*MODEL, "--nostandardize", f"--logdir={tmp_path}/runs"]
    assert main(["import", str(tmp_path / "m.keras"), *flags]) == 0
