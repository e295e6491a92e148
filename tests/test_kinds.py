"""Every kind of input and target with every feature; and what Keras's fit does with the same."""

import csv
import io
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfloop
from tfloop.cli import main
from tfloop.inspection.event_files import read_scalars

FILE = '''
import keras
import numpy as np
import tensorflow as tf
from keras import layers

N = 48


def inputs(kind):
    random = np.random.default_rng(0)
    made = {
        "images": lambda: random.integers(0, 256, (N, 6, 6, 1), dtype=np.uint8),
        "table": lambda: random.normal(3.0, 2.0, (N, 5)),
        "tokens": lambda: random.integers(0, 9, (N, 7)),
        "series": lambda: random.normal(size=(N, 4, 3)),
        "dict": lambda: {"a": random.normal(size=(N, 5)), "b": random.integers(0, 9, (N, 7))},
    }
    return made[kind]()


def targets(kind):
    random = np.random.default_rng(1)
    numbers = np.arange(N) % 3
    made = {
        "classes": lambda: numbers,
        "shares": lambda: random.dirichlet(np.ones(3), N),
        "labels": lambda: random.integers(0, 2, (N, 3)),
        "values": lambda: random.normal(size=N),
        "outputs": lambda: {"kind": numbers, "size": random.normal(size=(N, 2))},
    }
    return made[kind]()


def cut(nest, rows):
    if isinstance(nest, dict):
        return {key: part[rows] for key, part in nest.items()}
    return nest[rows]


def data(x, y):
    first, last = slice(0, 33), slice(33, N)
    a, b = inputs(x), targets(y)
    return cut(a, first), cut(b, first), cut(a, last), cut(b, last)


def stream(x, y):
    train = (cut(inputs(x), slice(0, 33)), cut(targets(y), slice(0, 33)))
    test = (cut(inputs(x), slice(33, N)), cut(targets(y), slice(33, N)))
    return tuple(
        tf.data.Dataset.from_tensor_slices(part).shuffle(33, seed=2).batch(10)
        for part in (train, test)
    )


def part(array):
    given = keras.Input(array.shape, dtype="int64" if "int" in array.dtype[:3] else "float32")
    if "int64" in array.dtype:
        return given, layers.GlobalAveragePooling1D()(layers.Embedding(9, 4)(given))
    x = layers.Conv2D(3, 3, activation="relu")(given) if len(array.shape) == 3 else given
    return given, layers.Flatten()(x)


def model(inputs, targets):
    if isinstance(inputs, dict):
        parts = {key: part(array) for key, array in inputs.items()}
        given = {key: pair[0] for key, pair in parts.items()}
        x = layers.Concatenate()([pair[1] for pair in parts.values()])
    else:
        given, x = part(inputs)
    x = layers.Dropout(0.2)(layers.Dense(8, "relu")(x))
    if "" not in targets:
        outputs = {"kind": layers.Dense(3, "softmax")(x), "size": layers.Dense(2)(x)}
    else:
        outputs = layers.Dense(targets[""].classes or 1)(x)
    return keras.Model(given, outputs)


def largest(targets, outputs):
    """A metric by example, of whatever kind."""
    return tf.reduce_max(tf.cast(tf.nest.flatten(outputs)[0], tf.float32), axis=-1)
'''

INPUTS = ("images", "table", "tokens", "series", "dict")
TARGETS = ("classes", "shares", "labels", "values", "outputs")
# Each kind at least once; all 25 by `pytest tests/test_kinds.py --all_kinds`.
SOME = {("images", "classes"), ("table", "values"), ("tokens", "labels"), ("series", "shares")}
SOME |= {("dict", "outputs"), ("dict", "classes")}


def cells(config):
    every = [(x, y) for x in INPUTS for y in TARGETS]
    return every if config.getoption("all_kinds") else [cell for cell in every if cell in SOME]


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        found = cells(metafunc.config)
        metafunc.parametrize("cell", found, ids=["-".join(cell) for cell in found])


@pytest.fixture
def file(tmp_path):
    (tmp_path / "own.py").write_text(FILE)
    return tmp_path / "own.py"


