import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tfloop
from tfloop.cli import main
from tfloop.inspection.event_files import read_scalars
from tfloop.search import sweeps
from tfloop.training import session

SMALL = [
    "--preset=digits",
    "--conv=4,6",
    "--pool=2",
    "--dense=8",
    "--batch_size=100",
    "--validation_size=200",
]


@pytest.fixture
def sweep(tmp_path):
    """sweep(flag…): (exit code, folder)"""

    def run(*flags, number=1):
        return main(
            ["sweep", *SMALL, f"--logdir={tmp_path}", *flags]
        ), tmp_path / f"digits-sweep-{number:03d}"

    return run


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_grid_is_every_combination_in_order():
    assert sweeps.grid("l2=0,0.1 conv=32/64,8") == [
        {"l2": "0", "conv": "32,64"},
        {"l2": "0", "conv": "8"},
        {"l2": "0.1", "conv": "32,64"},
        {"l2": "0.1", "conv": "8"},
    ]


def test_random_draws_lie_in_their_spaces_and_repeat_with_their_seed():
    space = ["rate=log:1e-4:1e-2 momentum=lin:0:0.9", "dense=16,32 batch_size=lin:10:100"]
    draws = sweeps.random(400, space, seed=1)
    assert draws == sweeps.random(400, space, seed=1) != sweeps.random(400, space, seed=2)
    rates, momenta = (
        np.array([float(draw[name]) for draw in draws]) for name in ("learning_rate", "momentum")
    )
    assert (
        1e-4 <= rates.min() < 1.2e-4
        and 0.8e-2 < rates.max() <= 1e-2
        and abs(np.mean(np.log10(rates)) + 3) < 0.1
    )
    assert momenta.min() >= 0 and momenta.max() <= 0.9 and abs(momenta.mean() - 0.45) < 0.05
    assert {draw["dense"] for draw in draws} == {"16", "32"} and all(
        draw["batch_size"].isdecimal() for draw in draws
    )


@pytest.mark.parametrize("ensemble", ["1", "2"])
def test_every_trial_ends_as_a_run_of_its_own_would_and_the_step_is_traced_once(
    sweep, tmp_path, capsys, ensemble
):
    search = "l2=0,0.01 learning_rate=0.001,0.01 seed=0,3"
    code, folder = sweep(
        "--epochs=2",
        "--schedule=cosine",
        "--shards=1",
        f"--grid={search}",
        f"--ensemble={ensemble}",
    )
    assert (
        code == 0
        and "8 trials in" in (said := capsys.readouterr().out)
        and "the training step was traced 1 time" in said
    )
    trials = list(enumerate(sweeps.grid(search), start=1))
    for number, values in trials[::2] if ensemble == "1" else trials[1::3]:
        flags = dict(flag.removeprefix("--").split("=") for flag in SMALL)
        alone = session.train(
            tfloop.Config.make(
                flags.pop("preset"),
                **flags,
                **values,
                epochs=2,
                schedule="cosine",
                shards=1,
                quiet=True,
                logdir=str(tmp_path / "alone"),
                summaries="none",
            )
        )[0]
        trial = result(folder / f"trial-{number:03d}")
        assert trial["state_sha256"] == alone["state_sha256"] and trial["hyper"] == alone["hyper"]
        assert (
            trial["final"]["validation"] == alone["final"]["validation"]
            and "test" not in trial["final"]
        )


@pytest.mark.quick
def test_the_ranking_is_by_validation_over_seeds_and_only_the_chosen_sees_the_test_images(
    sweep, capsys, tmp_path
):
    code, folder = sweep("--epochs=2", "--grid=learning_rate=0.0001,0.003,0.01 seed=0,1")
    ranking = json.loads((folder / "ranking.json").read_text())
    accuracies = [row["value"] for row in ranking["ranking"]]
    assert code == 0 and accuracies == sorted(accuracies, reverse=True)
    for row in ranking["ranking"]:
        own = [result(folder / trial)["final"]["validation"]["accuracy"] for trial in row["trials"]]
        assert len(own) == 2 and row["value"] == np.mean(own)
    said = capsys.readouterr().out
    assert said.count("test accuracy") == 1 and len(ranking["chosen"]["test"]) == 2
    assert not any(scalar.run.startswith("test") for scalar in read_scalars(folder / "trial-001"))
    main(["evaluate", str(folder / ranking["ranking"][0]["trials"][0])])
    assert (
        f"accuracy {100 * ranking['chosen']['test'][0]['accuracy']:.2f} %"
        in capsys.readouterr().out
    )


