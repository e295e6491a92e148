"""The one step on several replicas and in several processes: the same result, the same files, and
clear failures."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tfloop.cli import main
from tfloop.commands import launch
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.inspection.event_files import read_scalars
from tfloop.machine import cluster, guardian, messages, places, reception
from tfloop.training import checkpoints

SMOOTH = [
    "--preset=digits",
    "--conv=4,6",
    "--pool=2",
    "--dense=8",
    "--batch_size=96",
    "--conv_activation=tanh",
    "--dense_activation=tanh",
    "--optimizer=sgd",
    "--momentum=0.9",
    "--learning_rate=0.02",
    "--l2=0.001",
    "--shards=1",
    "--epochs=20",
    "--quiet",
    "--seed=1",
]


def tfloop(*arguments, **environment):
    """A process of the command line, its output piped."""
    return subprocess.Popen(
        [sys.executable, "-m", "tfloop", *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


def result(folder: Path) -> dict:
    return json.loads((folder / "digits-001" / "result.json").read_text())


def losses(folder: Path) -> np.ndarray:
    return np.array(
        [
            scalar.value
            for scalar in read_scalars(folder)
            if scalar.run == "train" and scalar.tag == "loss/total"
        ]
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder with a run on one device, of 300 steps."""
    folder = tmp_path_factory.mktemp("alone")
    process = tfloop("train", *SMOOTH, f"--logdir={folder}")
    assert process.wait(timeout=120) == 0, process.stderr.read()
    return folder