def command(file, cell, *more, source="data", epochs=2):
    x, y = cell
    return [
        "train",
        f"--model={file}:model",
        f"--dataset={file}:{source}",
        f"--data_options=x={x},y={y}",
        f"--metrics={file}:largest",
        f"--epochs={epochs}",
        "--optimizer=adam",
        *(["--batch_size=10"] if source == "data" else []),
        f"--logdir={file.parent / 'runs'}",
        "--name=run",
        "--steps_per_call=2",
        "--quiet",
        *more,
    ]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_train_resume_evaluate_predict_export_and_tensorboard(file, cell, capsys):
    whole, cut = (file.parent / "runs" / f"run-00{number}" for number in (1, 2))
    assert main(command(file, cell)) == 0
    expected = result(whole)
    assert expected["finished"] and len(expected["epochs"]) == 2

    # Resumed in the middle of an epoch it ends with the same bits.
    assert main([*command(file, cell), "--max_time=0.0001s", "--checkpoint_every=2"]) == 0
    assert result(cut)["steps"] == 2 and not result(cut)["finished"]
    assert main(["train", f"--resume={cut}", "--max_time=", "--quiet"]) == 0
    assert result(cut)["weights_sha256"] == expected["weights_sha256"]
    assert result(cut)["final"]["test"] == expected["final"]["test"]

    capsys.readouterr()
    assert main(["evaluate", str(whole)]) == 0
    said = capsys.readouterr().out
    assert f"loss {expected['final']['test']['total']:.4f}" in said
    assert f"largest {expected['final']['test']['largest']:.4f}" in said

    _, state, _ = tfloop.open_run(whole)
    namespace = {}
    exec(FILE, namespace)
    inputs = namespace["data"](*cell)[2]
    given = tfloop.predict(state, inputs)
    arrays = inputs if isinstance(inputs, dict) else {"x": inputs}
    np.savez(file.parent / "new.npz", **arrays)
    assert main(["predict", str(whole), str(file.parent / "new.npz")]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 16
    numbers = np.concatenate([np.reshape(v, (15, -1)) for _, v in named(given)], axis=1)
    shown = [title for title in rows[0][1:] if not title.endswith("class")]
    assert len(shown) == numbers.shape[1]
    places = [rows[0].index(title) for title in shown]
    found = np.array([[float(row[place]) for place in places] for row in rows[1:]])
    np.testing.assert_allclose(found, numbers, atol=2e-6, rtol=1e-5)

    for format in ("keras", "saved_model"):
        out = file.parent / f"out.{format}"
        assert main(["export", str(whole), f"--format={format}", f"--out={out}"]) == 0
        raw = as_floats(inputs)
        if format == "keras":
            exported = keras.saving.load_model(out)(raw)
        else:
            loaded = tf.saved_model.load(str(out))
            exported = loaded.serve(raw)
        for (_, one), (_, other) in zip(named(exported), named(given)):
            np.testing.assert_allclose(one, other, atol=1e-5)

    tags = {(scalar.run, scalar.tag) for scalar in read_scalars(whole)}
    assert {("train", "loss/total"), ("test", "loss/total"), ("test", "largest")} <= tags


def as_floats(inputs):
    """As an exported model takes them: numbers that are scaled as float32."""

    def convert(array):
        is_whole = array.dtype.kind == "i"
        return tf.constant(array if is_whole else array.astype(np.float32))

    return (
        {k: convert(v) for k, v in inputs.items()} if isinstance(inputs, dict) else convert(inputs)
    )


def named(nest):
    return sorted(nest.items()) if isinstance(nest, dict) else [("", nest)]


@pytest.mark.parametrize(
    "of",
    [pytest.param(("dict", "outputs"), marks=pytest.mark.in_full), ("images", "classes")],
    ids="-".join,
)
def test_a_tf_data_dataset_resumes_in_mid_epoch_with_the_same_bits(file, of):
    whole, cut = (file.parent / "runs" / f"run-00{number}" for number in (1, 2))
    assert main(command(file, of, source="stream", epochs=3)) == 0
    stopped = ["--max_time=0.0001s", "--checkpoint_every=2"]
    assert main(command(file, of, *stopped, source="stream", epochs=3)) == 0
    assert result(cut)["steps"] == 2
    assert main(["train", f"--resume={cut}", "--max_time=", "--quiet"]) == 0
    assert result(cut)["weights_sha256"] == result(whole)["weights_sha256"]
    assert result(whole)["traces"] == {"train": 1, "evaluate": 1}


# --- two epochs of Keras's fit, with the same batches


def regression(random):
    return random.normal(size=(50, 4)), random.normal(size=(50, 2)), "mse", None


def several_labels(random):
    labels = random.integers(0, 2, (50, 3))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    return random.normal(size=(50, 4)), labels, loss, None


def weighted(random):
    labels = random.integers(0, 3, 50)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return random.normal(size=(50, 4)), labels, loss, random.uniform(0, 2, 50)


def two_outputs(random):
    targets = {"kind": random.integers(0, 3, 50), "size": random.normal(size=(50, 1))}
    kind = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return random.normal(size=(50, 4)), targets, {"kind": kind, "size": "mse"}, None


@pytest.mark.parametrize(
    "case, own_loss",
    [
        (regression, False),
        (several_labels, False),
        (weighted, False),
        (two_outputs, False),
        (weighted, True),
        (two_outputs, True),
    ],
)
def test_two_epochs_are_those_of_fit(case, own_loss, random):
    x, y, loss, weight = case(random)

    def build():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        h = layers.Dense(8, "tanh")(inputs)
        if isinstance(y, dict):
            outputs = {"kind": layers.Dense(3)(h), "size": layers.Dense(1)(h)}
        else:
            outputs = layers.Dense(3 if case is not regression else 2)(h)
        return keras.Model(inputs, outputs)

    data = tfloop.from_arrays(x, y, standardize=False, sample_weight=weight)
    state = tfloop.TrainState(build(), "adam", 0.01, loss=loss if own_loss else None)
    loop = tfloop.Loop(state, data, batch_size=16)
    batches = []
    for epoch in range(2):
        state.epoch.assign(epoch)
        batches += [loop.batch(index) for index in range(loop.steps)]
    state.reset()
    loop.fit(2)

    twin = build()
    twin.compile(keras.optimizers.Adam(0.01), loss)
    rows = tf.data.Dataset.from_generator(
        lambda: iter(tuple(batch) for batch in batches),
        output_signature=tuple(tf.nest.map_structure(spec_of, tuple(batches[0]))),
    )
    twin.fit(rows, epochs=1, verbose=0)
    for ours, theirs in zip(state.weights.values(), twin.trainable_variables):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def spec_of(tensor):
    return tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype)


def test_a_dataset_whose_order_differs_each_time_is_said_to_be_one(file, capsys):
    source = FILE.replace("shuffle(33, seed=2)", "shuffle(33)")
    file.write_text(source)
    flags = [
        flag for flag in command(file, ("table", "classes"), source="stream") if flag != "--quiet"
    ]
    assert main(flags) == 0
    assert "its order differs each time it is begun" in capsys.readouterr().err
