import json

import pytest

from tfloop import checkpoints
from tfloop.errors import UserError


@pytest.fixture
def saved(loop, tmp_path):
    """(the trained loop, its checkpoint)."""
    trained = loop(optimizer="nadam", batch_norm=True)
    trained.fit(1)
    return trained, checkpoints.save(trained.state, tmp_path, {"note": "one epoch"})


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
    assert manifest["note"] == "one epoch" and path.name == "step-00000015"
    assert sorted(manifest["sha256"]) == sorted(file.name for file in path.iterdir() if file.name != "manifest.json")


def test_a_checkpoint_of_the_same_step_is_replaced_and_the_newest_found(saved, tmp_path):
    trained, path = saved
    assert checkpoints.save(trained.state, tmp_path, {"note": "again"}) == path
    assert checkpoints.read_manifest(path)["note"] == "again"
    (tmp_path / "step-00000099.partial").mkdir()
    assert checkpoints.newest(tmp_path) == path


@pytest.mark.parametrize("damage, message", [
    (lambda path: (path / "state.index").unlink(), "state.index: missing or damaged"),
    (lambda path: (path / "state.index").write_bytes((path / "state.index").read_bytes()[:-1]), "state.index: missing or"),
    (lambda path: (path / "manifest.json").unlink(), "manifest.json: missing or damaged"),
    (lambda path: (path / "manifest.json").write_text("{}"), "manifest.json: missing or damaged"),
    (lambda path: (path / "manifest.json").write_text(json.dumps({"format": 99, "sha256": {}})), "has format 99"),
], ids=["gone", "short", "no manifest", "empty manifest", "format"])
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
