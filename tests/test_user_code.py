"""Models, data, losses and metrics from files of the user's own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tfloop
from tfloop import user_code
from tfloop.cli import main
from tfloop.errors import UserError
from tfloop.training import code

EXAMPLES = Path(tfloop.__file__).parent / "examples"
GOOD = """
import keras
import numpy as np


def model(input_shape, classes, width=4):
    return keras.Sequential(
        [keras.Input(input_shape), keras.layers.Dense(width), keras.layers.Dense(classes)]
    )


def data(shift=0):
    x = np.random.default_rng(0).normal(size=(60, 3)) + shift
    y = (x[:, 0] > shift).astype(int)
    return x[:40], y[:40], x[40:], y[40:]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(source): the file own.py with this source, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(source=GOOD, name="own.py"):
        Path(name).write_text(source)
        return name

    return write


def train(*flags, model="own.py:model", dataset="own.py:data"):
    return main(
        [
            "train",
            f"--model={model}",
            f"--dataset={dataset}",
            "--epochs=1",
            "--batch_size=10",
            "--quiet",
            "--summaries=none",
            "--logdir=runs",
            "--name=run",
            *flags,
        ]
    )


MODEL = "def model(input_shape, classes):\n    "
DATA = "import numpy as np\ndef data():\n    "
BAD = [
    ("model", "", "own.py has no function model; it has none"),
    ("model", "def model(x:\n", r"own.py, line 1: SyntaxError"),
    ("model", "import nothing_like_this\n", "own.py, line 1: ModuleNotFoundError"),
    ("model", "1 / 0\n", "own.py, line 1: ZeroDivisionError"),
    ("model", MODEL + "return 3\n", "gives int; expected a keras.Model"),
    ("model", MODEL + "raise OSError('no disk')\n", "own.py, line 2: OSError: no disk"),
    ("model", "def model(colour):\n    pass\n", "needs colour, which is none of config,inputs"),
    ("dataset", DATA + "return 3\n", "gives int; expected .x_train, y_train"),
    ("dataset", DATA + "return 1, 2, 3\n", "gives 3 things; expected"),
    ("dataset", DATA + "return {'a': 1}\n", "gives a dict of a; expected"),
    ("dataset", DATA + "return np.zeros((9, 2)), np.arange(8)\n", "9 training examples but 8 targ"),
    ("dataset", DATA + "return np.zeros((9, 2)), [np.nan] * 9\n", "row 0 is NaN or infinite"),
    ("dataset", DATA + "return np.full((9, 2), np.inf), np.arange(9) % 2\n", "row 0 holds NaN or"),
    ("dataset", DATA + "return {}[0]\n", "own.py, line 3: KeyError"),
]


@pytest.mark.quick
@pytest.mark.parametrize("flag, source, message", BAD)
def test_what_is_wrong_with_a_file_is_one_line_with_the_users_own_line(
    own, capsys, flag, source, message
):
    own(source, "own.py")
    own(GOOD, "good.py")
    files = {"model": "good.py:model", "dataset": "good.py:data", flag: f"own.py:{flag[:5]}"}
    files[flag] = "own.py:model" if flag == "model" else "own.py:data"
    assert train(**files) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"tfloop: --{flag}=own.py:"), said
    import re

    assert re.search(message, said), said