def test_another_architecture_or_batch_is_traced_anew_once_and_says_so(sweep, capsys):
    code, _ = sweep("--epochs=1", "--grid=l1=0,0.001 dense=8,16 batch_size=50,100")
    assert code == 0
    said = capsys.readouterr().out
    assert (
        "8 trials of 1 epoch, 4 graphs to trace" in said
        and "the training step was traced 4 times" in said
    )


def test_a_trial_that_diverges_is_recorded_and_the_sweep_goes_on(sweep, capsys):
    code, folder = sweep("--epochs=1", "--grid=learning_rate=1e30,0.001")
    assert (
        code == 0
        and result(folder / "trial-001")["diverged"]
        and result(folder / "trial-002")["finished"]
    )
    ranking = json.loads((folder / "ranking.json").read_text())["ranking"]
    assert [row["diverged"] for row in ranking] == [False, True] and ranking[1]["value"] is None
    assert "diverged at step 0" in capsys.readouterr().out


def test_a_sweep_in_which_all_diverge_ends_with_3(sweep, capsys):
    assert (
        sweep("--epochs=1", "--grid=learning_rate=1e30,1e31")[0] == 3
        and "every trial diverged" in capsys.readouterr().out
    )


def test_halving_lets_the_better_third_go_on_to_the_length_of_an_undisturbed_run(sweep):
    assert (
        sweeps.rungs(9, 3) == [1, 3, 9]
        and sweeps.rungs(20, 3) == [2, 6, 20]
        and sweeps.rungs(5, 1) == [5]
        and sweeps.rungs(1, 2) == [1]
    )
    rates = "0.0001,0.0003,0.001,0.002,0.003,0.004,0.006,0.008,0.01"
    _, folder = sweep(
        "--epochs=9", "--schedule=cosine", f"--grid=learning_rate={rates}", "--halving=3"
    )
    done = [len(result(folder / f"trial-{number:03d}")["epochs"]) for number in range(1, 10)]
    assert sorted(done) == [1] * 6 + [3] * 2 + [9]
    best = done.index(9)
    _, whole = sweep(
        "--epochs=9",
        "--schedule=cosine",
        f"--grid=learning_rate={rates.split(',')[best]}",
        number=2,
    )
    assert (
        result(whole / "trial-001")["state_sha256"]
        == result(folder / f"trial-{best + 1:03d}")["state_sha256"]
    )


