"""The processes of a cluster before they train: each finds its place, and all meet.

Every worker has an index and an address, host:port; worker 0 is the chief. At the start each
listens at its address; the others say hello to the chief, which compares versions and settings and
answers, to all the same: go, or what is wrong. So a mistake of one is a clear line on every one,
within a bounded time.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.version import __version__
from tfloop.wording import joined

MAY_DIFFER = (
    "device",
    "shards",
    "onednn",
    "intra_op_threads",
    "inter_op_threads",
    "memory_growth",
    "memory_limit",
    "log_device_placement",
    "tensorflow_log",
    "logdir",
    "name",
    "quiet",
    "live_plot",
    "pipeline",
    "worker_timeout",
)
LONGEST = 1 << 20  # bytes of one message
LINGER = 10.0  # seconds that the chief stays to tell those who come late what is wrong


class Place(NamedTuple):
    """Where a process stands in its cluster."""

    index: int  # type: ignore[assignment]  # it hides tuple.index
    addresses: tuple[str, ...]  # of all workers: "host:port"

    @property
    def is_chief(self) -> bool:
        return self.index == 0

    def name(self, index: int) -> str:
        """worker 1 (host:port)"""
        return f"worker {index} ({self.addresses[index]})"


def find() -> Place:
    """The place of this process, from TF_CONFIG, or from the variables that Slurm sets.

    Raises:
      UserError: neither is there, or TF_CONFIG is not what TensorFlow documents.
    """
    if "TF_CONFIG" in os.environ:
        return _from_tf_config(os.environ["TF_CONFIG"])
    if "SLURM_PROCID" in os.environ:
        return _from_slurm()
    raise UserError(
        f"--strategy=multi_worker: set TF_CONFIG={_EXAMPLE} for each process, start them with "
        "Slurm, or try it out with `tfloop launch --workers=2`"
    )


_EXAMPLE = '{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}}'


def _wrong_tf_config(what: str) -> UserError:
    return UserError(
        f"TF_CONFIG: {what}; expected a cluster of workers and a task, as in {_EXAMPLE}"
    )


def _from_tf_config(text: str) -> Place:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong_tf_config(f"not JSON: {error}") from None
    content = content if isinstance(content, dict) else {}
    cluster, task = content.get("cluster"), content.get("task")
    if not isinstance(cluster, dict) or not isinstance(task, dict):
        raise _wrong_tf_config("has no cluster or no task")
    jobs = [cluster.get(job, []) for job in ("chief", "worker")]
    if set(cluster) - {"chief", "worker"} or not all(isinstance(job, list) for job in jobs):
        raise _wrong_tf_config(f"has jobs {', '.join(map(str, cluster))}")
    addresses = [address for job in jobs for address in job]
    for address in addresses:
        port = address.rpartition(":")[2] if isinstance(address, str) else ""
        if not (port.isdecimal() and port.isascii() and 0 < int(port) < 65536):
            raise _wrong_tf_config(f"{address!r} is no host:port")
    if len(set(addresses)) < len(addresses):
        raise _wrong_tf_config("two workers have one address")
    job: Any = task.get("type")
    index: Any = task.get("index")
    is_index = isinstance(index, int) and not isinstance(index, bool)
    places = range(len(cluster.get(job, []))) if job in ("chief", "worker") else range(0)
    if not is_index or index not in places:
        raise _wrong_tf_config(f"task {job!r} {index!r} is not in the cluster")
    first = len(jobs[0]) if job == "worker" else 0
    return Place(first + int(index), tuple(addresses))


def _from_slurm() -> Place:
    import tensorflow as tf  # it knows best how to read Slurm's variables

    try:
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            gpus_per_node=4096, gpus_per_task=1, auto_set_gpu=False
        )
        workers = resolver.cluster_spec().as_dict()["worker"]
        return Place(int(os.environ["SLURM_PROCID"]), tuple(workers))
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"--strategy=multi_worker: Slurm's variables do not describe a job step: {error}"
        ) from None


def meet(place: Place, asked: Config, settings: Config, device: str) -> Config:
    """Wait for all workers, compare, and return the settings to train with.

    They are the chief's, but for what MAY_DIFFER.

    Args:
      place: of this process.
      asked: the settings as given to this process.
      settings: on the chief, those to train with, which are a resumed run's where there is one.
      device: "CPU" or "GPU".

    Raises:
      UserError: a port that is taken, a worker that did not come within asked.worker_timeout
        seconds, two of one index, or workers that differ; on all workers that are there.
    """
    hello = {
        "index": place.index,
        "workers": list(place.addresses),
        "tfloop": __version__,
        "tensorflow": importlib.metadata.version("tensorflow"),
        "device": device,
        "settings": _to_compare(asked),
    }
    deadline = time.monotonic() + asked.worker_timeout
    try:
        with _listening(place) as listener:
            if place.is_chief:
                return _gather(place, hello, settings, listener, deadline)
            answer = _ask(place, hello, asked.worker_timeout)
    except _PortTaken as error:
        if not place.is_chief:
            with contextlib.suppress(UserError):
                _ask(place, hello | {"error": error.as_flags}, asked.worker_timeout)
        raise
    if "error" in answer:
        raise UserError(answer["error"])
    local = {name: getattr(asked, name) for name in MAY_DIFFER}
    return Config.make(**{**answer["settings"], **local})


def refuse(place: Place, asked: Config, reason: str) -> None:
    """On the chief: tell the workers, as they come, why there will be no training."""
    deadline = time.monotonic() + asked.worker_timeout
    refused: set[object] = set()
    with contextlib.suppress(UserError, OSError), _listening(place) as listener:
        while len(refused) < len(place.addresses) - 1:
            connection, hello = _receive(listener, deadline)
            if connection is None:
                break
            if hello:
                refused.add(hello.get("index"))
                _send(connection, {"error": f"{place.name(0)}: {reason}"})


class _PortTaken(UserError):
    pass


@contextlib.contextmanager
def _listening(place: Place) -> Iterator[socket.socket]:
    host, _, port = place.addresses[place.index].rpartition(":")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host if host in ("localhost", "127.0.0.1") else "", int(port)))
            listener.listen(len(place.addresses))
        except OSError as error:
            raise _PortTaken(
                f"{place.name(place.index)}: cannot listen there: {error.strerror}; is there "
                "another process of this index, or of another job?"
            ) from None
        yield listener


def _gather(
    place: Place, own: dict, settings: Config, listener: socket.socket, deadline: float
) -> Config:
    """The chief's part: wait for every other worker, and answer.

    Go, to all at once; or what is wrong, as soon as it is known.
    """
    waiting: list[socket.socket] = []
    missing, wrong = set(range(1, len(place.addresses))), ""

    def answer(message: dict) -> None:
        while waiting:
            with waiting.pop() as connection:
                _send(connection, message)

    while missing:
        connection, hello = _receive(listener, deadline)
        if connection is None:
            late = joined([place.name(index) for index in sorted(missing)])
            wrong = wrong or f"{late} did not come within {settings.worker_timeout:g} s"
            break
        if hello:
            waiting.append(connection)
            wrong = wrong or _difference(place, own, hello, missing)
            missing.discard(hello.get("index"))
        if wrong:
            answer({"error": f"the cluster cannot train: {wrong}"})
            deadline = min(deadline, time.monotonic() + LINGER)
    if wrong:
        answer({"error": f"the cluster cannot train: {wrong}"})
        raise UserError(f"the cluster cannot train: {wrong}")
    answer({"settings": dataclasses.asdict(settings)})
    return settings


def _difference(place: Place, own: dict, hello: dict, missing: set) -> str:
    """What is wrong with a worker that said hello; empty where nothing is."""
    index: Any = hello.get("index")
    if hello.get("workers") != own["workers"]:
        theirs = ", ".join(map(str, hello.get("workers") or ["none"]))
        return f"a worker {index} has another list of workers than worker 0: {theirs}"
    if "error" in hello:
        return str(hello["error"])
    if index not in missing:
        return f"there are two workers with index {index}"
    for what in ("tfloop", "tensorflow", "device"):
        if hello.get(what) != own[what]:
            name = place.name(index)
            return f"{name} has {what} {hello.get(what)}, worker 0 has {own[what]}"
    settings = hello.get("settings", {})
    differences = [
        f"--{name}={settings.get(name)} where worker 0 has {value}"
        for name, value in own["settings"].items()
        if settings.get(name) != value
    ]
    return f"{place.name(index)} has {', '.join(differences)}" if differences else ""


def _ask(place: Place, hello: dict, timeout: float) -> dict:
    """Another worker's part: say hello to the chief until it answers."""
    host, _, port = place.addresses[0].rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            patience = max(0.1, min(left, 5.0))
            with socket.create_connection((host, int(port)), timeout=patience) as connection:
                _send(connection, hello)
                # The chief waits as long for the others.
                connection.settimeout(max(0.1, left + 5.0))
                if answer := _read(connection):
                    return answer
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise UserError(f"{place.name(0)}, the chief, did not answer within {timeout:g} s")
        time.sleep(0.1)


