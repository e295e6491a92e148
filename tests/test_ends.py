"""Ends that are not clean: readers and terminals that go away, folders that are removed, signals
before there is anything to save."""

import contextlib
import errno
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import tensorflow as tf

import tfloop
from tfloop import cli, plain_files, scratch, stopping
from tfloop.commands import command
from tfloop.commands.command import Stop
from tfloop.errors import UserError
from tfloop.history import stretch
from tfloop.machine import arithmetic, devices, guardian
from tfloop.training import code, folders, session

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


def test_a_folder_that_is_a_link_is_not_trained_in(tmp_path):
    """A stranger's folder would have a run elsewhere trained, and its checkpoints removed."""
    config = tfloop.Config.make("digits", epochs=1, logdir=str(tmp_path), quiet=True)
    own = folders.create(config)
    link = tmp_path / "link-001"
    link.symlink_to(own)
    with pytest.raises(UserError, match=f"link-001: is a link; name .* folder: {own.resolve()}"):
        session.train(config, resume=[link])
    assert [path.name for path in own.iterdir()] == ["config.json"]


def test_a_run_is_locked_also_where_its_lock_was_removed(tmp_path):
    folder = folders.create(tfloop.Config.make("digits", logdir=str(tmp_path)))
    with folders.locked(folder):
        (folder / "lock").unlink()
        with pytest.raises(UserError, match="another process trains"), folders.locked(folder):
            pass
    with folders.locked(folder):
        pass


@pytest.fixture
def stop():
    before = {number: signal.signal(number, signal.SIG_DFL) for number in guardian.SIGNALS}
    asked = Stop()
    yield asked
    for number, handler in before.items():
        signal.signal(number, handler)


def send_together(*numbers):
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


@pytest.mark.parametrize("second", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_signals_that_come_together_are_one_question(stop, monkeypatch, second):
    assert not stop.asked()
    send_together(signal.SIGTERM, second)
    assert stop.asked() and stop.code() in (128 + signal.SIGTERM, 128 + second)
    killed = []
    monkeypatch.setattr(command.os, "kill", lambda _, number: killed.append(number))
    monkeypatch.setattr(stopping, "AT_ONCE", 0.0)
    signal.raise_signal(signal.SIGHUP)  # a terminal that closes may say it twice
    signal.raise_signal(second)
    assert killed == ([] if second == signal.SIGHUP else [second])


def test_a_group_is_of_runs_in_one_folder(tmp_path):
    config = tfloop.Config.make("digits", logdir=str(tmp_path))
    folder = folders.create(config)
    for other in ("/etc/run", "../run", ".."):
        folders.write_json(folder / "group.json", {"folders": [folder.name, other], "ensemble": 1})
        with pytest.raises(UserError, match=r"group.json: cannot be read"):
            folders.group_of(folder)
    folders.write_json(folder / "group.json", {"folders": [folder.name] * 2, "ensemble": 1})
    with pytest.raises(UserError, match=r"group.json: cannot be read"):
        folders.group_of(folder)


@pytest.mark.parametrize("name", ["config.json", "result.json", "group.json"])
def test_a_pipe_or_a_device_in_a_runs_folder_is_not_waited_for(tmp_path, name):
    folder = folders.create(tfloop.Config.make("digits", logdir=str(tmp_path)))
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        if name == "result.json":  # as one that was cut off, it is written again
            assert folders.result(folder) == {}
        else:
            with pytest.raises(UserError, match=f"{name}: cannot be read|it has no {name}"):
                (folders.group_of if name == "group.json" else folders.config_of)(folder)


def test_the_shells_own_pipe_is_read_and_a_named_one_is_not(tmp_path):
    read, write = os.pipe()
    os.write(write, b'{"epochs": 2}')
    os.close(write)
    assert tfloop.Config.read(f"/dev/fd/{read}") == {"epochs": 2}
    os.close(read)
    os.mkfifo(tmp_path / "pipe")
    for flag in ("--config", "--flagfile"):
        code, said = main_says("train", f"{flag}={tmp_path}/pipe")
        assert code == 2 and "pipe: cannot be read: it is no plain file" in said


def test_flagfiles_that_lead_to_very_many_are_refused(tmp_path):
    for number in range(9):  # each names the next one twice: 2⁹ in all
        following = f"--flagfile={tmp_path}/{number + 1}\n"
        (tmp_path / str(number)).write_text(2 * following)
    (tmp_path / "9").write_text("--quiet\n")
    code, said = main_says("train", f"--flagfile={tmp_path}/0")
    assert code == 2 and "leads to more than 100 files" in said


def test_a_user_without_a_home_has_no_place_for_notes(monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(devices.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    code.note(["model.py:make"])
    assert code._noted() == set() and arithmetic.peak() > 0


def test_the_ends_of_lines_are_those_of_python(tmp_path):
    """The digest of a user's file was taken so, whatever system wrote it."""
    path = tmp_path / "model.py"
    path.write_bytes(b"a = 1\r\nb = 2\rc = 3\n")
    assert plain_files.read_text(path) == path.read_text() == "a = 1\nb = 2\nc = 3\n"


def main_says(*arguments):
    """(exit code, what goes to standard error) of the command."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        return cli.main(list(arguments)), error.getvalue()


class Gone(io.StringIO):
    """Standard output whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)


def test_the_exit_code_is_that_of_the_command_also_where_its_reader_is_gone(monkeypatch):
    said = command.Command(lambda *_: print("they differ") or 1, "", "look", settings=())
    monkeypatch.setitem(cli.COMMANDS, "told", said)
    monkeypatch.setattr("sys.stdout", Gone())
    assert cli.main(["told"]) == 1


def test_a_full_disk_is_called_so_and_not_a_lack_of_memory(monkeypatch):
    def fill(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "x; No space left on device")

    monkeypatch.setitem(cli.COMMANDS, "fill", command.Command(fill, "", "look", settings=()))
    assert main_says("fill") == (2, "tfloop: writing: No space left on device\n")


def test_what_is_written_to_out_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("before")
    full = pytest.raises(UserError, match="rows.csv: cannot be written: No space left")
    with full, command.output(str(path)) as file:
        file.write("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["rows.csv"]
    with command.output(str(path)) as file:
        file.write("after")
    assert path.read_text() == "after"


def test_the_processes_of_a_comparison_end_with_it():
    code = "from tfloop.history.side import Side; s = Side('x', {}, {}); print(s._process.pid)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; import sys; sys.stdout.flush(); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    child = int(process.stdout.readline())
    process.kill()
    process.communicate()
    until = time.monotonic() + 10
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_a_stretch_that_is_broken_off_leaves_nothing(tmp_path):
    records = types.SimpleNamespace(folder=tmp_path)
    place = tmp_path / "replay-0-5"
    with pytest.raises(KeyboardInterrupt), stretch._made_whole(records, place) as partial:
        (partial / "events").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with stretch._made_whole(records, place) as partial:
        (partial / "events").touch()
    assert (place / "events").exists()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(tmp_path):
    left = tmp_path / ".export-left"
    left.mkdir()
    with scratch.folder(tmp_path, ".export-") as one:
        assert not left.exists()
        with scratch.folder(tmp_path, ".export-") as other:
            assert one.exists() and other.exists()
    assert not list(tmp_path.iterdir())