@pytest.mark.parametrize(
    "replicas",
    [
        ("launch", "--workers=2"),
        ("train", "--strategy=mirrored", "--replicas=4"),
        ("train", "--strategy=mirrored", "--replicas=2", "--accumulate=3"),
    ],
    ids=lambda flags: " ".join(flag.lstrip("-") for flag in flags[1:]),
)
def test_replicas_and_workers_follow_the_run_on_one_device(alone, tmp_path, replicas):
    """300 steps to 1e-4, the filled-up last batch of each epoch and the penalty, counted once,
    included."""
    process = tfloop(*replicas, *SMOOTH, f"--logdir={tmp_path}")
    assert process.wait(timeout=120) == 0, process.stderr.read()
    one, many = result(alone), result(tmp_path)
    assert many["steps"] == one["steps"] == 300 and many["finished"]
    np.testing.assert_allclose(
        losses(tmp_path / "digits-001"), losses(alone / "digits-001"), rtol=1e-4
    )
    for part in ("train", "test"):
        assert many["final"][part]["total"] == pytest.approx(one["final"][part]["total"], rel=1e-4)
        assert many["final"][part]["l2"] == pytest.approx(one["final"][part]["l2"], rel=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["digits-001"]  # the chief alone writes

    def tags(folder):
        return {(scalar.run, scalar.tag, scalar.step) for scalar in read_scalars(folder)}

    assert tags(tmp_path / "digits-001") == tags(alone / "digits-001")


def test_batch_normalisation_dropout_and_augmentation_look_at_the_whole_batch(tmp_path):
    settings = [
        *SMOOTH,
        "--epochs=2",
        "--batch_norm",
        "--dropout=0.3",
        "--augment_shift=1",
        "--summaries=none",
    ]
    found = []
    for name, flags in (
        ("one", ["train"]),
        ("many", ["train", "--strategy=mirrored", "--replicas=3"]),
    ):
        process = tfloop(*flags, *settings, f"--logdir={tmp_path / name}")
        assert process.wait(timeout=120) == 0, process.stderr.read()
        found.append(result(tmp_path / name)["final"])
    for part in (
        "train",
        "test",
    ):  # the first epoch's moving averages are those of whole batches, too
        assert found[1][part]["total"] == pytest.approx(found[0][part]["total"], rel=1e-3)


@pytest.mark.in_full
def test_a_run_checkpointed_on_one_number_of_workers_goes_on_with_another(alone, tmp_path):
    flags = [*SMOOTH, f"--logdir={tmp_path}"]
    for command, epochs in ((["train"], 7), (["launch", "--workers=2"], 12), (["train"], 20)):
        resume = [] if epochs == 7 else [f"--resume={tmp_path}/digits-001"]
        process = tfloop(*command, *flags, f"--epochs={epochs}", *resume)
        assert process.wait(timeout=120) == 0, process.stderr.read()
    found = result(tmp_path)
    assert found["steps"] == 300 and found["resumed_at"] == [105, 180]
    assert found["final"]["train"]["total"] == pytest.approx(
        result(alone)["final"]["train"]["total"], rel=1e-4
    )


def children(process: subprocess.Popen) -> list[int]:
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_when_a_worker_is_killed_the_others_name_it_and_a_restart_ends_as_if_nothing_had_been(
    tmp_path,
):
    flags = [
        *SMOOTH,
        "--epochs=30",
        "--checkpoint_every=50",
        "--steps_per_call=5",
        "--summaries=scalars",
    ]
    undisturbed = tfloop("launch", "--workers=3", *flags, f"--logdir={tmp_path}/a")
    assert undisturbed.wait(timeout=120) == 0, undisturbed.stderr.read()
    process = tfloop("launch", "--workers=3", *flags, f"--logdir={tmp_path}/b")
    until = time.monotonic() + 60
    while (
        not checkpoints.all_in(tmp_path / "b" / "digits-001" / "checkpoints")
        and time.monotonic() < until
    ):
        time.sleep(0.01)
    killed = time.monotonic()
    os.kill(children(process)[1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert process.returncode == 4
    for survivor in (0, 2):
        assert re.search(
            rf"^worker {survivor}: worker 1 \(127.0.0.1:\d+\) is gone; start the cluster again",
            error,
            re.M,
        ), error
    again = tfloop("launch", "--workers=3", *flags, f"--logdir={tmp_path}/b", "--resume=auto")
    assert again.wait(timeout=120) == 0, again.stderr.read()
    one, other = result(tmp_path / "a"), result(tmp_path / "b")
    assert other["resumed_at"] and other["state_sha256"] == one["state_sha256"]
    np.testing.assert_array_equal(
        losses(tmp_path / "b" / "digits-001"), losses(tmp_path / "a" / "digits-001")
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
@pytest.mark.in_full
def test_a_cluster_goes_on_with_all_runs_that_were_begun_together(tmp_path):
    flags = [flag for flag in SMOOTH if not flag.startswith(("--seed", "--epochs"))] + [
        "--epochs=2",
        "--seeds=3,4",
        "--summaries=none",
    ]
    for more in ([], ["--resume=auto"]):
        process = tfloop("launch", "--workers=2", *flags, f"--logdir={tmp_path}", *more)
        assert process.wait(timeout=120) == 0, process.stderr.read()
        made = [
            json.loads((tmp_path / name / "result.json").read_text())
            for name in ("digits-001", "digits-002")
        ]
        if not more:
            first = made
            (tmp_path / "digits-002" / "result.json").unlink()
    assert (
        made[0] == first[0]
        and made[1]["resumed_at"] == [30]
        and made[1]["state_sha256"] == first[1]["state_sha256"]
    )


def test_a_signal_to_any_worker_ends_all_with_a_checkpoint(tmp_path):
    process = tfloop(
        "launch",
        "--workers=2",
        *SMOOTH,
        "--epochs=2000",
        "--steps_per_call=5",
        f"--logdir={tmp_path}",
    )
    until = time.monotonic() + 60
    while (
        not checkpoints.all_in(tmp_path / "digits-001" / "checkpoints") and time.monotonic() < until
    ):
        time.sleep(0.01)
    os.kill(children(process)[1], signal.SIGTERM)
    assert process.wait(timeout=30) == 143, process.stderr.read()
    found = result(tmp_path)
    assert (
        not found["finished"]
        and f"{found['steps']:08d}"
        in checkpoints.all_in(tmp_path / "digits-001" / "checkpoints")[0].name
    )


# --- meeting


def ports(count):
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return found


def worker(index, addresses, *flags):
    place = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    return tfloop(
        "train", "--strategy=multi_worker", "--preset=digits", *flags, TF_CONFIG=json.dumps(place)
    )


def meet(addresses, present):
    """What `cluster.meet` says to each of these workers, (index, settings, why the chief refuses),
    side by side."""
    said = [None] * len(present)

    def one(position, index, settings, refused):
        place = places.Place(index, tuple(addresses))
        config = Config.make(
            "digits", strategy="multi_worker", **{"worker_timeout": 20.0, **settings}
        )
        try:
            if refused:
                cluster.refuse(place, config, refused)
            else:
                said[position] = cluster.meet(place, config, config, "CPU").settings
        except UserError as error:
            said[position] = error.as_flags

    threads = [
        threading.Thread(target=one, args=(position, *worker))
        for position, worker in enumerate(present)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
        assert not thread.is_alive()
    return said


IMPATIENT = dict(worker_timeout=3.0)


@pytest.mark.parametrize(
    "present, message",
    [
        ([(0, IMPATIENT, ""), (1, IMPATIENT, "")], "worker 2 (ADDRESS2) did not come within 3 s"),
        (
            [(1, IMPATIENT, ""), (2, IMPATIENT, "")],
            "worker 0 (ADDRESS0), the chief, did not answer within 3 s",
        ),
        pytest.param(
            [(0, {}, ""), (1, {}, ""), (2, dict(l2=0.1), "")],
            "worker 2 (ADDRESS2) has --l2=0.1 where worker 0 has 0.0",
            marks=pytest.mark.quick,
        ),
        (
            [(0, {}, ""), (1, {}, ""), (1, {}, "")],
            "worker 1 (ADDRESS1): cannot listen there: Address already in use; is there "
            "another process of this index",
        ),
        (
            [(0, {}, "x: not a run's folder"), (1, {}, ""), (2, {}, "")],
            "worker 0 (ADDRESS0): x: not a run's folder",
        ),
    ],
    ids=[
        "one is missing",
        "the chief is missing",
        "other settings",
        "one index twice",
        "the chief refuses",
    ],
)
def test_a_cluster_that_does_not_come_together_says_why_to_every_worker_in_time(
    monkeypatch, present, message
):
    monkeypatch.setattr(cluster, "LINGER", 1.0)
    addresses = [f"127.0.0.1:{port}" for port in ports(3)]
    for index, address in enumerate(addresses):
        message = message.replace(f"ADDRESS{index}", address)
    started = time.monotonic()
    for (_, _, refused), said in zip(present, meet(addresses, present)):
        assert message in said if not refused else said is None
    assert time.monotonic() - started < 20


def test_a_worker_of_a_finished_run_has_nothing_to_do():
    addresses = tuple(f"127.0.0.1:{port}" for port in ports(2))
    config = Config.make("digits", strategy="multi_worker", worker_timeout=20.0)
    chief, other = (places.Place(index, addresses) for index in (0, 1))
    arguments = (chief, config, "r: is finished", False)
    thread = threading.Thread(target=cluster.refuse, args=arguments)
    thread.start()
    with pytest.raises(cluster.NothingToDo, match="r: is finished"):
        cluster.meet(other, config, config, "CPU")
    thread.join(20)


@pytest.mark.parametrize("change", [dict(strategy="none"), dict(cls=1), None])
def test_settings_that_no_chief_sends_are_refused(change):
    settings = dataclasses.asdict(Config.make("digits", strategy="multi_worker"))
    sent = {} if change is None else settings | change
    with pytest.raises(UserError, match="the chief, sent settings that are no cluster's"):
        cluster._settings_of(places.Place(1, ("a:1", "b:1")), {"settings": sent}, {})


def test_a_worker_that_is_stopped_as_the_others_end_does_not_keep_the_launcher(monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.2)
    workers = [subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"])]
    workers[1].send_signal(signal.SIGSTOP)
    launch._wait(workers)
    assert [worker.wait() for worker in workers] == [0, -signal.SIGKILL]


def test_a_worker_that_listens_on_ipv6_is_not_gone():
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        port = listener.getsockname()[1]
        place = places.Place(0, ("[::1]:1", f"[::1]:{port}"))
        assert places.unreachable(place) == []


def test_a_token_may_be_any_bytes(monkeypatch):
    monkeypatch.setenv(messages.TOKEN, os.fsdecode(b"\xff"))
    assert messages.opened(messages.signed({"a": 1}, "x", "y"), "x", "y") == {"a": 1}


def test_signals_that_come_together_are_one_question_to_a_guardian(monkeypatch):
    """As systemd sends them; the second would kill the training process."""
    sent = []
    watching = guardian._Guardian(places.Place(0, ("a:1",)), 9.0, 1, socket.socket())
    watching._has_started = True
    monkeypatch.setattr(guardian.os, "kill", lambda child, number: sent.append(number))
    numbers = [{signal.SIGHUP, signal.SIGTERM}, {signal.SIGTERM}, set()]
    monkeypatch.setattr(guardian.signal, "sigpending", lambda: numbers[0])
    monkeypatch.setattr(guardian.signal, "sigwait", lambda _: min(numbers.pop(0)))
    watching._hand_on_signals()
    assert sent == [signal.SIGHUP]


def test_workers_that_agree_train_with_the_settings_of_the_chief():
    found = meet(
        [f"127.0.0.1:{port}" for port in ports(3)],
        [(0, dict(name="chief", quiet=True), ""), (1, dict(name="other"), ""), (2, {}, "")],
    )
    assert [config.name for config in found] == ["chief", "other", ""]  # which may differ
    assert len({config.replace(name="", quiet=False) for config in found}) == 1


def strange_messages(count):
    """What strangers, and workers with a fault, may send: bytes that end in a newline, or not."""
    chance = random.Random(0)
    odd = [
        None,
        True,
        -1,
        10**30,
        1.5,
        "",
        "\x1b[2Jyou\nare hacked",
        [],
        {},
        [[1]],
        {"a": {"b": 1}},
    ]
    names = ["index", "workers", "settings", "error", "nonce", "content", "signature", "gone"]
    names += ["answer", "refused", "ended", "started", "device", "tfloop"]
    for number in range(count):
        message = {name: chance.choice(odd) for name in chance.sample(names, chance.randrange(6))}
        if number % 4 == 0:
            message["content"] = json.dumps(message)
        yield chance.choice(
            [
                json.dumps(message).encode() + b"\n",
                json.dumps(message).encode() + b"\n",
                json.dumps(chance.choice(odd)).encode() + b"\n",
                b"[" * 100_000 + b"\n",
                chance.randbytes(200) + b"\n",
                b"GET / HTTP/1.1\r\n\r\n",
                b"x" * 5_000,
                b"",
            ]
        )


def test_200_strangers_do_not_keep_a_cluster_from_meeting():
    """Half speak at once, half when they were greeted; half stay, half leave."""
    addresses = [f"127.0.0.1:{port}" for port in ports(2)]
    host, port = "127.0.0.1", int(addresses[0].split(":")[1])
    found, staying = [], []
    meeting = threading.Thread(
        target=lambda: found.extend(meet(addresses, [(0, {"worker_timeout": 60.0}, "")]))
    )
    meeting.start()
    for number, content in enumerate(strange_messages(200)):
        for _ in range(50):
            try:
                stranger = socket.create_connection((host, port), timeout=5)
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        with contextlib.suppress(OSError):
            if number % 2:
                stranger.recv(1000)
            stranger.sendall(content)
        if number % 4 < 2:
            staying.append(stranger)
        else:
            stranger.close()
    assert meeting.is_alive()
    found += meet(addresses, [(1, {}, "")])
    meeting.join(20)
    assert len(found) == 2 and all(isinstance(config, Config) for config in found)
    for stranger in staying:
        stranger.close()


def test_a_worker_takes_nothing_of_what_200_others_say_in_place_of_the_chief():
    for number, content in enumerate(strange_messages(200)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            if number % 2:
                theirs.sendall(json.dumps({"nonce": "a"}).encode() + b"\n")
            theirs.sendall(content)
            theirs.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ValueError, OSError):
                # An unsigned refusal is all that may be said without the token.
                assert cluster._converse(ours, {}, 5.0) is None and b"refused" in content


def test_200_messages_between_guardians_are_taken_or_end_the_connection():
    place = places.Place(0, ("a:1", "b:2", "c:3"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        guard = guardian._Guardian(place, 10.0, os.getpid(), ours)
        for content in strange_messages(200):
            one, other = socket.socketpair()
            with one, other:
                guard._add_link(1, one)
                other.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    other.sendall(content[:100_000])
                other.close()
                for _ in range(200):
                    if not guard._links[1].is_open:
                        break
                    guard._listen_to(guard._links[1])
                assert not guard._links[1].is_open
        assert set(guard._gone) <= {1, 2}


def test_what_a_worker_with_the_token_says_is_checked_and_printed_without_controls():
    place = places.Place(0, ("a:1", "b:2"))
    own = {"workers": ["a:1", "b:2"], "settings": {"l2": 0}, "tfloop": "1", "device": "CPU"}
    own["tensorflow"] = "2"
    reached = 0
    for content in strange_messages(2000):
        try:
            hello = messages.parsed(content)
        except ValueError:
            continue
        hello = {"index": 1, "workers": ["a:1", "b:2"], "settings": {}, **hello}
        if reception.is_hello(hello):
            reached += 1
            assert cluster._difference(place, own, hello, {1}).isprintable()
    assert reached > 50


def test_who_holds_another_token_is_told_and_the_chief_says_who_was_turned_away(monkeypatch):
    addresses = [f"127.0.0.1:{port}" for port in ports(2)]
    monkeypatch.setenv(messages.TOKEN, "one")
    chief = threading.Thread(target=lambda: said.extend(meet(addresses, [(0, IMPATIENT, "")])))
    said = []
    chief.start()
    time.sleep(0.5)
    # Threads share an environment, so the worker's side is done by hand.
    with socket.create_connection(("127.0.0.1", int(addresses[0].split(":")[1]))) as worker:
        lines = worker.makefile("rb")
        nonce = json.loads(lines.readline())["nonce"]
        hello = {"content": "{}", "signature": "other", "nonce": nonce}
        worker.sendall(json.dumps(hello).encode() + b"\n")
        assert json.loads(lines.readline()) == {"refused": "another token"}
    chief.join(20)
    assert f"1 connection had another {messages.TOKEN}" in said[0]


def test_a_worker_with_another_token_says_so_at_once(tmp_path):
    addresses = [f"127.0.0.1:{port}" for port in ports(2)]
    processes = []
    for index, token in enumerate(("one", "two")):
        place = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        flags = ["--strategy=multi_worker", "--preset=digits", f"--logdir={tmp_path}"]
        environment = {"TF_CONFIG": json.dumps(place), messages.TOKEN: token}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tfloop", "train", *flags, "--worker_timeout=30"],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
            )
        )
    chief, worker = processes
    try:
        _, error = worker.communicate(timeout=25)
    finally:
        chief.terminate()
        chief.communicate(timeout=20)
    assert worker.returncode == 2
    assert f"the chief, has another {messages.TOKEN} in its environment" in error


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies_as_the_meeting_ends_ends_the_other_with_its_line(tmp_path, victim):
    """Where TensorFlow, which waits for it without end, hears no signal."""
    die = (
        "import os, sys; from tfloop.machine import cluster; meet = cluster.meet\n"
        "def deadly(*args): meet(*args); os.kill(os.getpid(), 9)\n"
        "cluster.meet = deadly\nfrom tfloop.cli import main; sys.exit(main())"
    )
    addresses = [f"127.0.0.1:{port}" for port in ports(2)]
    flags = ["train", "--strategy=multi_worker", "--preset=digits", f"--logdir={tmp_path}"]
    processes = []
    for index in range(2):
        place = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        program = ["-c", die] if index == victim else ["-m", "tfloop"]
        processes.append(
            subprocess.Popen(
                [sys.executable, *program, *flags],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "TF_CONFIG": json.dumps(place)},
            )
        )
    _, error = processes[1 - victim].communicate(timeout=60)
    assert processes[1 - victim].returncode == 4
    assert error == (
        f"tfloop: worker {victim} ({addresses[victim]}) is gone; start the cluster again with "
        "--resume=auto to go on from the last checkpoint\n"
    )
    processes[victim].communicate(timeout=10)


def test_processes_that_do_not_fit_end_with_the_line_and_exit_code_2_and_leave_nothing(tmp_path):
    addresses = [f"127.0.0.1:{port}" for port in ports(2)]
    processes = [
        worker(0, addresses, f"--logdir={tmp_path}/runs"),
        worker(1, addresses, "--l2=0.1", f"--logdir={tmp_path}/runs"),
    ]
    for process in processes:
        _, error = process.communicate(timeout=90)
        assert process.returncode == 2
        assert error == (
            f"tfloop: the cluster cannot train: worker 1 ({addresses[1]}) has --l2=0.1 "
            f"where worker 0 has 0.0\n"
        )
    assert not (tmp_path / "runs").exists()


def test_a_mistake_that_all_workers_make_is_said_once_by_each(tmp_path):
    addresses = [f"127.0.0.1:{port}" for port in ports(2)]
    flags = ["--batch_size=63", f"--logdir={tmp_path}/runs"]
    for process in [worker(index, addresses, *flags) for index in range(2)]:
        _, error = process.communicate(timeout=90)
        assert process.returncode == 2
        assert error == (
            "tfloop: --batch_size=63 cannot be cut into 2 equal parts, one for each replica\n"
        )


def test_a_guardian_leaves_a_signal_alone_that_is_ignored_from_the_start():
    """As nohup asks for."""
    code = """
import os, signal, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from tfloop.machine import guardian, places
guard = guardian.stand_over(places.Place(0, ("a:1", "b:2")), 0.5)
guard.started()
os.kill(os.getppid(), signal.SIGHUP)
time.sleep(1.5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_workers_with_other_data_are_named(tmp_path, random):
    images = random.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for name, shift in (("a", 0), ("b", 1)):
        labels = (np.arange(40) + shift) % 4
        np.savez(
            tmp_path / f"{name}.npz",
            x_train=images,
            y_train=labels,
            x_test=images[:8],
            y_test=labels[:8],
        )
    addresses = [f"127.0.0.1:{port}" for port in ports(2)]
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.npz").symlink_to(tmp_path / ("a.npz" if name == "0" else "b.npz"))
    processes = []
    for index in range(2):
        place = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        processes.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tfloop",
                    "train",
                    "--strategy=multi_worker",
                    "--dataset=data.npz",
                    "--conv=2",
                    "--pool=",
                    "--dense=4",
                    "--batch_size=8",
                ],
                cwd=tmp_path / str(index),
                text=True,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "TF_CONFIG": json.dumps(place),
                    "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
                },
            )
        )
    for process in processes:
        _, error = process.communicate(timeout=60)
        assert (
            process.returncode == 2
            and f"worker 1 ({addresses[1]}) has other data than worker 0 ({addresses[0]})" in error
        ), error


@pytest.mark.parametrize(
    "value, message",
    [
        ("{", "TF_CONFIG: not JSON"),
        ("[]", "has no cluster or no task"),
        ('{"cluster": {"worker": []}}', "has no cluster or no task"),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
            "task 'worker' 1 is not in the cluster",
        ),
        (
            '{"cluster": {"worker": ["a:x"]}, "task": {"type": "worker", "index": 0}}',
            "'a:x' is no host:port",
        ),
        (
            '{"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}}',
            "two workers have one address",
        ),
        (
            '{"cluster": {"ps": ["a:1"], "worker": ["a:2"]}, "task": {"type": "ps", "index": 0}}',
            "has jobs ps, worker",
        ),
        *(
            (json.dumps({"cluster": {"worker": [address]}, "task": {}}), "is no host:port")
            for address in ("a..b:1", "x" * 64 + ":1", "\ud800:1", ":1", "a b:1", "a:" + "1" * 5000)
        ),
    ],
)
def test_a_tf_config_that_makes_no_sense_is_named(monkeypatch, value, message):
    monkeypatch.setenv("TF_CONFIG", value)
    with pytest.raises(UserError, match=re.escape(message)):
        places.find()


@pytest.mark.parametrize("number", ["2", "-1", "1" * 5000])
def test_a_process_that_is_none_of_slurms_tasks_is_named(monkeypatch, number):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setenv("SLURM_PROCID", number)
    answer = subprocess.CompletedProcess([], 0, '["a:1", "b:1"]', "")
    monkeypatch.setattr(places.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(UserError, match=f"SLURM_PROCID={number[:80]}.*"):
        places.find()


def test_the_place_is_read_from_tf_config_and_from_slurm(monkeypatch):
    monkeypatch.setenv(
        "TF_CONFIG",
        '{"cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"]}, "task": {"type": '
        '"worker", "index": 1}}',
    )
    assert places.find() == places.Place(2, ("a:1", "b:1", "c:1"))
    monkeypatch.delenv("TF_CONFIG")
    with pytest.raises(UserError, match="set TF_CONFIG=.*or start them with Slurm|Slurm"):
        places.find()
    for name, value in {
        "PROCID": "1",
        "STEP_NUM_TASKS": "3",
        "STEP_NODELIST": "n[1-2]",
        "STEP_TASKS_PER_NODE": "2,1",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = places.find()
    assert found.index == 1 and [address.split(":")[0] for address in found.addresses] == [
        "n1",
        "n1",
        "n2",
    ]
    assert len(set(found.addresses)) == 3


@pytest.mark.quick
@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(replicas=2), "replicas=2 counts with strategy"),
        (dict(strategy="mirrored", eager=True), "strategy=mirrored and eager exclude"),
        (dict(strategy="mirrored", jit_compile=True), "and jit_compile exclude"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Config.make(**settings)


@pytest.mark.quick
def test_a_dry_run_tries_the_replicas_too(tmp_path):
    process = tfloop(
        "train",
        "--preset=digits",
        "--strategy=mirrored",
        "--replicas=2",
        "--dry_run",
        f"--logdir={tmp_path}/runs",
    )
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "dry run: one step of 32 images" in out, error
    assert main(["train", "--strategy=multi_worker", "--dry_run"]) == 2


def test_a_batch_that_cannot_be_cut_is_named(tmp_path, capfd):
    process = tfloop(
        "train",
        "--preset=digits",
        "--strategy=mirrored",
        "--replicas=3",
        f"--logdir={tmp_path}/runs",
    )
    _, error = process.communicate(timeout=60)
    assert (
        process.returncode == 2
        and error
        == "tfloop: --batch_size=32 cannot be cut into 3 equal parts, one for each replica\n"
    )
    assert main(["launch", "--workers=x"]) == 2 and main(["launch", "--strategy=mirrored"]) == 2
