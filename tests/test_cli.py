"""The command line, in this process: what it prints, what it writes, its exit codes."""

import csv
import io
import json
import re
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import tensorflow as tf

import tfloop
from tfloop.cli import COMMANDS, main
from tfloop.config import FIELDS
from tfloop.inspection.event_files import read_scalars

SMALL = ["--preset=digits", "--conv=4,6", "--dense=8", "--batch_size=100", "--epochs=2"]


@pytest.fixture
def train(tmp_path):
    """train("--flag", …): the exit code; runs go to tmp_path."""
    return lambda *flags: main(["train", *SMALL, f"--logdir={tmp_path}", *flags])


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.quick
def test_train_writes_a_run_and_says_what_it_reached(train, tmp_path, capsys):
    assert train() == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(
        "1437 training and 360 test images of 8×8×1, 10 classes; 408 weights; CPU, resident"
    )
    assert out[1] == (
        "rmsprop: rho 0.9, momentum 0, epsilon 1e-07; constant: learning_rate 0.001; "
        "l1 0, l2 0 on dense1/kernel, output/kernel; batch 100, 2 epochs"
    )
    assert out[2].startswith("epoch 1/2  loss ") and out[3].startswith("epoch 2/2  loss ")
    assert out[4].startswith("test accuracy ") and out[5] == str(tmp_path / "digits-001")
    found = result(tmp_path / "digits-001")
    assert (
        found["steps"] == 30
        and found["traces"] == {"train": 1, "evaluate": 1}
        and found["finished"]
    )
    assert set(found["seconds"]) == {
        "setup",
        "tracing",
        "training",
        "evaluation",
        "summaries",
        "pictures",
    }
    assert [epoch["epoch"] for epoch in found["epochs"]] == [1, 2] and found["final"] == found[
        "epochs"
    ][1]
    assert (
        found["weights_sha256"]
        and found["peak_memory_mib"] > 100
        and found["versions"]["tensorflow"]
    )


def test_event_files_hold_train_and_test_over_one_axis(train, tmp_path):
    assert train("--steps_per_call=10", "--l2=0.001", "--schedule=inverse_time") == 0
    curves, scalars = {}, read_scalars(tmp_path / "digits-001")
    for run in ("train", "test"):
        tags = dict.fromkeys(scalar.tag for scalar in scalars if scalar.run == run)
        curves[run] = {
            tag: [s.step for s in scalars if (s.run, s.tag) == (run, tag)] for tag in tags
        }
        values = {tag: [s.value for s in scalars if (s.run, s.tag) == (run, tag)] for tag in tags}
        np.testing.assert_allclose(
            values["loss/total"], np.add(values["loss/data"], values["loss/l2"]), rtol=1e-6
        )
        assert values["loss/total"][-1] == pytest.approx(
            result(tmp_path / "digits-001")["final"][run]["total"],
            rel=0.2 if run == "train" else 1e-6,
        )
    assert {
        "loss/total",
        "loss/data",
        "loss/l1",
        "loss/l2",
        "accuracy",
        "learning_rate",
        "gradient_norm/all",
        "speed/ms_per_step",
    } <= set(curves["train"])
    assert curves["train"]["accuracy"] == [10, 15, 25, 30] and curves["test"]["accuracy"] == [
        15,
        30,
    ]


def test_the_config_of_a_run_repeats_it(train, tmp_path):
    train("--l2=0.01", "--seed=3")
    config = tmp_path / "digits-001" / "config.json"
    assert main(["train", f"--config={config}", "--name=again", "--quiet"]) == 0
    assert (
        result(tmp_path / "again-001")["weights_sha256"]
        == result(tmp_path / "digits-001")["weights_sha256"]
    )


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--l2=0.1", "{file}: --l1=-3.0 is out of range: it must be at least 0"),
        ("--l2=x", "--l2: expected a number, found 'x'"),
    ],
)
def test_a_mistake_in_a_config_file_names_it_and_one_of_a_flag_does_not(
    train, tmp_path, capsys, flag, message
):
    file = tmp_path / "own.json"
    file.write_text('{"preset": "digits", "l1": -3}')
    assert train(f"--config={file}", flag) == 2
    assert capsys.readouterr().err == f"tfloop: {message.format(file=f'--config={file}')}\n"


