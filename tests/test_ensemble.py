import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tfloop
from tfloop.cli import main
from tfloop.training import ensemble, session

SMALL = dict(
    preset="digits",
    conv=(4, 6),
    pool=(2,),
    dense=(8,),
    batch_size=100,
    shards=1,
    quiet=True,
    summaries="none",
)


def results(folder):
    return [
        json.loads((path / "result.json").read_text())
        for path in sorted(folder.iterdir())
        if path.is_dir()
    ]


@pytest.mark.parametrize(
    "settings",
    [
        dict(batch_norm=True, dropout=0.2, augment_shift=1, ema=0.9),
        pytest.param(dict(pipeline="prefetch"), marks=pytest.mark.in_full),
    ],
    ids=str,
)
def test_each_of_several_models_side_by_side_ends_as_it_does_alone(tmp_path, settings):
    for name, members in (("alone", 1), ("beside", 3)):
        session.train(
            tfloop.Config.make(
                **SMALL,
                **settings,
                epochs=3,
                seeds=(3, 4, 5),
                ensemble=members,
                logdir=str(tmp_path / name),
            )
        )
    alone, beside = results(tmp_path / "alone"), results(tmp_path / "beside")
    assert len(alone) == len(beside) == 3
    for one, other in zip(alone, beside):
        assert (
            one["state_sha256"] == other["state_sha256"]
            and one["final"]["test"] == other["final"]["test"]
        )
    assert len({one["weights_sha256"] for one in beside}) == 3
    assert all(one["traces"]["train"] == 1 for one in beside)


@pytest.mark.quick
def test_members_have_seeds_of_their_own_and_the_mean_of_their_probabilities_is_judged(
    tmp_path, capsys, digits
):
    config = tfloop.Config.make(
        **SMALL | dict(quiet=False), epochs=6, seed=7, ensemble=2, logdir=str(tmp_path)
    )
    trained = session.train(config)
    assert [one["config"]["seed"] for one in trained] == [7, 8] and all(
        one["config"]["ensemble"] == 1 for one in trained
    )
    found = results(tmp_path)[0]["together"]
    assert found["folders"] == ["digits-001", "digits-002"]
    capsys.readouterr()
    assert main(["evaluate", *(str(tmp_path / name) for name in found["folders"])]) == 0
    said = capsys.readouterr().out
    assert (
        f"2 together, by the mean of their probabilities: accuracy "
        f"{100 * found['test_accuracy']:.2f} %" in said
    )
    mean = np.mean(
        [
            tfloop.predict(tfloop.open_run(tmp_path / name)[1], digits.test.inputs)
            for name in found["folders"]
        ],
        axis=0,
    )
    assert np.mean(mean.argmax(axis=1) == digits.test.targets) == found["test_accuracy"]


def test_more_seeds_than_members_go_in_turns_with_one_trace(tmp_path):
    trained = session.train(
        tfloop.Config.make(**SMALL, epochs=1, seeds=(0, 1, 2), ensemble=2, logdir=str(tmp_path))
    )
    assert [one["config"]["seed"] for one in trained] == [0, 1, 2] and trained[2]["traces"][
        "train"
    ] == 1


def test_members_that_were_stopped_go_on_as_if_nothing_had_been(tmp_path):
    settings = SMALL | dict(epochs=4, ensemble=3, steps_per_call=4, checkpoint_every="4")
    session.train(tfloop.Config.make(**settings, logdir=str(tmp_path / "whole")))
    asked = []
    cut = session.train(
        tfloop.Config.make(**settings, logdir=str(tmp_path / "cut")),
        stop=lambda: asked.append(None) or len(asked) > 19,
    )
    assert (
        not any(one["finished"] for one in cut) and "together" not in results(tmp_path / "cut")[0]
    )
    # One of them is further behind.
    shutil.rmtree(max((tmp_path / "cut" / "digits-002" / "checkpoints").glob("0*")))
    flags = [
        f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in settings.items()
        if value is not True
    ]
    assert main(["train", *flags, "--quiet", f"--logdir={tmp_path / 'cut'}", "--resume=auto"]) == 0
    whole, again = results(tmp_path / "whole"), results(tmp_path / "cut")
    assert [one["state_sha256"] for one in again] == [one["state_sha256"] for one in whole]
    assert (
        again[0]["together"] == whole[0]["together"]
        and len({one["resumed_at"][0] for one in again}) > 1
    )


def test_a_member_that_had_finished_is_left_as_it_is_and_judged_with_the_others(tmp_path):
    config = tfloop.Config.make(
        **SMALL | dict(summaries="default"), epochs=2, ensemble=2, logdir=str(tmp_path)
    )
    whole = session.train(config)
    there, before = [Path(one["folder"]) for one in whole], results(tmp_path)
    shutil.rmtree(max((there[1] / "checkpoints").glob("0*")))
    (
        there[1] / "result.json"
    ).unlink()  # as if it had been killed while it wrote its last checkpoint

    def files():
        return {
            path: path.read_bytes()
            for path in there[0].rglob("*")
            if path.is_file() and path.name != "result.json"
        }

    kept = files()
    again = session.train(config, resume=there)
    assert again[1]["state_sha256"] == whole[1]["state_sha256"] and again[1]["resumed_at"] == [15]
    assert (
        files() == kept
        and results(tmp_path)[0] == before[0]
        and results(tmp_path)[1]["together"] == before[1]["together"]
    )
    for folder in there:  # or after the last result.json, before they were judged
        found = json.loads((folder / "result.json").read_text())
        del found["together"]
        (folder / "result.json").write_text(json.dumps(found))
    assert (
        session.train(config, resume=there)[1]["resumed_at"] == [15]
        and results(tmp_path)[0] == before[0]
    )


