"""Ends that are not clean: readers and terminals that go away, folders that are removed, signals
before there is anything to save."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest

import tfloop
from tfloop import scratch, stopping
from tfloop.errors import UserError
from tfloop.training import folders, session

TRAIN = ["train", "--preset=digits", "--conv=4", "--dense=8", "--summaries=none"]


def run(*arguments, **options):
    defaults = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        [sys.executable, "-m", "tfloop", *map(str, arguments)], **{**defaults, **options}
    )


def result(folder):
    return json.loads((folder / "digits-001" / "result.json").read_text())


def test_training_goes_on_when_the_reader_of_its_output_is_gone(tmp_path):
    process = run(*TRAIN, "--epochs=3", f"--logdir={tmp_path}")
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0 and result(tmp_path)["finished"]


def test_what_only_prints_ends_quietly_when_its_reader_is_gone(tmp_path):
    session.train(tfloop.Config.make("digits", epochs=1, logdir=str(tmp_path), quiet=True))
    read, write = os.pipe()
    os.close(read)
    process = run("scalars", tmp_path / "digits-001", stdout=write)
    os.close(write)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0


def test_closed_streams_and_ascii_ones_are_no_reason_to_fail(tmp_path):
    command = f"{sys.executable} -m tfloop {' '.join(TRAIN)} --epochs=1 --logdir={tmp_path}"
    closed = subprocess.run(["sh", "-c", f"{command} --name=closed 2>&- >&- <&-"])
    assert closed.returncode == 0 and (tmp_path / "closed-001" / "result.json").exists()
    plain = run(
        *TRAIN,
        "--epochs=1",
        f"--logdir={tmp_path}",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    out, error = plain.communicate(timeout=60)
    assert plain.returncode == 0 and "of 8x8x1, 10 classes" in out, error


def test_a_terminal_that_closes_ends_the_run_with_a_checkpoint(tmp_path):
    """The system then sends SIGHUP, and every write fails."""
    leader, follower = pty.openpty()
    process = run(
        *TRAIN,
        "--epochs=100000",
        f"--logdir={tmp_path}",
        stdout=follower,
        stderr=follower,
        stdin=follower,
        start_new_session=True,
    )
    os.close(follower)
    while b"epoch 2/" not in os.read(leader, 1000):
        pass
    asked = time.monotonic()
    os.close(leader)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 129 and time.monotonic() - asked < 5
    found = result(tmp_path)
    assert not found["finished"] and list((tmp_path / "digits-001" / "checkpoints").iterdir())


SLEEP = "import pathlib, time; pathlib.Path({!r}).touch(); time.sleep(60)"
LOST = "try: exec({!r})\nexcept BaseException: raise SystemError('bad argument')"


@pytest.mark.parametrize(
    "package, stand_in, command",
    [
        ("absl", "exec({!r})", TRAIN),
        ("tensorflow", "exec({!r})", TRAIN),
        ("tensorflow", LOST, TRAIN),
        ("tensorflow", LOST, ["pack", "digits", "/nowhere"]),
    ],
)
def test_ctrl_c_while_a_package_is_imported_is_one_line(tmp_path, package, stand_in, command):
    """Also amid code that runs from a string, after which `python -m` would end by the signal, and
    amid code in C, which makes another error of it."""
    imported = tmp_path / "imported"
    (tmp_path / package).mkdir()
    content = stand_in.format(SLEEP.format(str(imported)))
    (tmp_path / package / "__init__.py").write_text(content)
    process = run(*command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    while not imported.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "tfloop: interrupted\n")


def test_ctrl_c_before_a_run_has_begun_is_one_line_and_leaves_no_folder(tmp_path):
    process = run(*TRAIN, f"--logdir={tmp_path}/runs")
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "tfloop: interrupted\n")
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_asked_to_end_while_it_is_traced_ends_at_once(tmp_path, monkeypatch):
    """The signal's handler raises StopAsked: nothing has changed yet, and what there is is kept."""
    config = tfloop.Config.make("digits", epochs=1, logdir=str(tmp_path), quiet=True)
    before = tfloop.make_loop(config).state.digest()

    def interrupt(*_):
        assert stopping.is_interruptible()
        raise stopping.StopAsked(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("tfloop.loop.Loop.train_steps", interrupt)
        [found] = session.train(config)
    assert found["steps"] == 0 and found["state_sha256"] == before
    [resumed] = session.train(config, resume=[tmp_path / "digits-001"])
    [whole] = session.train(config)
    assert resumed["finished"] and resumed["state_sha256"] == whole["state_sha256"]


def test_a_dry_run_that_is_asked_to_end_ends(tmp_path, monkeypatch):
    def interrupt(*_):
        raise stopping.StopAsked(signal.SIGTERM)

    config = tfloop.Config.make("digits", logdir=str(tmp_path), quiet=True)
    monkeypatch.setattr("tfloop.loop.Loop.train_steps", interrupt)
    session.dry_run(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("became", [None, SystemError("bad argument"), UserError("no model")])
def test_a_signal_that_other_code_loses_or_makes_another_error_of_still_breaks_off(became):
    """As TensorFlow's C code does: `any(...)` over a list amid tracing gives SystemError."""
    with pytest.raises(stopping.StopAsked) as raised, stopping.interruptible():
        try:
            stopping.break_off(signal.SIGTERM)
        except BaseException:
            if became:
                raise became from None
    assert raised.value.signal == signal.SIGTERM
    with stopping.interruptible():
        pass  # said once


@pytest.mark.parametrize("what", ["", "config.json"], ids=["folder", "config.json"])
def test_a_folder_that_is_removed_while_it_is_trained_in_is_said_and_not_made_again(tmp_path, what):
    config = tfloop.Config.make(
        "digits", epochs=9, logdir=str(tmp_path), quiet=True, summaries="none"
    )
    folder = tmp_path / "digits-001"
    asked = []

    def remove():
        asked.append(None)
        if len(asked) == 9:
            shutil.rmtree(folder) if not what else (folder / what).unlink()

    with pytest.raises(UserError, match=r"digits-001: the folder, or its config.json, was removed"):
        session.train(config, stop=remove)
    assert not (folder / "config.json").exists() and (what or not folder.exists())


@pytest.mark.parametrize("name", ["checkpoints", "lock", "train", "result.json.partial"])
def test_a_run_with_links_is_not_trained_and_what_they_point_to_is_left_alone(tmp_path, name):
    config = tfloop.Config.make("digits", epochs=1, logdir=str(tmp_path / "runs"), quiet=True)
    session.train(config)
    folder = tmp_path / "runs" / "digits-001"
    victim = tmp_path / "victim"
    if (folder / name).is_dir():
        shutil.move(folder / name, victim)
    else:
        (folder / name).unlink(missing_ok=True)
        victim.write_text("mine")
    before = {path: path.read_bytes() for path in [victim, *victim.rglob("*")] if path.is_file()}
    (folder / name).symlink_to(victim)
    with pytest.raises(UserError, match=f"{name}: is a link, to"):
        session.train(config.replace(epochs=2), resume=[folder])
    assert before == {path: path.read_bytes() for path in before}


def test_a_group_is_of_runs_in_one_folder(tmp_path):
    config = tfloop.Config.make("digits", logdir=str(tmp_path))
    folder = folders.create(config)
    for other in ("/etc/run", "../run", ".."):
        folders.write_json(folder / "group.json", {"folders": [folder.name, other], "ensemble": 1})
        with pytest.raises(UserError, match=r"group.json: cannot be read"):
            folders.group_of(folder)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(tmp_path):
    left = tmp_path / ".export-left"
    left.mkdir()
    with scratch.folder(tmp_path, ".export-") as one:
        assert not left.exists()
        with scratch.folder(tmp_path, ".export-") as other:
            assert one.exists() and other.exists()
    assert not list(tmp_path.iterdir())
