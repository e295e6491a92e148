"""A run that was stopped, by a signal, by SIGKILL or by a full disk, goes on as if nothing had
been."""

import ctypes
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tfloop
from tfloop import stopping
from tfloop.cli import main
from tfloop.errors import UserError
from tfloop.inspection.event_files import read_scalars
from tfloop.training import checkpoints, folders, session

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import kill

SMALL = [
    "--preset=digits",
    "--conv=4",
    "--dense=8",
    "--batch_size=100",
    "--epochs=3",
    "--steps_per_call=4",
    "--quiet",
]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def stop_after(count):
    """A `stop` that says yes when it is asked for the count-th time."""
    asked = []
    return lambda: asked.append(None) or len(asked) >= count


@pytest.fixture
def config(tmp_path):
    """config(l2=0.1, …): a small run with batch normalisation, dropout, penalties and a schedule,
    in tmp_path."""
    return lambda **settings: tfloop.Config.make(
        **{
            **dict(
                preset="digits",
                conv=(4,),
                dense=(8,),
                batch_size=100,
                epochs=3,
                steps_per_call=4,
                batch_norm=True,
                dropout=0.3,
                l2=1e-3,
                schedule="cosine",
                validation_size=100,
                checkpoint_every="5",
                logdir=str(tmp_path),
                quiet=True,
            ),
            **settings,
        }
    )


@pytest.fixture(scope="module")
def undisturbed():
    """pipeline, optimizer → what a run that nobody kills ends with."""
    known = {}

    def get(pipeline, optimizer):
        if (pipeline, optimizer) not in known:
            known[pipeline, optimizer] = kill.reference(pipeline, optimizer)
        return known[pipeline, optimizer]

    return get


@pytest.mark.parametrize(
    "case",
    [
        kill.Case(
            "resident",
            "nadam",
            (("writing a checkpoint", 17), ("a training call", 3)),
        ),
    ],
    ids=lambda case: case.kills[0][0],
)
def test_a_killed_run_ends_as_one_that_nobody_killed(undisturbed, case):
    _, killed, differs = kill.check(case, undisturbed(case.pipeline, case.optimizer))
    assert killed >= 1 and differs == []


def test_a_stopped_run_ends_as_one_that_went_through(config, monkeypatch):
    def without_time(r):
        return [
            {k: v for k, v in epoch.items() if k not in ("seconds", "steps")}
            for epoch in r["epochs"]
        ]

    def scalars(r):
        return sorted(
            (s.run, s.tag, s.step, s.value)
            for s in read_scalars(r["folder"])
            if not s.tag.startswith(("speed/", "memory/", "machine/"))
        )

    whole = session.train(config(optimizer="nadam", name="whole"))[0]
    monkeypatch.setattr(stopping, "LONGEST", 1e-9)  # every step, and batch, may be the last
    for stopped_at in (2, 12, 31, 47):
        own = config(optimizer="nadam", name=f"stopped-{stopped_at}")
        first = session.train(own, stop=stop_after(stopped_at))[0]
        assert not first["finished"] and first["steps"] < whole["steps"]
        second = session.train(own, resume=[Path(first["folder"])])[0]
        assert second["state_sha256"] == whole["state_sha256"] and second["finished"]
        assert second["resumed_at"] == [first["steps"]]
        assert without_time(second) == without_time(whole)
        assert scalars(second) == scalars(whole)