def test_flags_win_over_a_config_file_and_it_over_a_preset(train, tmp_path):
    (tmp_path / "own.json").write_text('{"preset": "digits", "seed": 4, "l2": 0.5, "epochs": 1}')
    assert (
        main(
            [
                "train",
                f"--config={tmp_path}/own.json",
                f"--logdir={tmp_path}",
                "--seed=5",
                "--dense=4",
                "--quiet",
            ]
        )
        == 0
    )
    config = result(tmp_path / "digits-001")["config"]
    assert (config["dataset"], config["l2"], config["seed"], config["dense"]) == (
        "digits",
        0.5,
        5,
        [4],
    )


def test_seeds_train_in_one_process_with_one_trace_as_fresh_processes_would(
    train, tmp_path, capsys
):
    assert train("--seeds=0,1,0", "--dropout=0.2") == 0
    assert "3 runs: test accuracy" in capsys.readouterr().out.splitlines()[-1]
    first, second, third = (result(tmp_path / f"digits-00{i}") for i in (1, 2, 3))
    assert first["weights_sha256"] == third["weights_sha256"] != second["weights_sha256"]
    assert third["traces"] == {"train": 1, "evaluate": 1} and third["steps"] == 30
    assert train("--seed=1", "--dropout=0.2", "--name=fresh", "--quiet") == 0
    assert result(tmp_path / "fresh-001")["weights_sha256"] == second["weights_sha256"]


def test_runs_repeat_one_seed(train, tmp_path):
    assert train("--runs=2", "--quiet") == 0
    assert (
        result(tmp_path / "digits-001")["weights_sha256"]
        == result(tmp_path / "digits-002")["weights_sha256"]
    )


def test_validation_chooses_the_best_epoch(train, tmp_path):
    assert train("--validation_size=100", "--quiet") == 0
    found = result(tmp_path / "digits-001")
    accuracy = [epoch["validation"]["accuracy"] for epoch in found["epochs"]]
    assert found["best"]["epoch"] == 1 + int(np.argmax(accuracy))


@pytest.mark.quick
def test_evaluate_repeats_the_final_metrics(train, tmp_path, capsys):
    train("--l2=0.01", "--batch_norm", "--quiet")
    final = result(tmp_path / "digits-001")["final"]["test"]
    assert main(["evaluate", str(tmp_path / "digits-001")]) == 0
    out = capsys.readouterr().out
    assert (
        f"loss {final['total']:.4f} (data {final['data']:.4f}" in out
        and f"accuracy {100 * final['accuracy']:.2f} %" in out
    )


@pytest.mark.quick
def test_predict_writes_class_and_probabilities_of_arrays_and_pictures(train, tmp_path, capsys):
    train("--quiet", "--epochs=10")
    images = tfloop.load("digits").test.inputs[:5]
    np.savez(tmp_path / "new.npz", images=images)
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(images):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(tf.io.encode_png(image).numpy())
    run, rows = str(tmp_path / "digits-001"), {}
    for source in ("new.npz", "pictures"):
        assert main(["predict", run, str(tmp_path / source), f"--out={tmp_path}/{source}.csv"]) == 0
        rows[source] = list(csv.DictReader((tmp_path / f"{source}.csv").open()))
    assert [row["image"] for row in rows["pictures"]] == [f"{i}.png" for i in range(5)]
    for array, picture in zip(rows["new.npz"], rows["pictures"]):
        probabilities = [float(array[f"p{k}"]) for k in range(10)]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5) and int(
            array["class"]
        ) == np.argmax(probabilities)
        assert {**array, "image": ""} == {**picture, "image": ""}


@pytest.mark.quick
def test_model_prints_the_articles_table(capsys):
    assert main(["model"]) == 0
    out = capsys.readouterr().out
    assert "kernel (576, 70), bias (70)" in out and "96,844" in out