@pytest.mark.quick
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model=gone.py:model"], "gone.py cannot be read: No such file"),
        (["--model=own.py"], "expected FILE.py:function or package.module:function"),
        (["--model=no.such.module:model"], "no.such.module:model: ModuleNotFoundError"),
        (["--model_options=height=3"], "own.py:model takes no height; it takes input_shape"),
        (["--model_options=width"], "'width': expected NAME=VALUE"),
        (["--data_options=shift=x"], "own.py, line 13: "),
        (["--conv=3"], "--conv is of the CNN, which --model=own.py:model replaces"),
        (["--loss=nonsense"], "Keras has no loss named 'nonsense'"),
        (["--metrics=nonsense"], "neither scikit-learn nor Keras has a metric named 'nonsense'"),
        (["--augment_shift=1"], "the inputs are 3 float32"),
        (["--choose_by=validation f1"], "there is no validation f1; there are"),
        (["--until=accuracy"], "expected a goal"),
        (["--max_time=soon"], "expected a time"),
        (["--freeze=nothing"], "'nothing' matches no weight; there are dense/kernel"),
        (["--rate_of=dense"], "expected PATTERN:FACTOR"),
        (["--exclude_from_weight_decay=bias"], "rmsprop has no weight_decay"),
        (
            ["--schedule=plateau"],
            "--schedule=plateau looks at validation examples, and there are none",
        ),
        (["--early_stopping=2"], "--early_stopping looks at validation examples"),
        (["--until=validation accuracy > 0.9"], "there is no validation accuracy; there are"),
        (["--freeze=."], "--freeze=. leaves nothing to train"),
    ],
)
def test_flags_that_go_with_a_file_are_checked(own, capsys, flags, message):
    own()
    assert train(*flags) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_outputs_that_do_not_fit_the_targets_are_named_before_training(own, capsys):
    own(GOOD.replace("Dense(classes)", "Dense(5)") + "\n")
    assert train("--loss=mse") == 2
    assert "fails on targets int64 (10,) and outputs float32 (10, 5)" in capsys.readouterr().err
    own(GOOD.replace("Dense(classes)", "Dense(3, activation=None)").replace("(int)", "(float)"))
    assert train() == 2
    said = capsys.readouterr().err
    assert (
        "the model gives outputs of shape (3,) for an example; the targets are one values" in said
    )


def test_a_metric_that_fails_is_named_and_training_goes_on(own, tmp_path):
    """Of one class only there is no area under the curve."""
    own(GOOD.replace("x[40:], y[40:]", "x[40:], 0 * y[40:]"))
    with pytest.warns(UserWarning, match="roc_auc_score is left out: it is nan"):
        assert train("--metrics=roc_auc_score") == 0
    final = json.loads((tmp_path / "runs/run-001/result.json").read_text())["final"]
    assert final["test"]["roc_auc_score"] is None and final["test"]["total"] > 0


# --- the source of a run


def test_the_source_of_a_run_is_kept_and_a_resumed_run_whose_source_changed_says_so(
    own, tmp_path, capsys
):
    own()
    assert train() == 0
    run = tmp_path / "runs/run-001"
    stored = json.loads((run / code.FILE).read_text())["model=own.py:model"]
    kept = run / code.FOLDER / stored["digest"][:12] / "own.py"
    assert kept.read_text() == GOOD
    own(GOOD.replace("width=4", "width=4 "))
    resume = ["train", f"--resume={run}", "--epochs=2", "--quiet"]
    assert main(resume) == 2
    said = capsys.readouterr().err
    assert "own.py of --model is not what the run was made with" in said and str(run) in said
    assert main([*resume, "--override"]) == 0
    assert main(["evaluate", str(run)]) == 0


def test_a_folder_from_someone_else_runs_no_code_of_its_own(own, tmp_path, capsys):
    own()
    assert train() == 0
    run = tmp_path / "runs/run-001"
    evil = run / "evil.py"
    evil.write_text(GOOD + "\nopen('was_run', 'w')\n")
    config = json.loads((run / "config.json").read_text())
    for place in (run / "config.json", *run.glob("checkpoints/*/manifest.json")):
        place.write_text(place.read_text().replace("own.py:", f"{evil}:"))
    assert config["model"] == "own.py:model"
    outside = tmp_path / "evil.py"
    shutil.copy(evil, outside)
    for arguments in (
        ["evaluate", str(run)],
        ["predict", str(run), "x.npz"],
        ["export", str(run)],
        ["train", f"--resume={run}", "--epochs=2"],
        ["train", f"--config={run}/config.json"],
    ):
        assert main(arguments) == 2
    # Nor what lies elsewhere, with sums of the stranger's own making, nor what is installed.
    sums = {"digest": user_code.digest_of({"evil.py": outside.read_text()}), "root": str(tmp_path)}
    for reference, options in (
        (f"{outside}:model", []),
        ("subprocess:check_output", ["args=touch was_run", "shell=true"]),
        ("os:system", ["command=touch was_run"]),
    ):
        changed = {**config, "model": reference, "model_options": options}
        (run / "config.json").write_text(json.dumps(changed))
        entry = {"files": ["evil.py"], **sums}
        key = f"model={reference.rpartition('/')[2]}"
        (run / code.FILE).write_text(json.dumps({key: entry, "model=os:system": {"files": 5}}))
        for arguments in (
            ["train", f"--resume={run}", "--epochs=2"],
            ["train", f"--config={run}/config.json"],
        ):
            assert main(arguments) == 2
            assert "that you have not named here before" in capsys.readouterr().err
    assert not Path("was_run").exists()


