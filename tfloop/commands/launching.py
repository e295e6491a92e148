"""Start a cluster of processes on this machine, to try out what several machines would do."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from tfloop.commands.command import Command
from tfloop.config import FIELDS, Config
from tfloop.errors import UserError

PATIENCE = 30.0  # seconds that the other workers get to end by themselves after one has


def launch(config: Config, options: dict, arguments: list[str]) -> int:
    count = options["workers"]
    if not (count.isdecimal() and count.isascii() and 1 <= int(count) <= 64):
        raise UserError(f"--workers={count}: expected a number of processes from 1 to 64")
    if options["given"].get("strategy", "multi_worker") != "multi_worker":
        raise UserError(f"--strategy={config.strategy}: launch starts the workers of --strategy=multi_worker")
    if config.batch_size % (parts := int(count) * config.accumulate):
        raise UserError(f"--batch_size={config.batch_size} cannot be cut into {parts} equal parts, one for each worker{' and accumulation' * (config.accumulate > 1)}")
    from tfloop import devices

    addresses = [f"127.0.0.1:{port}" for port in _free_ports(int(count))]
    threads = max(1, devices.cores() // int(count))
    preset = Config.make(config.preset)
    own = {"preset": config.preset, "shards": threads, "intra_op_threads": 1, "inter_op_threads": threads}
    own |= {name: value for name in FIELDS if (value := getattr(config, name)) != getattr(preset, name) or name in options["given"]}
    own["strategy"] = "multi_worker"
    flags = [f"--{name}={_text(value)}" for name, value in own.items()]
    flags += [f"--{name}={_text(options[name])}" for name in ("resume", "override") if options[name]]
    workers = [_start(index, addresses, flags) for index in range(int(count))]
    return _supervise(workers)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _text(value) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _start(index: int, addresses: list[str], flags: list[str]) -> subprocess.Popen:
    place = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    return subprocess.Popen([sys.executable, "-m", "tfloop", "train", *flags], env={**os.environ, "TF_CONFIG": json.dumps(place)},
                            stdout=None if index == 0 else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                            start_new_session=True, preexec_fn=_end_with_parent)  # Ctrl-C reaches them through us, once


def _end_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _supervise(workers: list[subprocess.Popen]) -> int:
    """Hand on signals and what the workers complain of; the worst exit code. Where one fails, the others get some time."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: [worker.send_signal(number) for worker in workers if worker.poll() is None])
    readers = [threading.Thread(target=_hand_on, args=(index, worker), daemon=True) for index, worker in enumerate(workers)]
    for reader in readers:
        reader.start()
    failed_at = None
    while any(worker.poll() is None for worker in workers):
        time.sleep(0.05)
        if failed_at is None and any(worker.poll() for worker in workers):
            failed_at = time.monotonic()
        if failed_at and time.monotonic() - failed_at > PATIENCE:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
    for reader in readers:
        reader.join(1.0)
    codes = [worker.returncode for worker in workers]
    for index, code in enumerate(codes):
        if code < 0:
            print(f"worker {index}: killed by signal {-code}", file=sys.stderr)
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _hand_on(index: int, worker: subprocess.Popen) -> None:
    for line in worker.stderr:
        print(f"worker {index}: {line.removeprefix('tfloop: ')}", end="", file=sys.stderr, flush=True)


COMMANDS = {
    "launch": Command(launch, "train with several processes on this machine", "", tuple(FIELDS), {
        "workers": ("2", "how many processes"),
        "resume": ("", "as with train"), "override": (False, "as with train")}),
}