@pytest.mark.quick
def test_schedule_prints_the_rate_and_plots_it(tmp_path, capsys):
    flags = ["--preset=article3", "--epochs=15", "--print", f"--plot={tmp_path}/rate.png"]
    assert main(["schedule", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0.00", "0", "0.001"] and lines[21].split()[1] == "14069"
    assert float(lines[21].split()[2]) == pytest.approx(0.001 / (1 + 0.001 * 14069), rel=1e-6)
    assert (tmp_path / "rate.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.quick
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--nonsense=1"], "Unknown command line flag 'nonsense'; see tfloop train --help"),
        (["--epoch=1"], "Did you mean: epochs?; see tfloop train --help"),
        (["--fast=maybe"], "tfloop: --fast=maybe: expected true or false; see tfloop train"),
        (["extra"], "train takes flags only, found 'extra'"),
        (["--flagfile=/nowhere"], "/nowhere"),
        (["--config=/nowhere"], "--config=/nowhere: cannot be read"),
        (["--epochs=many"], "--epochs: expected a whole number, found 'many'"),
        (["--dataset=/nowhere"], "--dataset=/nowhere: does not exist; name mnist, digits"),
        (["--dataset=/usr/bin/env"], "--dataset=/usr/bin/env: not mnist, digits"),
        (["--dataset=/usr"], "is missing (of pictures, tfloop pack first makes shards)"),
        (["--ema=1"], "--ema=1.0 is out of range: it must be at least 0 and less than 1"),
        (
            ["--label_smoothing=1"],
            "--label_smoothing=1.0 is out of range: it must be at least 0 and less than 1",
        ),
        (["--augment_shift=8"], "--augment_shift=8 pixels leave nothing of images of 8×8×1"),
        (["--average_shifts=9"], "--average_shifts=9 pixels leave nothing"),
        (["--conv=32,,64"], "--conv: expected a whole number, found ''"),
        (["--override"], "--override counts with --resume only"),
        (["--pool=2,9"], "--pool: pool2 is 9×9, larger than its 1×1 input"),
        (["--optimizer=nadam", "--momentum=0.5"], "--momentum: optimizer 'nadam' has no momentum"),
        (["--decay_rate=0.5"], "--decay_rate: schedule 'constant' has no decay_rate"),
        (["--batch_size=2000"], "--batch_size=2000 is larger than the 1437 training images"),
        (["--device=gpu:7"], "--device=gpu:7: TensorFlow"),
        (["--device=tpu"], "--device=tpu is unknown"),
        (["--logdir=/dev/null/x"], "--logdir=/dev/null/x: "),
        (["--logdir=/proc/x"], "--logdir=/proc/x: cannot make /proc/x/digits-001"),
        (["--name=a/b"], "--name=a/b: expected a plain name"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing(
    train, tmp_path, capsys, flags, message
):
    assert train(*flags) == 2
    captured = capsys.readouterr()
    assert (
        message in captured.err
        and captured.err.count("\n") == 1
        and captured.err.startswith("tfloop: ")
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fly"], "'fly' is no command; choose from train"),
        (["evaluate"], "expected RUN"),
        (["evaluate", "/nowhere"], "/nowhere: does not exist; a run's folder is needed"),
        (["evaluate", "/tmp"], "/tmp: not a run's folder: it has no config.json"),
        (
            ["launch", "--workers=33", "--preset=digits"],
            "--batch_size=32 cannot be cut into 33 equal parts, one for each worker",
        ),
        (["predict", "/nowhere"], "expected RUN and INPUTS"),
        (["schedule"], "choose --print, or --plot=FILE.png"),
        (
            ["schedule", "--preset=digits", "--plot=/nowhere/x.png"],
            "/nowhere/x.png: cannot be written",
        ),
        (["export", "/nowhere"], "/nowhere: does not exist; a run's folder is needed"),
        (
            ["export", "/tmp", "--format=onnx"],
            "--format=onnx is unknown; choose from keras, saved_model, tflite, weights",
        ),
        (["scalars"], "expected RUN, one or several folders with event files"),
        (["scalars", "/nowhere"], "/nowhere: does not exist"),
        (["scalars", "/tmp", "--format=xml"], "--format=xml is unknown; choose from csv, json"),
        (["plot", "/nowhere"], "/nowhere: does not exist"),
        (
            ["plot", "/tmp", "--reference=99"],
            "--reference=99: expected an accuracy between 0 and 1",
        ),
        (["tensorboard", "/nowhere"], "/nowhere: no such folder"),
        (
            ["tensorboard", "/tmp", "/tmp"],
            "expected LOGDIR, the folder with the runs; found 2 arguments",
        ),
        (["tensorboard", "/tmp", "--host=nowhere.invalid", "--port=0"], "--host=nowhere.invalid: "),
        (["tensorboard", "/tmp", "--host="], "--host: expected the address to listen on"),
        (
            ["debug", "--break_at=3", "--break_on_nan"],
            "--break_at, --break_if and --break_on_nan exclude each other",
        ),
        (
            ["train", "--check_numerics", "--jit_compile"],
            "--check_numerics and --jit_compile exclude each other",
        ),
        (
            ["train", "--check_numerics", "--debugger_dump=/tmp/x"],
            "--check_numerics and --debugger_dump exclude each other",
        ),
        (
            ["train", "--debugger_dump=/dev/null/x"],
            "--debugger_dump=/dev/null/x: cannot be made: Not a directory",
        ),
        (["scalars", ""], "expected RUN"),
        (["tensorboard", "/tmp", "--port=abc"], "--port=abc: expected a number from 0 to 65535"),
        (
            ["debug", "--break_if=gradients.norm >"],
            "--break_if=gradients.norm >: is no Python expression",
        ),
        (["debug", "--break_at=soon"], "--break_at=soon: expected the number of a step"),
        (["parity", "--steps=0"], "--steps=0: expected a number of steps, 1 or more"),
        (["overfit", "--steps=x"], "--steps=x: expected a number of steps, 1 or more"),
        (["train", "--profile=9:3"], "--profile=9:3: expected FIRST:LAST"),
        (
            ["train", "--summaries=some"],
            "--summaries=some is unknown; choose from none, scalars, default, full",
        ),
    ],
)
def test_a_mistake_with_another_command_is_one_line_too(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


@pytest.mark.quick
def test_scalars_prints_what_the_event_files_hold(train, tmp_path, capsys):
    train("--quiet", "--steps_per_call=10")
    run = str(tmp_path / "digits-001")
    assert main(["scalars", run, "--tags=accuracy,learning_rate"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["run"], int(row["step"])) for row in rows if row["tag"] == "accuracy"] == [
        *((f"{run}/test", step) for step in (15, 30)),
        *((f"{run}/train", step) for step in (10, 15, 25, 30)),
    ]
    assert main(["scalars", run, "--tags=nothing"]) == 2
    assert "there is no tag 'nothing'" in capsys.readouterr().err
    assert main(["scalars", run, "--format=json", f"--out={tmp_path}/all.json"]) == 0
    found = json.loads((tmp_path / "all.json").read_text())
    final = result(tmp_path / "digits-001")["final"]["test"]["accuracy"]
    assert [e["value"] for e in found if e["run"].endswith("test") and e["tag"] == "accuracy"][
        -1
    ] == pytest.approx(final)


@pytest.mark.quick
def test_plot_overlays_runs_of_tfloop_and_of_keras(train, tmp_path, capsys):
    import keras

    train("--quiet")
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    x, y = np.ones((8, 4), np.float32), np.zeros(8)
    model.fit(
        x,
        y,
        epochs=3,
        verbose=0,
        validation_data=(x, y),
        callbacks=[keras.callbacks.TensorBoard(tmp_path / "keras", write_graph=False)],
    )
    picture = tmp_path / "both.png"
    assert (
        main(
            [
                "plot",
                str(tmp_path / "digits-001"),
                str(tmp_path / "keras"),
                f"--out={picture}",
                "--reference=0.99",
            ]
        )
        == 0
    )
    assert tf.io.decode_png(picture.read_bytes()).shape == (504, 1320, 4)
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "keras"), "--out="]) == 2
    assert "--out: expected a PNG file" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "digits-001" / "checkpoints")]) == 2
    assert "holds no event files" in capsys.readouterr().err