def test_files_beside_a_model_are_part_of_its_source(own, tmp_path, capsys):
    for folder, width in (("one", 3), ("two", 5)):
        (tmp_path / folder / "parts").mkdir(parents=True)
        own(GOOD.replace("width=4", "width=4").replace("def model", "import helper\n\n\ndef model"))
        source = Path("own.py").read_text().replace("Dense(width)", "Dense(helper.WIDTH)")
        (tmp_path / folder / "own.py").write_text(source)
        (tmp_path / folder / "helper.py").write_text("from parts.more import WIDTH\n")
        (tmp_path / folder / "parts" / "more.py").write_text(f"WIDTH = {width}\n")
    for number, (folder, width) in enumerate((("one", 3), ("two", 5)), start=1):
        assert train(model=f"{folder}/own.py:model", dataset=f"{folder}/own.py:data") == 0
        run = tmp_path / "runs" / f"run-00{number}"
        kept = json.loads((run / code.FILE).read_text())["model=own.py:model"]
        assert sorted(kept["files"]) == ["helper.py", "own.py", "parts/more.py"]
        assert (run / code.FOLDER / kept["digest"][:12] / "parts" / "more.py").is_file()
        assert tfloop.open_run(run)[1].weights["dense/kernel"].shape[1] == width
    (tmp_path / "two" / "parts" / "more.py").write_text("WIDTH = 5  # as before\n")
    capsys.readouterr()
    assert main(["train", f"--resume={run}", "--epochs=2", "--quiet"]) == 2
    assert "one of own.py, helper.py" in capsys.readouterr().err


def test_a_run_whose_file_is_gone_names_the_copy_to_look_at(own, tmp_path, capsys):
    own()
    assert train() == 0
    run = tmp_path / "runs/run-001"
    Path("own.py").unlink()
    assert main(["evaluate", str(run)]) == 2
    said = capsys.readouterr().err
    assert "name it: --model=" in said
    named = said.partition("name it: --model=")[2].strip()
    copy = named.rpartition(":")[0]
    assert Path(copy).read_text() == GOOD
    shutil.copy(copy, "elsewhere.py")
    again = ["--model=elsewhere.py:model", "--dataset=elsewhere.py:data"]
    assert main(["evaluate", str(run), *again]) == 0


def test_a_run_is_found_from_another_folder(own, tmp_path, monkeypatch):
    own()
    assert train() == 0
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    assert main(["evaluate", str(tmp_path / "runs/run-001")]) == 0


# --- new, and the examples


