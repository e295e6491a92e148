import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfloop
from tfloop.errors import UserError
from tfloop.training import checkpoints, manifests, run
from tfloop.training.checkpoints import Checkpoints


@pytest.fixture
def saved(loop, tmp_path):
    """(the trained loop, its checkpoint)."""
    trained = loop(optimizer="nadam", batch_norm=True)
    trained.fit(1)
    return trained, Checkpoints(trained.state, tmp_path).save({"note": "one epoch"})


@pytest.mark.quick
def test_restoring_gives_the_whole_state_back_bit_for_bit(loop, saved):
    trained, path = saved
    other = loop(optimizer="nadam", batch_norm=True, seed=9)
    assert other.state.digest() != trained.state.digest()
    checkpoints.restore(other.state, path)
    assert other.state.digest() == trained.state.digest()
    assert other.fit(2).train == trained.fit(2).train


def test_the_manifest_says_what_it_was_told_and_the_sums_of_the_files(saved):
    _, path = saved
    manifest = checkpoints.read_manifest(path)
    assert manifest["note"] == "one epoch" and path.name == "000001-step-00000015"
    assert sorted(manifest["sha256"]) == sorted(
        file.name for file in path.iterdir() if file.name != "manifest.json"
    )


def test_a_checkpoint_of_the_same_step_stands_beside_the_one_before(saved, tmp_path):
    trained, path = saved
    again = Checkpoints(trained.state, tmp_path).save({"note": "again"})
    assert again.name == "000002-step-00000015" and path.is_dir()
    assert checkpoints.newest(tmp_path)[1]["note"] == "again"


def test_only_the_newest_and_the_best_are_kept(saved, tmp_path):
    trained, path = saved
    several = Checkpoints(trained.state, tmp_path, keep=2)
    made = [several.save({}, best=path.name).name for _ in range(4)]
    assert [found.name for found in checkpoints.all_in(tmp_path)] == [made[3], made[2], path.name]
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(
        [made[3], made[2], path.name]
    )


def test_numbers_of_more_than_six_digits_are_the_newest(saved, tmp_path):
    trained, path = saved
    path.rename(tmp_path / "999999-step-00000015")
    several = Checkpoints(trained.state, tmp_path, keep=2)
    made = [several.save({}).name for _ in range(3)]
    assert made[0] == "1000000-step-00000015"
    assert [found.name for found in checkpoints.all_in(tmp_path)] == [made[2], made[1]]


def test_nothing_is_written_or_removed_through_a_link(saved, tmp_path):
    trained, path = saved
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(UserError, match="link: has become a link"):
        Checkpoints(trained.state, link, keep=1).save({})
    assert checkpoints.all_in(tmp_path) == [path]


def test_a_manifest_of_right_sums_and_impossible_content_is_damaged(saved, tmp_path):
    reached = {"epochs": [], "seconds": {}, "resumed_at": []}
    for entries in (
        {"reached": {**reached, "seconds": {"training": float("nan")}}},
        {"reached": {**reached, "seconds": {"training": 10**400}}},
        {"fingerprint": 10**30},
        {"part": {"steps": 1, "sums": [], "worst": "much"}},
    ):
        path = Checkpoints(saved[0].state, tmp_path).save(entries)
        with pytest.raises(manifests.DamagedCheckpoint, match="damaged"):
            checkpoints.read_manifest(path)


def test_files_that_the_manifest_does_not_name_are_damage(saved, tmp_path):
    """TensorFlow would read them unchecked, and wait for a pipe."""
    _, path = saved
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256_of_this"], manifest["sha256"]["state.index"]
    (path / "state.index").unlink()
    os.mkfifo(path / "state.index")
    for sums in (manifest["sha256"], {}):
        manifest["sha256"] = sums
        text = json.dumps({**manifest, "sha256_of_this": manifests.sum_of(manifest)})
        (path / "manifest.json").write_text(text)
        with pytest.raises(manifests.DamagedCheckpoint, match="does not name the files beside it"):
            checkpoints.read_manifest(path)