def _receive(listener: socket.socket, deadline: float) -> tuple[socket.socket | None, dict | None]:
    """(the next to connect, its hello).

    (None, None) where none came in time; no hello from one that makes no sense.
    """
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            break
        connection.settimeout(5.0)
        try:
            hello = _read(connection)
        except OSError:
            hello = None
        if not hello:
            connection.close()
        return connection, hello
    return None, None


def _send(connection: socket.socket, message: dict) -> None:
    with contextlib.suppress(OSError):  # one that is gone need not be told
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket) -> dict | None:
    with connection.makefile("rb") as file:
        line = file.readline(LONGEST)
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _to_compare(config: Config) -> dict:
    values = dataclasses.asdict(config)
    compared = {name: value for name, value in values.items() if name not in MAY_DIFFER}
    return json.loads(json.dumps(compared))


class Watch(threading.Thread):
    """Looks every other second whether the other workers still listen.

    TensorFlow tells at once that a worker is gone, but not always which; and soon the others go,
    too.

    Attributes:
      gone: the workers that were the first not to listen.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(daemon=True)
        self._place = place
        self.gone: list[int] = []
        self.start()

    def run(self) -> None:
        while not self.gone:
            time.sleep(2.0)
            self.gone = unreachable(self._place)


def unreachable(place: Place) -> list[int]:
    """The other workers at whose address nobody listens."""
    gone = []
    for index, address in enumerate(place.addresses):
        host, _, port = address.rpartition(":")
        if index != place.index:
            try:
                socket.create_connection((host, int(port)), timeout=2.0).close()
            except OSError:
                gone.append(index)
    return gone