def test_an_interrupted_sweep_goes_on_where_it_was_finished_trials_untouched(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tfloop",
        "sweep",
        *SMALL,
        f"--logdir={tmp_path}",
        "--epochs=25",
        "--grid=learning_rate=0.001,0.002",
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "digits-sweep-001"
    while running.poll() is None and not list((folder / "trial-002").glob("checkpoints/*")):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert f"stopped; --resume={folder} goes on" in out
    finished = result(folder / "trial-001")
    when = os.stat(folder / "trial-001" / "result.json").st_mtime_ns
    second = result(folder / "trial-002")
    assert finished["finished"] and not second["finished"]
    assert not (folder / "ranking.json").exists()
    subprocess.run([*command, "--resume=auto"], check=True, capture_output=True)
    assert os.stat(folder / "trial-001" / "result.json").st_mtime_ns == when
    resumed = result(folder / "trial-002")
    assert resumed["resumed_at"] and (folder / "ranking.json").exists()
    flags = ["--epochs=25", "--learning_rate=0.002", "--name=alone", f"--logdir={tmp_path}"]
    subprocess.run([*command[:3], "train", *SMALL, *flags], check=True, capture_output=True)
    assert resumed["state_sha256"] == result(tmp_path / "alone-001")["state_sha256"]


@pytest.mark.quick
@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "choose --grid"),
        (["--grid=l2=1", "--random=2"], "choose --grid"),
        (["--grid=nothing=1"], "--grid: there is no setting 'nothing'"),
        (["--grid=optimizer=sgd,adam"], "--optimizer is not a number"),
        (["--grid=l2=,1"], "--l2: expected a number, found ''"),
        (["--grid=dense=-32"], "--dense=-32 is out of range"),
        (["--random=2", "l2=,"], "--l2: expected a number"),
        (["--random=2", "l2=lin:-1e308:1e308"], "expected l2=lin:LOW:HIGH"),
        (["--optimizer=adam", "--grid=momentum=0.1,0.9"], "momentum"),
        (["--grid=l2=0", "--name=../out"], "expected a plain name"),
        (["--grid=l2=0", "--halving=10"], "--halving=10 needs more epochs than 1"),
        (["--grid=keep=1,2"], "--keep cannot differ between trials"),
        (["--grid=validation_size=1,2"], "would not be compared on the same images"),
        (["--grid=l2"], "'l2': expected NAME=VALUES"),
        (["--grid=l2=0,x"], "--l2: expected a number, found 'x'"),
        (["--grid=l2=0,-1"], "--l2=-1.0 is out of range"),
        (["--grid=l2=1 l2=2"], "l2 comes twice"),
        (["--grid=l2=1", "l1=2"], "'l1=2' goes with --random"),
        (["--random=0", "l2=1,2"], "--random=0: expected a whole number, 1 or more"),
        (["--random=3"], "expected what to draw"),
        (["--random=3", "l2=log:0:1"], "l2=log:0:1: expected l2=log:LOW:HIGH"),
        (["--random=3", "l2=lin:1:x"], "expected l2=lin:LOW:HIGH"),
        (["--grid=kernel=3,9"], "--kernel: conv1 has a 9×9 kernel"),
        (["--grid=batch_size=100,5000"], "--batch_size=5000 is larger than"),
        (["--grid=l2=0", "--halving=x"], "--halving=x: expected a whole number"),
        (["--epochs=4", "--grid=epochs=1,2", "--halving=2"], "exclude each other"),
        (["--grid=l2=0", "--resume=auto"], "there is no unfinished digits-sweep"),
        (["--grid=l2=0", "--resume=/nowhere"], "/nowhere"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_before_the_first_trial(sweep, flags, message, capsys):
    code, folder = sweep("--epochs=1", *flags)
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not folder.exists()


def test_a_sweep_with_other_settings_is_not_continued(sweep, capsys):
    _, folder = sweep("--epochs=1", "--grid=l2=0,0.1")
    assert sweep("--epochs=1", "--grid=l2=0,0.2", f"--resume={folder}")[0] == 2
    assert re.search(r"--grid was 'l2=0,0.1', is 'l2=0,0.2'", capsys.readouterr().err)
    assert sweep("--epochs=1", "--l1=0.5", "--grid=l2=0,0.1", f"--resume={folder}")[0] == 2
    assert "--l1 was 0.0, is 0.5" in capsys.readouterr().err
    assert sweep("--epochs=1", "--grid=l2=0,0.1", f"--resume={folder}", "--keep=3")[0] == 0


def test_of_trials_of_different_lengths_the_more_accurate_is_better(sweep):
    """A rate at which nothing is learnt, for longer, is not better than a good one, for shorter."""
    _, folder = sweep("--grid=epochs=2,3 learning_rate=0.01,1e-9")
    ranking = json.loads((folder / "ranking.json").read_text())["ranking"]
    assert [row["values"]["learning_rate"] for row in ranking] == [0.01, 0.01, 1e-9, 1e-9]


def test_a_trial_that_settled_early_counts_and_one_that_halving_cut_off_comes_after_it(
    tmp_path,
):
    config = tfloop.Config.make("digits", epochs=9, validation_size=100)
    found = sweeps.trials(config, sweeps.grid("l2=0,1,2,3"), tmp_path)

    def epoch(accuracy):
        return {"epoch": 1, "step": 1, "validation": {"accuracy": accuracy, "data": 1.0}}

    for trial, finished, accuracies, diverged in zip(
        found,
        (True, True, False, False),
        ([0.8, 0.7], [0.5] * 9, [0.9] * 3, [0.9] * 4),
        (0, 0, 0, 1),
    ):
        trial.folder.mkdir()
        (trial.folder / "result.json").write_text(
            json.dumps(
                {
                    "finished": finished,
                    "diverged": {"step": 7} if diverged else None,
                    "seconds": {"training": 1.0},
                    "epochs": [epoch(accuracy) for accuracy in accuracies],
                }
            )
        )

    def order(*until):
        return [standing.trials[0].number for standing in sweeps.standings(found, *until)]

    assert order() == [1, 2, 3, 4]
    assert order(3) == [3, 4, 1, 2]  # as it was then: the fourth had not diverged yet


def test_equal_values_are_one_trial_and_unset_ones_can_be_searched(sweep, capsys):
    code, folder = sweep("--epochs=1", "--grid=l2=0,0.0 clip_norm=,1 ema=,0,0.5")
    said = capsys.readouterr().out
    assert (
        code == 0
        and "6 trials of 1 epoch, 4 graphs to trace; 6 left out that repeat another" in said
        and "traced 4 times" in said
    )
    hyper = [
        sorted({"clip_norm", "ema"} & set(result(folder / f"trial-{number:03d}")["hyper"]))
        for number in range(1, 7)
    ]
    assert hyper == [
        [],
        ["ema"],
        ["ema"],
        ["clip_norm"],
        ["clip_norm", "ema"],
        ["clip_norm", "ema"],
    ]


@pytest.mark.parametrize("pipeline", ["host", "prefetch"])
def test_after_a_trial_that_diverged_a_streamed_one_begins_at_its_first_batch(sweep, pipeline):
    code, folder = sweep("--epochs=1", f"--pipeline={pipeline}", "--grid=learning_rate=1e30,0.001")
    _, alone = sweep("--epochs=1", f"--pipeline={pipeline}", "--grid=learning_rate=0.001", number=2)
    assert (
        code == 0
        and result(folder / "trial-002")["state_sha256"]
        == result(alone / "trial-001")["state_sha256"]
    )


def test_halving_traces_each_structure_once_and_quiet_says_nothing(sweep, capsys):
    code, folder = sweep(
        "--epochs=4", "--halving=2", "--grid=dense=8,16 learning_rate=0.001,0.01", "--quiet"
    )
    assert code == 0 and json.loads((folder / "ranking.json").read_text())["traces"] == 2
    assert capsys.readouterr().out == ""


def test_a_trials_folder_with_other_settings_is_not_taken_for_it(sweep, capsys):
    _, folder = sweep("--epochs=1", "--grid=l2=0")
    settings = json.loads((folder / "trial-001" / "config.json").read_text())
    (folder / "trial-001" / "config.json").write_text(json.dumps(settings | {"l1": 0.5}))
    assert sweep("--epochs=1", "--grid=l2=0", f"--resume={folder}")[0] == 2
    assert "trial-001: is a run with other settings: --l1" in capsys.readouterr().err


@pytest.mark.quick
def test_each_trial_is_a_run_of_its_own_in_hparams(sweep):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    _, folder = sweep("--epochs=1", "--grid=l2=0,0.25")
    found = []
    for number in (1, 2):
        events = EventAccumulator(str(folder / f"trial-{number:03d}"))
        events.Reload()
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        found.append(
            metadata.parse_session_start_info_plugin_data(content).hparams["l2"].number_value
        )
    assert found == [0.0, 0.25]