def test_new_makes_a_folder_that_trains_at_once(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(tfloop.__file__).parent.parent)}

    def run(command, **options):
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, check=True, **options
        )

    made = run([sys.executable, "-m", "tfloop", "new", "my net"], cwd=tmp_path)
    command = next(line for line in made.stdout.splitlines() if "train" in line and "&&" in line)
    trained = run(["bash", "-c", f"{command} --epochs=8"], cwd=tmp_path)
    share = float(trained.stdout.partition("f1_macro ")[2].split()[0])
    assert share > 0.3 and "mine-001" in trained.stdout
    again = subprocess.run(
        [sys.executable, "-m", "tfloop", "new", "my net"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2 and "has a data.py already" in again.stderr


def flags_of(example):
    """The flags of the first command in an example's docstring."""
    text = (EXAMPLES / f"{example}.py").read_text().split("./run.sh train")[1].split("\n\n")[0]
    words = text.replace("\\\n", " ").split()
    root = EXAMPLES.parent.parent
    return [word.replace("tfloop/examples", str(root / "tfloop/examples")) for word in words]


@pytest.mark.parametrize(
    "example, part, metric, least",
    [
        ("table", "test", "accuracy", 0.93),
        ("regression", "validation", "r2_score", 0.4),
        ("resnet", "test", "accuracy", 0.95),
        ("tokens", "test", "accuracy", 0.95),
        ("two_outputs", "test", "digit/accuracy", 0.88),
        ("pipeline", "test", "accuracy", 0.88),
    ],
)
def test_an_example_learns_by_the_command_it_shows(tmp_path, example, part, metric, least):
    assert main(["train", *flags_of(example), f"--logdir={tmp_path}", "--quiet"]) == 0
    [folder] = tmp_path.iterdir()
    assert json.loads((folder / "result.json").read_text())["final"][part][metric] > least
    assert main(["evaluate", str(folder)]) == 0


@pytest.mark.filterwarnings("ignore:the training step is traced again")
@pytest.mark.in_full
def test_transfer_in_two_phases_is_better_than_from_scratch():
    from tfloop.examples import transfer

    found = transfer.main(choices=1)
    assert found["all layers after it"] > found["from scratch"] + 0.02


@pytest.mark.quick
def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80


@pytest.mark.quick
def test_an_option_is_read_as_a_number_where_it_is_one():
    from tfloop.user_code import options_of, parsed

    assert [parsed(t) for t in ("3", "0.5", "true", "None", "a/b")] == [3, 0.5, True, None, "a/b"]
    assert options_of(["a=1", "b=x=y"], "data_options") == {"a": "1", "b": "x=y"}
    with pytest.raises(UserError, match="'a'"):
        options_of(["a"], "data_options")
    assert np.isfinite(parsed("1e5"))


def test_an_imported_run_of_a_functional_model_is_evaluated_without_naming_it_again(
    own, tmp_path, capsys
):
    start, end = GOOD.index("    return keras.Sequential"), GOOD.index("def data")
    functional = """    given = keras.Input(input_shape)
    hidden = keras.layers.Dense(width)(given)
    return keras.Model(given, keras.layers.Dense(classes)(hidden))


"""
    own(GOOD[:start] + functional + GOOD[end:])
    assert "keras.Model(given" in Path("own.py").read_text()
    assert train() == 0
    assert main(["export", "runs/run-001", "--out=own.keras"]) == 0
    flags = ["--model=own.py:model", "--dataset=own.py:data", "--logdir=runs", "--name=run"]
    assert main(["import", "own.keras", *flags, "--batch_size=10"]) == 0
    lines = []
    for run in ("runs/run-001", "runs/run-002"):
        capsys.readouterr()
        assert main(["evaluate", run]) == 0
        lines.append(capsys.readouterr().out.splitlines()[0])
    assert lines[0] == lines[1]


def test_evaluate_takes_other_data_with_options_of_their_own(own, capsys):
    own(GOOD + "\n\ndef other(size):\n    return tuple(part[:size] for part in data())\n")
    assert train("--data_options=shift=1") == 0
    again = ["evaluate", "runs/run-001", "--dataset=own.py:other"]
    assert main(again) == 2
    assert "the function needs size" in capsys.readouterr().err
    assert main([*again, "--data_options=size=10"]) == 0
    assert "10 test examples" in capsys.readouterr().out


TORCHLIKE = """
import tensorflow as tf


class Net(tf.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.w = tf.Variable(tf.zeros([inputs, classes]), name="w")

    def __call__(self, x):
        return x @ self.w


def model(input_shape, classes):
    return Net(input_shape[0], classes)
"""


def test_a_tf_module_trains_with_the_flags_as_they_are(own):
    own()
    own(TORCHLIKE, "net.py")
    assert train(model="net.py:model") == 0
    assert main(["export", "runs/run-001"]) == 2


STREAMS = """
import numpy as np
import tensorflow as tf

x, y = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2


def whole():
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(10)


def other_shape():
    return whole(), tf.data.Dataset.from_tensor_slices((x[:, :2], y)).batch(10)


ONCE = iter([(x[:10], y[:10])] * 4)


def once():
    spec = (tf.TensorSpec([None, 3], tf.float64), tf.TensorSpec([None], tf.int64))
    return tf.data.Dataset.from_generator(lambda: ONCE, output_signature=spec)
"""


@pytest.mark.parametrize(
    "command, function, flags, message",
    [
        ("train", "whole", ["--validation_size=5"], "a tf.data.Dataset cannot be cut"),
        ("sweep", "whole", ["--grid=l2=0,1"], "a tf.data.Dataset cannot be cut"),
        ("train", "other_shape", [], "inputs are 2 float64, those of the training 3 float64"),
        ("train", "once", [], "once only"),
        ("train", "whole", ["--batch_size=20"], "gives batches of 10"),
        ("train", "whole", ["--pipeline=resident"], "use host or prefetch"),
    ],
)
def test_what_a_dataset_cannot_do_is_one_line(own, capsys, command, function, flags, message):
    own()
    own(STREAMS, "streams.py")
    given = ["--model=own.py:model", f"--dataset=streams.py:{function}", "--quiet", *flags]
    assert main([command, *given, "--logdir=runs"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
