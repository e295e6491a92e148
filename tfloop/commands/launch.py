"""Start a cluster of processes on this machine, to try out what several machines would do."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tfloop.commands.command import Command, one_of
from tfloop.config import FIELDS, Config
from tfloop.errors import UserError
from tfloop.machine import guardian, messages, network
from tfloop.settings import whole
from tfloop.wording import value_text

PATIENCE = 30.0  # seconds that the other workers get to end by themselves after one has


def launch(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    text = options["workers"]
    if not whole(text, most=64):
        raise UserError(f"--workers={text}: expected a number of processes from 1 to 64")
    if options["given"].get("strategy", "multi_worker") != "multi_worker":
        raise UserError(
            f"--strategy={config.strategy}: launch starts the workers of --strategy=multi_worker"
        )
    count = int(text)
    parts = count * config.accumulate
    if config.batch_size % parts:
        also = " and accumulation" if config.accumulate > 1 else ""
        raise UserError(
            f"--batch_size={config.batch_size} cannot be cut into {parts} equal parts, one for "
            f"each worker{also}"
        )
    is_open = one_of(options, "network", ("private", "open")) == "open" or network.is_private()
    enter = network.make_private() if not is_open else lambda: None
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(count)]
    flags = _flags(config, options, count)
    environment = {**os.environ, messages.TOKEN: secrets.token_hex(16)}

    def prepare() -> None:
        enter()
        guardian.end_with(launcher, signal.SIGTERM)

    launcher = os.getpid()
    return _supervise(
        [_start(index, addresses, flags, environment, prepare) for index in range(count)]
    )


def _flags(config: Config, options: dict[str, Any], workers: int) -> list[str]:
    """What each worker's `train` is given: what differs from the preset, and was named."""
    from tfloop.machine import devices

    preset = Config.make(config.preset)
    threads = max(1, devices.cores() // workers)
    flags: dict[str, Any] = {"preset": config.preset}
    flags |= {"shards": threads, "intra_op_threads": 1, "inter_op_threads": threads}
    for name in FIELDS:
        value = getattr(config, name)
        if value != getattr(preset, name) or name in options["given"]:
            flags[name] = value
    flags["strategy"] = "multi_worker"
    for name in ("resume", "override"):
        if options[name]:
            flags[name] = options[name]
    return [f"--{name}={value_text(value)}" for name, value in flags.items()]


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _start(
    index: int,
    addresses: list[str],
    flags: list[str],
    environment: dict[str, str],
    prepare: Callable[[], None],
) -> subprocess.Popen:
    """A worker; `prepare` is called in its process before the program."""
    place = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    return subprocess.Popen(
        [sys.executable, "-m", "tfloop", "train", *flags],
        env={**environment, "TF_CONFIG": json.dumps(place)},
        stdout=None if index == 0 else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches the workers through us, once
        preexec_fn=prepare,
    )


def _supervise(workers: list[subprocess.Popen]) -> int:
    """Hand on signals and what the workers complain of; the worst exit code.

    All end together: where one has ended, the others get some time.
    """

    def send_all(number: int, _: Any) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    for number in guardian.SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, send_all)
    readers = [
        threading.Thread(target=_hand_on, args=(index, worker), daemon=True)
        for index, worker in enumerate(workers)
    ]
    for reader in readers:
        reader.start()
    _wait(workers)
    for reader in readers:
        reader.join(1.0)
    codes = [worker.returncode for worker in workers]
    for index, code in enumerate(codes):
        if code < 0:
            print(f"worker {index}: killed by signal {-code}", file=sys.stderr)
    for code in codes:
        if code:
            return code if code > 0 else 128 - code
    return 0


def _wait(workers: list[subprocess.Popen]) -> None:
    """Until all have ended; some time after one has, the others, as a stopped one, are killed."""
    ended_at = None
    while any(worker.poll() is None for worker in workers):
        time.sleep(0.05)
        if ended_at is None and any(worker.poll() is not None for worker in workers):
            ended_at = time.monotonic()
        if ended_at and time.monotonic() - ended_at > PATIENCE:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()


def _hand_on(index: int, worker: subprocess.Popen) -> None:
    assert worker.stderr
    for line in worker.stderr:
        text = line.removeprefix("tfloop: ")
        print(f"worker {index}: {text}", end="", file=sys.stderr, flush=True)


COMMAND = Command(
    launch,
    "train with several processes on this machine",
    topic="cluster",
    options={
        "workers": ("2", "how many processes"),
        "resume": ("", "as with train"),
        "override": (False, "as with train"),
        "network": (
            "private",
            "private: the workers see each other and no other network; open: this machine's, on "
            "all whose addresses TensorFlow's ports listen",
        ),
    },
)
