"""Any step of a run again, bit for bit, and the place where two runs part."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tfloop.cli import main
from tfloop.config import Config
from tfloop.errors import DivergenceError, UserError
from tfloop.history import difference, side
from tfloop.history.records import Records
from tfloop.history.replay import Replay, go_to, told
from tfloop.training import checkpoints, manifests
from tfloop.training.session import train

SMALL = dict(conv=(4, 6), pool=(2,), dense=(8,), batch_size=100, epochs=3, steps_per_call=4)
RICH = dict(
    SMALL,
    augment_shift=1.0,
    dropout=0.3,
    ema=0.9,
    batch_norm=True,
    l2=0.001,
    precision="mixed_float16",
)
STEPS = 15  # of an epoch


def made(folder, **settings):
    """The folder of a run that was trained to its end."""
    config = Config.make("digits", logdir=str(folder), quiet=True, **{**SMALL, **settings})
    (result,) = train(config)
    return result["folder"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs"))


def result_of(folder):
    """What its result.json holds."""
    return json.loads((Path(folder) / "result.json").read_text())


def replayed(folder, at):
    """A replay that was taken to a step, and what is told of it."""
    records = Records(folder)
    replay = Replay(records, records.trained_by({}))
    go_to(replay, records.step_of(at), at == "spike")
    return replay, list(told(replay))


@pytest.mark.quick
@pytest.mark.parametrize("at", ["21", "epoch:2", "last", "0"])
def test_any_step_of_a_run_is_that_of_the_run(run, at):
    replay, lines = replayed(run, at)
    step = {"epoch:2": STEPS, "last": 3 * STEPS - 1}.get(at) or int(at)
    assert replay.step == step and lines[0].startswith(f"step {step} (epoch {step // STEPS + 1}")
    assert re.fullmatch(r"(all )?\d+ recorded calls? on the way: the same, bit for bit", lines[-1])
    assert not replay.differing


@pytest.mark.parametrize(
    "settings", [RICH, {**SMALL, "schedule": "plateau", "validation_size": 200}]
)
def test_so_is_one_with_all_that_is_random_or_kept(tmp_path, settings):
    folder = made(tmp_path, **settings)
    shutil.rmtree(f"{folder}/checkpoints")  # from the start
    replay, lines = replayed(folder, "35")
    assert lines[-1].startswith("all ") and replay.start == 0


@pytest.mark.quick
def test_a_step_is_that_of_a_plain_loop(run):
    """The loss of step 20 is that of one run of single steps, which nobody put into calls."""
    _, lines = replayed(run, "20")
    records = Records(run)
    plain = Replay(records, records.trained_by({"steps_per_call": 1}))
    plain.begin(0, None)
    losses = [call.train.total for call in plain.calls(21)]
    assert f"loss {losses[20]:.9g}" in lines[0]
    for point in records.points:
        worst = max(losses[point.first : point.last], default=0.0)
        assert point.last > 21 or point.worst == np.float32(worst)


def test_the_state_reached_is_that_of_the_checkpoint(run):
    records = Records(run)
    (step, path), *_ = records.checkpoints()
    replay = Replay(records, records.trained_by({}))
    replay.begin(0, None)
    replay.to(step)
    here = replay.loop.state.digest()
    replay.begin(step, path)
    assert replay.loop.state.digest() == here


def test_a_run_that_was_rewound_is_followed_on_its_last_way(tmp_path):
    settings = dict(SMALL, learning_rate=1e20, optimizer="sgd", on_nan="rewind", keep=20)
    config = Config.make("digits", logdir=str(tmp_path), quiet=True, **settings)
    try:
        train(config)
    except Exception as error:
        assert "step" in str(error)
    result = result_of(tmp_path / "digits-001")
    assert result["rewinds"] and len(result["rewound_to"]) == len(result["rewinds"])
    records = Records(tmp_path / "digits-001")
    assert records.factor_at(result["rewound_to"][-1]) == 0.5 ** len(result["rewinds"])
    if records.steps > 1:
        _, lines = replayed(tmp_path / "digits-001", "1")
        assert "differ" not in lines[-1]


def with_a_fault(folder):
    """Digits, of which one has pixels far out of range."""
    from tfloop.data.sources import load

    data = load("digits")
    images = data.train.inputs.astype(np.float32)
    images[123] = 1e4
    path = f"{folder}/data.npz"
    np.savez(
        path,
        x_train=images,
        y_train=data.train.targets,
        x_test=data.test.inputs.astype(np.float32),
        y_test=data.test.targets,
    )
    return path


def test_a_planted_fault_is_found_where_the_loss_jumps(tmp_path, capsys):
    from tfloop.inspection.showing import show

    folder = made(tmp_path, dataset=with_a_fault(tmp_path), optimizer="sgd", learning_rate=0.01)
    replay, _ = replayed(folder, "spike")
    batch = replay.loop.batch(int(replay.loop.state.batch_index))
    place = int(np.argmax(batch.inputs.numpy().max(axis=(1, 2, 3))))
    assert batch.inputs.numpy().max() == 1e4
    assert f"image {place}, farthest from the mean" in show(batch.inputs)
    assert "to 10000" in show(batch.inputs)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("45", "has no step 45; its steps are 0 to 44"),
        ("epoch:4", "has no step 45; its steps are 0 to 44"),
        ("epoch:0", "has no step -15"),
        ("diverged", "did not diverge; try --at=spike"),
        ("9" * 5000, "expected a step"),
        ("soon", "expected a step, 0 or more, epoch:N, last, diverged or spike"),
    ],
)
def test_a_step_that_was_not_made_is_told(run, at, message):
    with pytest.raises(UserError) as found:
        Records(run).step_of(at)
    assert message in found.value.as_flags


@pytest.mark.quick
def test_other_data_and_other_settings_are_refused(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "digits-001")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "fingerprint": 1}))
    records = Records(folder)
    with pytest.raises(UserError, match="does not hold what the run was trained on"):
        Replay(records, records.trained_by({}))
    with pytest.raises(UserError, match="is trained again as it was; leave out l2"):
        records.trained_by({"l2": 0.5})


def test_a_run_whose_settings_were_changed_is_replayed_from_there_on(tmp_path):
    folder = made(tmp_path, epochs=1)
    more = ["--epochs=3", "--learning_rate=0.01", "--override", "--quiet"]
    assert main(["train", f"--resume={folder}", *more]) == 0
    _, lines = replayed(folder, "35")
    assert lines[-1].startswith("all ")
    with pytest.raises(UserError, match="override changed its settings at step 15"):
        Records(folder).start_for(5)


def test_a_step_before_the_settings_were_changed_is_refused(tmp_path):
    """Although a checkpoint before it is kept, which was made with other settings."""
    folder = made(tmp_path, epochs=2, keep=20)
    more = ["--epochs=3", "--learning_rate=0.01", "--override", "--quiet"]
    assert main(["train", f"--resume={folder}", *more]) == 0
    for step in (5, 20):
        with pytest.raises(UserError, match="override changed its settings at step 30"):
            Records(folder).start_for(step)
    _, lines = replayed(folder, "35")
    assert lines[-1].endswith("the same, bit for bit")
    for path in dict(Records(folder).checkpoints()).values():  # stopped before its next checkpoint
        if path.name.endswith("45"):
            shutil.rmtree(path)
    os.unlink(f"{folder}/result.json")
    assert Records(folder).overridden_at() == 30


def test_an_evaluation_at_the_very_step_is_made_where_the_schedule_goes_by_it(tmp_path):
    settings = dict(schedule="plateau", plateau_patience=1, plateau_factor=0.1, keep=20)
    settings |= dict(choose_by="test loss", evaluate_every="5", learning_rate=0.2)
    folder = made(tmp_path, **settings)
    assert result_of(folder)["epochs"][-1]["learning_rate"] < 0.1  # it fell
    records = Records(folder)
    replay = Replay(records, records.trained_by({}))
    replay.begin(0, None)
    for step in range(5, 46, 5):  # stop at each of them, and go on
        replay.to(step)
    assert replay.compared > 10 and not replay.differing


def test_a_run_that_diverged_is_replayed_to_its_end(tmp_path, capsys):
    config = Config.make("digits", logdir=str(tmp_path), **SMALL).replace(
        optimizer="sgd", learning_rate=1e20, quiet=True
    )
    with pytest.raises(DivergenceError):
        train(config)
    folder = tmp_path / "digits-001"
    if Records(folder).steps:
        assert main(["replay", str(folder)]) == 0
    assert Records(folder).step_of("diverged") == Records(folder).steps


def test_a_replay_may_not_lie_where_the_runs_own_events_are(run, capsys):
    assert main(["replay", str(run), "--from=40", f"--out={run}/mine"]) == 2
    assert "lies in the run's own folder" in capsys.readouterr().err
    assert not Path(run, "mine").exists()


@pytest.mark.usefixtures("here")
def test_runs_of_other_lengths_are_not_equal(run, tmp_path, capsys):
    code, text = diff(run, made(tmp_path, epochs=2), capsys=capsys)
    assert code == 1 and "one made 45 steps, the other 30" in text
    assert re.search(r"trained again, side by side, \d+ steps: equal, bit for bit", text)


@pytest.mark.in_full
def test_a_run_resumed_with_other_shards_is_not_accused(tmp_path, run, capsys):
    folder = made(tmp_path, epochs=1, keep=20, shards=1)
    assert main(["train", f"--resume={folder}", "--epochs=3", "--shards=3", "--quiet"]) == 0
    _, text = diff(run, folder, "--steps=1", capsys=capsys)
    assert "something changed it there" not in text


@pytest.mark.usefixtures("here")
def test_where_one_diverges_the_part_that_differs_is_told(run, capsys):
    code, text = diff(run, "--with=--learning_rate=1e30", "--steps=5", capsys=capsys)
    assert code == 1 and "step 0 is the first that differs: first in its update" in text
    assert "diverged at step" in text


def test_the_command_replays_a_stretch_with_histograms(run, tmp_path, capsys):
    from tfloop.inspection.event_files import event_paths

    copy = shutil.copytree(run, tmp_path / "digits-001")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert main(["replay", str(copy), "--from=epoch:3", "--summaries=full"]) == 0
    told = capsys.readouterr().out
    assert "the state at step 45 equals the run's checkpoint" in told
    assert "4 calls compared" in told and "all the same, bit for bit" in told
    assert all(path.read_bytes() == content for path, content in before.items())
    assert event_paths(copy / "replay-30-45")
    assert main(["replay", str(copy), "--from=epoch:3"]) == 2
    assert "replay-30-45: is not empty" in capsys.readouterr().err
    assert main(["replay", str(copy), "--from=2", "--to=6", "--histograms"]) == 0
    assert event_paths(copy / "replay-2-6" / "train")


def test_a_replay_is_not_cut_off_when_the_run_goes_on(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "digits-001")
    assert main(["replay", str(copy), "--from=epoch:3", "--quiet"]) == 0
    kept = sorted((copy / "replay-30-45").rglob("*tfevents*"))
    assert main(["train", f"--resume={copy}", "--epochs=4", "--quiet"]) == 0
    assert kept and all(path.is_file() for path in kept)


class Here:
    """A side in this process: what its own would answer, without the seconds that one takes to
    start."""

    def __init__(self, *arguments):
        self._answers, self._asked = side.Answers(*arguments), None

    def ask(self, method, *arguments):
        self._asked = method, arguments

    def answer(self):
        try:
            return getattr(self._answers, self._asked[0])(*self._asked[1])
        except DivergenceError as error:
            raise UserError(error.as_flags) from None

    def do(self, method, *arguments):
        self.ask(method, *arguments)
        return self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(difference, "Side", Here)


def diff(*arguments, capsys):
    """(exit code, output) of the command."""
    code = main(["diff", *map(str, arguments)])
    return code, capsys.readouterr().out


@pytest.mark.quick
def test_a_run_twice_is_equal_bit_for_bit(run, tmp_path, capsys):
    code, text = diff(run, made(tmp_path), capsys=capsys)
    assert code == 0 and text.endswith("equal, bit for bit\n") and "settings: the same" in text


@pytest.mark.usefixtures("here")
def test_other_seeds_part_in_the_weights_they_begin_with(run, tmp_path, capsys):
    code, text = diff(run, made(tmp_path, seed=1), "--steps=2", capsys=capsys)
    assert code == 1 and "--seed: 0 | 1" in text
    assert "step 0 is the first that differs: first in its weights conv1/kernel" in text


@pytest.mark.usefixtures("here")
def test_another_rate_parts_in_the_first_update(run, tmp_path, capsys):
    code, text = diff(run, made(tmp_path, learning_rate=0.002), "--steps=2", capsys=capsys)
    assert code == 1 and "--learning_rate: 0.001 | 0.002" in text
    assert "from step 0 on, where the weights of both are equal" in text
    assert "step 0 is the first that differs: first in its update conv1/kernel" in text


def test_other_flags_of_the_machine_differ_in_the_last_bits(run, tmp_path, capsys):
    path = tmp_path / "growth.png"
    code, text = diff(
        run, "--with=--nofast --shards=1", f"--plot={path}", "--steps=10", capsys=capsys
    )
    found = re.search(r"first in its (\w+) (\S+), by (\d+) units? in the last place", text)
    assert code == 1 and found and int(found[3]) < 1000
    rows = [line.split() for line in text.splitlines() if re.match(r" +\d+ ", line)]
    assert [row[0] for row in rows] == ["1", "2", "5", "10"] and path.is_file()
    assert 0 < float(rows[0][1]) < 1e-5


def change_a_bit(folder, step, name):
    """Change one entry of a weight in a checkpoint by one unit in the last place."""
    records = Records(folder)
    path = dict(records.checkpoints())[step]
    replay = Replay(records, records.trained_by({}))
    manifest = manifests.read_manifest(path)
    replay.begin(step, path)
    state = replay.loop.state
    value = state.weights[name].numpy()
    value.flat[3] = np.nextafter(value.flat[3], np.float32(9))
    state.weights[name].assign(value)
    shutil.rmtree(path)
    about = {
        key: part
        for key, part in manifest.items()
        if key not in ("format", "sha256", "without_gradient")
    }
    checkpoints.Checkpoints(state, path.parent)._write(path, about)


@pytest.mark.usefixtures("here")
def test_a_weight_changed_in_its_last_bit_is_found(tmp_path, capsys):
    first = made(tmp_path, keep=20, checkpoint_every="8")
    second = shutil.copytree(first, tmp_path / "digits-002")
    os.unlink(second / "result.json")
    for step, path in Records(second).checkpoints():
        if step > 16:
            shutil.rmtree(path)
    change_a_bit(second, 16, "dense1/kernel")
    assert main(["train", f"--resume={second}", "--quiet"]) == 0
    code, text = diff(first, second, "--steps=2", capsys=capsys)
    assert code == 1, text
    assert (
        "its checkpoint at step 16 is not what its steps lead to here: weights dense1/kernel "
        "differ, by 1 unit in the last place; something changed it there" in text
    )


@pytest.mark.usefixtures("here")
def test_models_that_differ_are_told_by_a_weight(run, tmp_path, capsys):
    code, text = diff(run, made(tmp_path, dense=(9,)), capsys=capsys)
    assert code == 1 and "the models differ, first in dense1/bias" in text


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected RUN RUN; found 0 folders"),
        (["a", "b", "--with=--nofast"], "expected RUN --with='--flag=value …'; found 2 folders"),
        (["RUN", "--with=nofast"], "'nofast' is no flag"),
        (["RUN", "--with=--speed=3"], "--speed is no setting of train"),
        (["RUN", "--with=--l2"], "--l2 needs a value"),
        (["RUN", "--with=--seed='1"], "no closing quotation"),
        (["RUN", "--with=--strategy=mirrored --replicas=2"], "--strategy does not count"),
        (["RUN", "--with=--preset=article2"], "--preset does not count"),
        (["RUN", "--with=--l2=much"], "--l2: expected a number, found 'much'"),
        (["RUN", "nowhere"], "nowhere: does not exist"),
        (["RUN", "RUN", "--tolerance=some"], "--tolerance=some: expected a number, 0 or more"),
    ],
)
def test_what_cannot_be_compared_is_one_line(run, capsys, arguments, message):
    named = [str(run) if argument == "RUN" else argument for argument in arguments]
    assert main(["diff", *named]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_side_that_dies_is_told(run):
    from tfloop.history.side import Side

    with Side(str(run), {}, {}) as side:
        side.do("about")
        side._process.kill()
        with pytest.raises(UserError, match="ended with -9"):
            side.do("digest")


@pytest.mark.quick
def test_the_first_that_differs_is_the_first_that_is_computed():
    from tfloop.history.side import Part

    first = [Part("batch", "inputs", b"1"), Part("activation", "a", b"1"), Part("loss", "x", b"1")]
    second = [Part("loss", "x", b"2"), Part("activation", "a", b"2"), Part("batch", "inputs", b"1")]
    assert next(difference._that_differ(first, second)) == ("activation", "a")


@pytest.mark.quick
def test_evaluations_carry_the_digest_of_the_weights(run):
    result = result_of(run)
    assert result["epochs"][-1]["weights_sha256"] == result["weights_sha256"]
    assert len({epoch["weights_sha256"] for epoch in result["epochs"]}) == 3
    from tfloop.inspection.event_files import _events, own_events

    texts = [
        value.tensor.string_val[0].decode()
        for path in own_events(run)
        for event in _events(path)
        for value in event.summary.value
        if value.tag == "weights_sha256/text_summary" or value.tag == "weights_sha256"
    ]
    assert result["weights_sha256"] in texts


@pytest.mark.quick
def test_numbers_of_runs_as_a_table(run, capsys):
    folder = os.path.dirname(run)
    assert main(["scalars", "--hparams", "--format=json", folder]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    result = result_of(run)
    assert row["test/accuracy"] == result["final"]["test"]["accuracy"]
    assert row["learning_rate"] == 0.001 and row["conv"] == "4,6" and row["finished"] is True
    assert main(["scalars", "--hparams", folder]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.startswith("run,preset,") and line.startswith(str(run))


def test_tensors_are_compared_by_what_both_have():
    small, large = np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)
    first, second = difference._common(small, large)
    assert first.shape == second.shape == (2, 3)
    assert difference._common(small, np.ones(3, np.float32)) is None
