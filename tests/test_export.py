"""Exported models: loaded by Keras and TensorFlow alone, in a process without tfloop, they predict the same."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import tfloop
from tfloop import export, predictions
from tfloop.cli import main
from tfloop.errors import UserError

LOAD = {
    "keras": "import keras; p = keras.saving.load_model(path).predict(x, verbose=0)",
    "saved_model": "import tensorflow as tf; m = tf.saved_model.load(path); p = m.serve(tf.constant(x)).numpy()",
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
    """(folder of a run with batch normalisation, some test images, their probabilities as `predict` has them)."""
    folder = tmp_path_factory.mktemp("runs")
    main(["train", "--preset=digits", "--epochs=2", "--batch_norm", "--dropout=0.2", f"--logdir={folder}", "--quiet", "--summaries=none"])
    from tfloop import runs

    _, state, _ = runs.open_run(folder / "digits-001")
    images = tfloop.load("digits").test.images[:50]
    return folder / "digits-001", images, predictions.predict(state, images)


@pytest.mark.parametrize("format", LOAD)
def test_it_predicts_the_same_without_tfloop(run, tmp_path, format):
    folder, images, expected = run
    path = tmp_path / f"model{export.FORMATS[format]}"
    assert main(["export", str(folder), f"--format={format}", f"--out={path}"]) == 0
    np.save(tmp_path / "x.npy", images.astype(np.float32))
    program = (f"import json, sys; import numpy as np; path = {str(path)!r}; x = np.load({str(tmp_path / 'x.npy')!r})\n{LOAD[format]}\n"
               "assert 'tfloop' not in sys.modules\nprint(json.dumps(p.tolist()))")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), expected, atol=1e-5)


def test_weights_fit_a_stock_keras_model_of_the_same_layers(run, tmp_path):
    import keras

    from tfloop import runs

    folder, _, _ = run
    assert main(["export", str(folder), "--format=weights", f"--out={tmp_path}/m.weights.h5"]) == 0
    _, state, _ = runs.open_run(folder)
    stock = keras.Sequential.from_config(state.model.get_config())
    stock.load_weights(tmp_path / "m.weights.h5")
    for one, other in zip(stock.weights, state.model.weights):
        np.testing.assert_array_equal(one, other)


def test_nothing_is_overwritten_and_endings_are_checked(run, tmp_path, loop):
    (tmp_path / "m.keras").write_text("precious")
    state = loop().state
    with pytest.raises(UserError, match="m.keras: is there already"):
        export.export(state, "keras", tmp_path / "m.keras")
    with pytest.raises(UserError, match="m.h5: a keras file ends in .keras"):
        export.export(state, "keras", tmp_path / "m.h5")
    with pytest.raises(UserError, match="cannot be written"):
        export.export(state, "keras", "/proc/nowhere/m.keras")
    assert [path.name for path in tmp_path.iterdir()] == ["m.keras"]