def to_the_end(trainings, make):
    """Make the calls of all trainings together; each one's end."""
    together = ensemble.Together(trainings)
    for calls in together:
        with calls:
            make(calls)
    return together.ends


def test_steps_can_be_made_beside_a_model_that_is_at_the_end_of_its_epoch(loop):
    alone = loop(seed=2, shards=1).fit(1)
    loops = [loop(seed=1, shards=1), loop(seed=2, shards=1)]
    loops[0].state.batch_index.assign(loops[0].steps)  # as after a call whose evaluation diverged
    beside = ensemble.SideBySide(loops)
    for record in loops[1].pending(1):
        if isinstance(record, tfloop.loop.PendingCall):
            beside.make([record])
    assert record.test == alone.test and int(loops[0].state.batch_index) == loops[0].steps


@pytest.mark.quick
def test_a_member_that_diverges_ends_and_the_others_go_on(tmp_path, loop):
    loops = [loop(seed=1, shards=1), loop(seed=2, shards=1)]
    alone = loop(seed=2, shards=1).fit(2)
    loops[0].state.hyper["learning_rate"].assign(1e30)
    beside = ensemble.SideBySide(loops)

    def train(one):
        for record in one.pending(2):
            if isinstance(record, tfloop.loop.PendingCall):
                yield record
        return record

    ends = to_the_end([train(one) for one in loops], beside.make)
    assert isinstance(ends[0], tfloop.DivergenceError) and ends[1].test == alone.test


def test_a_member_that_diverges_in_a_later_epoch_ends_the_program_with_3_when_the_others_are_done(
    tmp_path, capsys
):
    code = main(
        [
            "train",
            "--preset=digits",
            "--conv=4,6",
            "--pool=2",
            "--dense=8",
            "--batch_size=100",
            "--epochs=4",
            "--ensemble=2",
            "--summaries=none",
            "--schedule=piecewise",
            "--boundaries=20",
            "--rates=1e30",
            f"--logdir={tmp_path}",
            "--quiet",
        ]
    )
    err = capsys.readouterr().err
    assert code == 3 and err.startswith("tfloop: step 2") and err.count("\n") == 1
    assert [bool(one["diverged"]) for one in results(tmp_path)] == [
        True,
        True,
    ] and "together" not in results(tmp_path)[0]


def test_side_by_side_begins_a_pipeline_once_an_epoch(tmp_path, monkeypatch):
    begun, begin = [], tfloop.data.pipelines.Resident.begin
    monkeypatch.setattr(
        tfloop.data.pipelines.Resident,
        "begin",
        lambda self, *where: begun.append(self) or begin(self, *where),
    )
    session.train(
        tfloop.Config.make(**SMALL, epochs=3, ensemble=2, steps_per_call=2, logdir=str(tmp_path))
    )
    assert len(begun) == 2 * (3 + 1)  # and once to warm up


def test_members_share_one_copy_of_the_images(loop, digits):
    one, other = (
        tfloop.make_loop(tfloop.Config.make("digits", seed=seed), digits) for seed in (1, 2)
    )
    assert one.pipeline._inputs is other.pipeline._inputs


@pytest.mark.quick
def test_what_fails_in_a_call_is_raised_in_the_training_that_waits_for_it(loop):
    closed = []

    def train(one):
        try:
            yield from one.pending(1)
        finally:
            closed.append(one)

    def fail(calls):
        raise tfloop.UserError("no such image")

    one = loop()
    with pytest.raises(tfloop.UserError, match="no such image"):
        to_the_end([train(one)], fail)
    assert closed == [one]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--ensemble=2", "--runs=2"], "--ensemble=2 and --runs exclude each other"),
        (["--ensemble=2", "--on_nan=rewind"], "a model that diverges ends"),
        (["--ensemble=2", "--eager"], "--ensemble=2 and --eager exclude each other"),
    ],
)
def test_what_an_ensemble_cannot_do_is_said(flags, message, capsys, tmp_path):
    assert main(["train", "--preset=digits", *flags, f"--logdir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


def test_the_last_of_the_seeds_may_be_fewer_than_the_ensemble(tmp_path, capsys):
    flags = ["--preset=digits", "--conv=4", "--dense=8", "--batch_size=200", "--epochs=1"]
    seeds = ["--ensemble=3", "--seeds=0,1,2,3,4", f"--logdir={tmp_path}"]
    assert main(["train", *flags, *seeds]) == 0
    out = capsys.readouterr().out
    assert "3 together: test accuracy" in out and "2 together: test accuracy" in out
    assert "5 runs: test accuracy" in out
    assert [len(one["together"]["folders"]) for one in results(tmp_path)] == [3, 3, 3, 2, 2]


def test_trainings_that_are_left_close_their_files_at_once(loop):
    closed = []

    def train(one):
        try:
            yield from one.pending(1)
        finally:
            closed.append(one)

    loops = [loop(seed=1), loop(seed=2)]
    together = ensemble.Together([train(one) for one in loops])
    next(together)
    together.close()
    assert closed == loops