def test_where_and_how_it_runs_may_change_and_what_it_writes(config):
    first = session.train(config(), stop=stop_after(5))[0]
    folder = Path(first["folder"])
    new = folders.resumed(
        folder,
        tfloop.Config.make(),
        dict(pipeline="host", steps_per_call="9", summaries="none", checkpoint_every="epoch"),
        False,
    )
    again = session.train(new, resume=[folder])[0]
    assert (
        again["pipeline"] == "host"
        and again["state_sha256"] == session.train(config(name="w"))[0]["state_sha256"]
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    "given, message",
    [
        (
            dict(l2="0.1"),
            "--l2 is 0.001 in this run, not 0.1; that changes its mathematics: leave it out, "
            "or add --override",
        ),
        (
            dict(conv="8", seed="3"),
            "--conv is 4 in this run, not 8, --seed is 0 in this run, not 3",
        ),
        (
            dict(epochs="9"),
            "--epochs is 3 in this run, not 9",
        ),  # the cosine schedule is as long as the run
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(config, given, message):
    folder = folders.create(config())
    with pytest.raises(tfloop.UserError) as error:
        folders.resumed(folder, tfloop.Config.make(), given, override=False)
    assert message in error.value.as_flags
    folders.resumed(folder, tfloop.Config.make(), given, override=True)


def test_a_constant_rate_may_go_on_for_more_epochs(config):
    own = dict(schedule="constant")
    first = session.train(config(**own))[0]
    folder = Path(first["folder"])
    longer = folders.resumed(folder, tfloop.Config.make(), dict(epochs="5"), False)
    assert (
        session.train(longer, resume=[folder])[0]["state_sha256"]
        == session.train(config(epochs=5, name="w", **own))[0]["state_sha256"]
    )


def test_an_override_takes_the_new_number_from_there_on(config):
    first = session.train(config(schedule="constant"), stop=stop_after(5))[0]
    folder = Path(first["folder"])
    changed = folders.resumed(
        folder, tfloop.Config.make(), dict(learning_rate="0.5"), override=True
    )
    again = session.train(changed, resume=[folder])[0]
    assert again["hyper"]["learning_rate"] == 0.5
    assert json.loads((folder / "config.json").read_text())["learning_rate"] == 0.5
    rates = [s.value for s in read_scalars(folder) if s.tag == "learning_rate"]
    assert rates[0] == pytest.approx(0.001) and rates[-1] == pytest.approx(0.5)


def test_auto_passes_over_what_a_killed_process_left_and_names_what_was_lost(tmp_path):
    config = tfloop.Config.make("digits", logdir=str(tmp_path))
    begun = folders.create(config)
    left = tmp_path / "digits-002"
    left.mkdir()
    (left / "config.json.partial").touch()
    assert folders.newest_unfinished(config) == ([begun], 1)
    (left / "checkpoints").mkdir()
    with pytest.raises(UserError, match="digits-002, the newest, has no config.json"):
        folders.newest_unfinished(config)


def test_auto_goes_on_with_the_newest_unfinished_run_or_begins(tmp_path, capsys):
    flags = ["train", *SMALL, f"--logdir={tmp_path}", "--resume=auto"]
    assert main(flags) == 0 and main(flags) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-001", "digits-002"]
    (tmp_path / "digits-002" / "result.json").unlink()
    assert main(flags) == 0
    assert (
        result(tmp_path / "digits-002")["resumed_at"] == [45]
        and not (tmp_path / "digits-003").exists()
    )


@pytest.mark.parametrize(
    "asked",
    [
        [
            "--seeds=4,5,6",
            "--conv=4",
            "--dense=8",
            "--batch_size=100",
            "--epochs=3",
            "--steps_per_call=4",
        ],
        [],
    ],
    ids=["with the same flags", "with none"],
)
def test_auto_goes_on_with_all_runs_that_were_begun_together(config, tmp_path, asked):
    own = config(seeds=(4, 5, 6), shards=1)
    whole = session.train(own.replace(logdir=str(tmp_path / "whole")))
    first = session.train(own, stop=stop_after(48))
    assert [one["finished"] for one in first] == [True, False]
    there = [tmp_path / f"digits-{number:03d}" for number in (1, 2, 3)]
    before = {path: path.read_bytes() for path in there[0].rglob("*") if path.is_file()}
    assert (
        main(
            ["train", "--preset=digits", *asked, f"--logdir={tmp_path}", "--quiet", "--resume=auto"]
        )
        == 0
    )
    assert [result(path)["state_sha256"] for path in there] == [
        one["state_sha256"] for one in whole
    ]
    assert [result(path)["resumed_at"] for path in there] == [[], [first[1]["steps"]], []]
    assert {
        path: path.read_bytes() for path in there[0].rglob("*") if path.is_file()
    } == before  # what had finished
    assert folders.newest_unfinished(own) == ([], 1) and not (tmp_path / "digits-004").exists()


def test_what_was_begun_together_is_known_by_its_folders(config, tmp_path):
    asked = config(seeds=(3, 1, 2))
    first, other, last = made = folders.create_all(asked)
    assert all(
        folders.group_of(folder) == (made, 1) for folder in made
    ) and folders.newest_unfinished(asked) == (made, 1)
    again = folders.resumed_group(
        made, 1, config(), dict(epochs="3", pipeline="host"), override=False
    )
    assert again == asked.replace(pipeline="host")
    for folder in (first, last):
        (folder / "result.json").write_text('{"finished": true}')
    assert folders.newest_unfinished(asked) == (made, 1)
    (other / "result.json").write_text('{"finished": true}')
    assert folders.newest_unfinished(asked) == ([], 1)
    alone = folders.create(config(seed=9))
    assert folders.newest_unfinished(asked) == ([alone], 1)
    assert (
        main(
            [
                "train",
                "--preset=digits",
                "--seeds=1,2",
                "--epochs=1",
                "--quiet",
                f"--logdir={tmp_path}",
                "--resume=auto",
            ]
        )
        == 0
    )
    assert not (alone / "result.json").exists()  # that one was not asked for
    assert result(tmp_path / "digits-005")["config"]["seed"] == 1


def test_members_are_unfinished_until_they_were_judged_together(config):
    made = folders.create_all(config(ensemble=2))
    for folder in made:
        (folder / "result.json").write_text('{"finished": true}')
    assert folders.newest_unfinished(config(ensemble=2)) == (made, 2)
    (made[0] / "result.json").write_text('{"finished": true, "together": {}}')
    assert folders.newest_unfinished(config(ensemble=2)) == ([], 1)


@pytest.mark.parametrize(
    "flags, change, message",
    [
        (
            ["--seeds=0,1,2"],
            None,
            "have --seeds=0,1, not --seeds=0,1,2: go on with them first, or begin under "
            "another --name",
        ),
        (["--ensemble=2"], None, "have --seeds=0,1, not --seeds=0,1 --ensemble=2"),
        (
            ["--seeds=0,1", "--l2=0.1"],
            None,
            "--l2 is 0.001 in this run, not 0.1; that changes its mathematics",
        ),
        ([], dict(l2=0.5), "digits-002: has another --l2 than"),
        ([], "{}", "group.json: cannot be read; go on with one run: --resume="),
        (
            [],
            '{"folders": ["digits-001", "digits-002"], "ensemble": 0}',
            "group.json: cannot be read",
        ),
        ([], '{"folders": ["digits-001"], "ensemble": 1}', "group.json: cannot be read"),
    ],
    ids=[
        "other seeds",
        "side by side",
        "other mathematics",
        "one was changed",
        "damaged",
        "none at a time",
        "not its own",
    ],
)
def test_a_group_that_cannot_go_on_says_why(config, tmp_path, capsys, flags, change, message):
    made = folders.create_all(config(seeds=(0, 1)))
    if isinstance(change, str):
        (made[1] / "group.json").write_text(change)
    elif change:
        folders.write(made[1] / "config.json", config(seed=1, **change).to_json())
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", "--preset=digits", *flags, f"--logdir={tmp_path}", "--resume=auto"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.quick
def test_a_finished_run_is_left_as_it_is(tmp_path, capsys):
    main(["train", *SMALL, f"--logdir={tmp_path}"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(["train", f"--resume={tmp_path}/digits-001"]) == 0
    assert "is finished, after 3 epochs" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.quick
def test_a_run_whose_checkpoints_are_all_damaged_is_never_begun_again(tmp_path, capsys):
    main(["train", *SMALL, f"--logdir={tmp_path}"])
    (tmp_path / "digits-001" / "result.json").unlink()
    for manifest in tmp_path.rglob("manifest.json"):
        manifest.write_text("{")
    weights = {path: path.read_bytes() for path in tmp_path.rglob("*tfevents*")}
    assert main(["train", f"--resume={tmp_path}/digits-001"]) == 2
    assert "every checkpoint is damaged: " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*tfevents*")} == weights


@pytest.mark.parametrize(
    "change, flags, message",
    [
        (
            lambda run: shutil.rmtree(run / "checkpoints"),
            ["--epochs=9"],
            "made 45 steps, but .* holds no checkpoint of them; put them back",
        ),
        (
            lambda run: (run / "result.json").unlink(),
            ["--epochs=2"],
            "has made 3 epochs, more than --epochs=2",
        ),
        (
            lambda run: (run / "config.json").write_text('{"epoch": 3}'),
            [],
            "digits-001/config.json: there is no setting 'epoch'",
        ),
        (
            lambda run: (run / "config.json").write_text('{"epochs": "many"}'),
            ["--epochs=9"],
            "digits-001/config.json: --epochs: expected a whole",
        ),
        (
            lambda run: (run / "config.json").write_text("{"),
            [],
            "tfloop: /[^=]*digits-001/config.json: not JSON",
        ),
    ],
)
def test_a_run_that_cannot_go_on_is_left_as_it_is(tmp_path, capsys, change, flags, message):
    main(["train", *SMALL, f"--logdir={tmp_path}"])
    change(tmp_path / "digits-001")
    before, _ = (
        {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()},
        capsys.readouterr(),
    )
    assert main(["train", f"--resume={tmp_path}/digits-001", *flags]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--resume=/nowhere"], "/nowhere: does not exist; a run's folder is needed"),
        (
            ["--resume=runs/a", "--seeds=1,2"],
            "--resume=runs/a goes on with one run: leave --seeds, --runs and --ensemble out "
            "(or --ensemble=1), or",
        ),
        (["--resume=auto", "--dry_run"], "--resume and --dry_run exclude each other"),
        (
            ["--checkpoint_every=soon"],
            "--checkpoint_every=soon: expected epoch, a number of steps, or of seconds",
        ),
        (["--checkpoint_every=0"], "--checkpoint_every=0: expected epoch"),
        (["--keep=0"], "--keep=0 is out of range"),
    ],
)
def test_mistakes_are_one_line(capsys, flags, message):
    assert main(["train", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_the_best_checkpoint_by_validation_is_kept(config):
    done = session.train(
        config(epochs=6, keep=1, checkpoint_every="epoch", learning_rate=0.05, schedule="constant")
    )[0]
    best = done["best"]
    accuracies = [epoch["validation"]["accuracy"] for epoch in done["epochs"]]
    assert best["value"] == max(accuracies) and best["epoch"] == 1 + accuracies.index(
        max(accuracies)
    )
    from tfloop.training import saved_run

    _, state, manifest = saved_run.open_run(done["folder"], best=True)
    assert int(state.epoch) == best["epoch"] and manifest["reached"]["best"] == best


def start(tmp_path, *flags, **options):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tfloop",
            "train",
            "--preset=digits",
            "--epochs=100000",
            "--nofast",
            f"--logdir={tmp_path}",
            *flags,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_signal_ends_the_run_with_a_checkpoint_within_five_seconds(tmp_path):
    process = start(tmp_path)
    while "epoch 2/" not in process.stdout.readline():
        pass
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert time.monotonic() - asked < 5 and process.returncode == 143
    found = result(tmp_path / "digits-001")
    assert not found["finished"] and found["epochs"]
    from tfloop.training import checkpoints

    assert checkpoints.newest(tmp_path / "digits-001" / "checkpoints")[0].name.endswith(
        f"{found['steps']:08d}"
    )


def test_a_second_process_on_the_same_run_is_refused_and_a_crash_leaves_no_lock(tmp_path):
    process = start(tmp_path)
    while "epoch 1/" not in process.stdout.readline():
        pass
    try:
        second = subprocess.run(
            [sys.executable, "-m", "tfloop", "train", f"--resume={tmp_path}/digits-001"],
            text=True,
            capture_output=True,
        )
        assert second.returncode == 2 and second.stderr.endswith(
            "digits-001: another process trains this run; wait for it, or end it\n"
        )
    finally:
        process.kill()
        process.wait()
    with folders.locked(tmp_path / "digits-001"):
        pass


@pytest.mark.parametrize("limit", [2_000, 40_000])
def test_a_disk_that_is_full_stops_training_with_the_reason_and_keeps_what_is_there(
    tmp_path, limit
):
    """A limit on the size of files stands in for the end of the disk."""
    process = start(
        tmp_path,
        "--epochs=400",
        "--checkpoint_every=30",
        preexec_fn=lambda: (
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        ),
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err[-2000:]
    assert "cannot be written: " in err and "Traceback" not in err and err.count("\n") <= 2
    from tfloop.training import checkpoints

    folder = tmp_path / "digits-001" / "checkpoints"
    for path in checkpoints.all_in(folder):
        checkpoints.read_manifest(path)


def obey_permissions():
    """Root, too, then may write only where the permissions say so: without the capability
    CAP_DAC_OVERRIDE."""
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def test_early_stopping_ends_a_run_after_epochs_without_a_better_validation_accuracy_resumed_or_not(
    config, capsys
):
    settings = dict(
        early_stopping=2,
        epochs=30,
        learning_rate=0.02,
        ema=0.9,
        precision="mixed_float16",
        augment_shift=1,
        quiet=False,
    )
    whole = session.train(config(**settings))[0]
    accuracies = [epoch["validation"]["accuracy"] for epoch in whole["epochs"]]
    assert (
        whole["finished"]
        and len(accuracies) < 30
        and len(accuracies) == 1 + accuracies.index(max(accuracies)) + 2
    )
    assert re.search(
        r"stopped early: no better validation accuracy for 2 epochs; the best, .* %, was "
        r"that of epoch \d+: evaluate .* --best",
        capsys.readouterr().out,
    )
    cut = session.train(config(**settings), stop=stop_after(9))[0]
    assert (
        f"stopped after {cut['steps']} steps; go on with --resume={cut['folder']}"
        in capsys.readouterr().out
    )
    resumed = session.train(config(**settings), resume=[Path(cut["folder"])])[0]
    assert resumed["state_sha256"] == whole["state_sha256"]
    assert len(resumed["epochs"]) == len(accuracies)
    # Nothing is left to do.
    again = session.train(config(**settings), resume=[Path(cut["folder"])])[0]
    assert again["state_sha256"] == whole["state_sha256"]
    assert len(again["epochs"]) == len(accuracies)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="only Linux lets root give up the right to write everywhere",
)
@pytest.mark.parametrize(
    "locked, message",
    [
        (
            "checkpoints",
            r"00000\d-step-\d+: cannot be written: Permission denied; the last checkpoint is",
        ),
        (".", "--resume=.* is not writable"),
    ],
    ids=["checkpoints", "run"],
)
def test_a_folder_that_became_read_only_stops_training_with_the_reason(config, locked, message):
    folder = Path(session.train(config(), stop=stop_after(11))[0]["folder"])
    (folder / locked).chmod(0o500)
    done = subprocess.run(
        [sys.executable, "-m", "tfloop", "train", f"--resume={folder}"],
        capture_output=True,
        text=True,
        preexec_fn=obey_permissions,
    )
    (folder / locked).chmod(0o700)
    assert (
        done.returncode == 2 and re.search(message, done.stderr) and done.stderr.count("\n") == 1
    ), done.stderr
    checkpoints.newest(folder / "checkpoints")


def test_a_diverging_run_is_rewound_at_half_the_rate_a_bounded_number_of_times(config, capsys):
    hopeless = config(learning_rate=1e30, schedule="constant", on_nan="rewind")
    with pytest.raises(tfloop.DivergenceError):
        session.train(hopeless)
    err = capsys.readouterr().err
    assert (
        err.count("times the rate") == 3
        and "back to step 0, with 0.125 times the rate (3 of at most 3 times)" in err
    )
    found = result(Path(hopeless.logdir) / "digits-001")
    assert found["rewinds"] == [0, 0, 0] and found["diverged"]["step"] == 0


@pytest.mark.quick
def test_a_run_rewound_to_a_checkpoint_goes_on_from_there(config, monkeypatch, capsys):
    """The rate is spoiled once, after the first checkpoint, so that the next step diverges."""
    from tfloop.loop import Loop

    spoilt, pending = [], Loop.pending

    def spoiling(self, epochs):
        for record in pending(self, epochs):
            yield record
            if getattr(record, "step", 0) >= 10 and not spoilt:
                spoilt.append(record.step)
                self.state.hyper["learning_rate"].assign(1e30)

    monkeypatch.setattr(Loop, "pending", spoiling)
    done = session.train(config(schedule="constant", on_nan="rewind"))[0]
    assert (
        done["finished"]
        and len(done["rewinds"]) == 1
        and done["hyper"]["learning_rate"] == pytest.approx(0.0005)
    )
    assert (
        "back to step 10, with 0.5 times the rate (1 of at most 3 times)" in capsys.readouterr().err
    )
    steps = [
        s.step for s in read_scalars(done["folder"]) if (s.run, s.tag) == ("train", "accuracy")
    ]
    assert steps == sorted(set(steps)) and steps[-1] == done["steps"]


def test_deterministic_runs_are_bit_equal(tmp_path):
    sums = []
    for flag in ("--deterministic", "--deterministic"):
        done = subprocess.run(
            [sys.executable, "-m", "tfloop", "train", *SMALL, f"--logdir={tmp_path}", flag],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        sums.append(result(max(tmp_path.iterdir()))["state_sha256"])
    assert len(set(sums)) == 1


def test_with_early_stopping_a_finished_run_goes_on_where_it_had_not_settled(config, capsys):
    first = session.train(config(early_stopping=5, epochs=2))[0]
    assert main(["train", f"--resume={first['folder']}", "--epochs=4", "--override"]) == 0
    assert len(json.loads((Path(first["folder"]) / "result.json").read_text())["epochs"]) == 4


@pytest.mark.parametrize(
    "given",
    [dict(ema=0.9), dict(clip_norm=1.0), dict(augment_shift=1), dict(precision="mixed_float16")],
    ids=str,
)
def test_with_an_override_a_run_goes_on_with_what_it_did_not_have(config, given):
    settings = dict(validation_size=0, batch_norm=False, dropout=0.0)
    first = session.train(config(epochs=2, **settings))[0]
    resumed = session.train(config(epochs=6, **settings, **given), resume=[Path(first["folder"])])[
        0
    ]
    assert resumed["finished"] and resumed["resumed_at"] == [first["steps"]]
    assert resumed["final"]["test"]["total"] < first["final"]["test"]["total"]