def test_a_call_that_is_not_the_loops_is_refused(saved):
    trained, path = saved
    sums = [float("nan")] * trained.state.totals.shape[0]  # as of a metric without a value
    good = {"steps": 1, "sums": sums}
    assert run.call_part({"part": good}, path, trained).steps == 1
    for part in ({"steps": 1, "sums": [1.0]}, {"steps": 10**9, "sums": []}):
        with pytest.raises(UserError, match="names another call than the run's"):
            run.call_part({"part": part}, path, trained)


def test_what_a_killed_process_left_is_cleared_away(saved, tmp_path):
    trained, path = saved
    for left in ("000002-step-00000099.partial", "000000-step-00000001.deleted"):
        (tmp_path / left).mkdir()
    assert checkpoints.newest(tmp_path)[0] == path
    made = Checkpoints(trained.state, tmp_path).save({})
    assert sorted(tmp_path.iterdir()) == [path, made]


@pytest.mark.quick
def test_a_damaged_one_is_named_and_the_one_before_taken(saved, tmp_path):
    trained, path = saved
    newer = Checkpoints(trained.state, tmp_path).save({})
    data = newer / "state.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:100] + b"x" + data.read_bytes()[101:])
    warnings = []
    assert checkpoints.newest(tmp_path, warnings.append)[0] == path
    assert len(warnings) == 1 and str(data) in warnings[0] and "damaged" in warnings[0]
    (path / "manifest.json").write_text(
        (path / "manifest.json").read_text().replace("one epoch", "two epoch")
    )
    with pytest.raises(
        UserError, match="every checkpoint is damaged: 000002-step-00000015, 000001-step-00000015"
    ):
        checkpoints.newest(tmp_path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: (path / "state.index").unlink(), "state.index: missing or damaged"),
        (
            lambda path: (path / "state.index").write_bytes(
                (path / "state.index").read_bytes()[:-1]
            ),
            "state.index: missing or",
        ),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json: missing or damaged"),
        (
            lambda path: (path / "manifest.json").write_text("{}"),
            "manifest.json: missing or damaged",
        ),
        (
            lambda path: (path / "manifest.json").write_text(
                json.dumps({"format": 99, "sha256": {}})
            ),
            "has format 99, this version of tfloop reads 2",
        ),
    ],
    ids=["gone", "short", "no manifest", "empty manifest", "format"],
)
def test_damage_is_named(saved, damage, message):
    _, path = saved
    damage(path)
    with pytest.raises(UserError, match=message):
        checkpoints.read_manifest(path)


def test_another_models_checkpoint_is_refused(loop, saved):
    with pytest.raises(UserError, match="is not of this model and optimizer"):
        checkpoints.restore(loop(optimizer="nadam", batch_norm=True, dense=(9,)).state, saved[1])
    with pytest.raises(UserError, match="is not of this model and optimizer"):
        checkpoints.restore(loop(optimizer="sgd", batch_norm=True).state, saved[1])


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoints.newest(tmp_path)


def test_slots_that_an_earlier_version_kept_in_one_vector_are_read(tmp_path, digits):
    """Before large weights had slots of their own."""

    def make():
        model = keras.Sequential(
            [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(1100), layers.Dense(10)]
        )
        return tfloop.TrainState(model, tfloop.Optimizer("adam"), 0.01)

    state, random = make(), np.random.default_rng(0)
    size = sum(weight.shape.num_elements() for weight in state.weights.values())
    whole = {name: random.normal(size=size).astype("f4") for name in ("momentum", "mean_square")}
    names = {name: v for name, v in state.named().items() if not name.startswith("slots/")}
    old = {f"slots/{name}": tf.Variable(value) for name, value in whole.items()}
    tf.train.Checkpoint(state={**names, **old}).write(str(tmp_path / "state"))

    other = make()
    checkpoints.restore(other, tmp_path)
    slots = other.optimizer.slots
    for name, value in whole.items():
        large = next(v for key, v in slots.items() if key.startswith(f"{name}/"))
        np.testing.assert_array_equal(large, value[: 64 * 1100])
        np.testing.assert_array_equal(slots[name], value[64 * 1100 :])