def test_a_dry_run_does_a_step_of_everything_and_leaves_nothing(train, tmp_path, capsys):
    assert train("--dry_run", "--summaries=full", "--live_plot") == 0
    assert (
        "dry run: one step of 100 images, evaluation, summaries and checkpoint work"
        in capsys.readouterr().out
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["overfit", "--preset=digits", "--learning_rate=0.01"], 0, "32 examples memorised after "),
        (
            ["overfit", "--preset=digits", "--learning_rate=0", "--steps=3"],
            1,
            "32 examples NOT memorised after 3 steps",
        ),
        (
            ["parity", "--preset=digits", "--steps=2"],
            0,
            "host pipeline            the same, bit for bit",
        ),
        (
            ["check_gradients", "--preset=digits", "--conv=2", "--dense=3"],
            0,
            " gradients, 0 wrong; the worst error is ",
        ),
    ],
)
def test_checks_print_what_they_found(capsys, arguments, code, message):
    assert main(arguments) == code
    assert message in capsys.readouterr().out


def command(*arguments):
    """Exit code, standard output and standard error of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tfloop", *arguments], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def test_check_numerics_names_the_operation_and_the_layer(tmp_path):
    code, _, err = command(
        "train",
        "--preset=digits",
        "--learning_rate=1e10",
        "--check_numerics",
        "--batch_norm",
        f"--logdir={tmp_path}",
    )
    assert code == 3 and err.count("\n") == 1
    assert re.match(
        r"tfloop: step \d+: the (activations|gradients) of \w+ became NaN or infinite, first "
        r"in the operation \w+, at rate 1e\+10",
        err,
    ), err
    from tfloop.training import saved_run

    # Moving averages too are those before the step.
    _, state, _ = saved_run.open_run(tmp_path / "digits-001")
    assert all(
        np.isfinite(v).all() and np.abs(v).max() < 1e6
        for v in state.non_trainable.values()
        if int(state.global_step) < 2
    )


def test_the_debugger_dump_is_what_debugger_v2_reads(tmp_path):
    code, _, err = command(
        "train",
        "--preset=digits",
        "--conv=2",
        "--epochs=1",
        "--batch_size=400",
        "--summaries=none",
        f"--debugger_dump={tmp_path}/dump",
        f"--logdir={tmp_path}/runs",
    )
    assert code == 0, err
    from tensorflow.python.debug.lib.debug_events_reader import DebugDataReader

    with DebugDataReader(str(tmp_path / "dump")) as reader:
        reader.update()
        assert reader.num_executions() > 0 and reader.outermost_graphs()


def test_tensorboard_opens_on_a_folder_and_names_a_taken_port(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tfloop", "tensorboard", str(tmp_path), "--port=0"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        url = re.search(r"http://127.0.0.1:(\d+)/", process.stdout.readline())
        assert urllib.request.urlopen(url.group() + "data/runs").read() == b"[]"
        code, _, err = command("tensorboard", str(tmp_path), f"--port={url.group(1)}")
        assert (
            code == 2 and err.strip().endswith("it was already in use") and "Traceback" not in err
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()


def test_predict_names_pictures_that_do_not_fit(train, tmp_path, capsys):
    train("--quiet")
    (tmp_path / "p").mkdir()

    def predict():
        return (
            main(["predict", str(tmp_path / "digits-001"), str(tmp_path / "p")]),
            capsys.readouterr().err,
        )

    assert predict() == (
        2,
        f"tfloop: {tmp_path}/p: holds no pictures\n",
    )
    (tmp_path / "p" / "a.png").write_bytes(b"\x89PNG broken")
    code, err = predict()
    assert code == 2 and "a.png: cannot be read as a picture" in err
    (tmp_path / "p" / "a.png").write_bytes(tf.io.encode_png(np.zeros((9, 8, 1), np.uint8)).numpy())
    assert predict() == (2, f"tfloop: {tmp_path}/p/a.png: is 9×8×1, the model takes 8×8×1\n")
    for images, message in (
        (np.zeros((0, 8, 8), np.uint8), "holds no images"),
        (np.zeros((2, 8, 8)), "pixels are float32, the model was trained on uint8"),
        (np.zeros((2, 9, 8), np.uint8), "images are 9×8×1, the model takes 8×8×1"),
    ):
        np.savez(tmp_path / "a.npz", images=images)
        assert main(["predict", str(tmp_path / "digits-001"), str(tmp_path / "a.npz")]) == 2
        assert message in capsys.readouterr().err
    images, rows = np.arange(128).reshape(2, 8, 8), []
    for dtype in (np.uint8, np.int64):
        np.save(tmp_path / "a.npy", images.astype(dtype))
        assert main(["predict", str(tmp_path / "digits-001"), str(tmp_path / "a.npy")]) == 0
        rows.append(capsys.readouterr().out)
    assert rows[0] == rows[1]


@pytest.mark.quick
def test_divergence_is_exit_code_3_and_keeps_the_last_good_weights(train, tmp_path, capsys):
    assert train("--optimizer=sgd", "--learning_rate=1e20") == 3
    err = capsys.readouterr().err
    assert (
        err.startswith("tfloop: step ") and "became NaN or infinite" in err and err.count("\n") == 1
    )
    assert result(tmp_path / "digits-001")["diverged"]["layer"] in err
    assert main(["evaluate", str(tmp_path / "digits-001")]) == 0


@pytest.mark.quick
@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag(capsys, command):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS[command].settings:
        assert f"--{name}=" in out or f"--[no]{name}" in out
    assert all(len(line) < 170 for line in out.splitlines())


def test_help_and_version_do_not_import_tensorflow():
    code = (
        "import sys; from tfloop.cli import main; main([{!r}]); "
        "assert 'tensorflow' not in sys.modules, 'imported'"
    )
    for flag in ("--help", "--version"):
        subprocess.run([sys.executable, "-c", code.format(flag)], check=True, capture_output=True)


@pytest.mark.parametrize(
    "error", [MemoryError(), tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")]
)
def test_out_of_memory_is_one_line_and_exit_code_2(train, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("tfloop.training.session.make_loop", fail)
    assert train() == 2
    assert capsys.readouterr().err == "tfloop: out of memory; try a smaller model or --batch_size\n"


def test_every_setting_has_a_help_text():
    assert all(field.help for field in FIELDS.values())


def test_ctrl_c_ends_after_the_call_with_what_was_reached(tmp_path):
    """In a process of its own, as a user would: exit code 130, a result that says so, weights that
    load."""
    command = [
        sys.executable,
        "-m",
        "tfloop",
        "train",
        *SMALL,
        "--epochs=100000",
        f"--logdir={tmp_path}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    found = result(tmp_path / "digits-001")
    assert (
        not found["finished"]
        and 3 <= len(found["epochs"]) < 100000
        and "test accuracy" in out.splitlines()[-3]
    )
    assert (
        out.splitlines()[-1]
        == f"stopped after {found['steps']} steps; go on with --resume={tmp_path / 'digits-001'}"
    )
    assert main(["evaluate", str(tmp_path / "digits-001")]) == 0


def test_a_real_start_shows_nothing_of_tensorflows_own_messages(tmp_path):
    command = [sys.executable, "-m", "tfloop", "train", *SMALL, f"--logdir={tmp_path}"]
    environment = {
        key: value for key, value in __import__("os").environ.items() if not key.startswith("TF_")
    }
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert found.stderr == "" and len(found.stdout.splitlines()) == 6


def test_one_epoch_of_real_mnist_reaches_97_5_percent(tmp_path):
    assert main(["train", "--epochs=1", f"--logdir={tmp_path}", "--quiet"]) == 0
    found = result(tmp_path / "article2-001")
    assert found["steps"] == 938 and found["final"]["test"]["accuracy"] > 0.975


@pytest.mark.parametrize(
    "command",
    [["debug", "--break_if=False"], ["schedule", "--print"], ["parity", "--steps=1"]],
    ids=lambda c: c[0],
)
def test_commands_take_from_a_config_file_what_they_have_flags_for(tmp_path, capsys, command):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            dict(
                preset="digits",
                accumulate=2,
                strategy="multi_worker",
                epochs=1,
                conv=[2],
                dense=[3],
            )
        )
    )
    assert main([*command, f"--config={path}"]) == 0
