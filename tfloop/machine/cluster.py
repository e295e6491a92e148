"""The meeting of a cluster's workers before they train.

Each listens at its address; the others say hello to the chief, which compares versions and settings
and answers, to all the same: go, or what is wrong. So a mistake of one is a clear line on every
one, within a bounded time. Whoever can reach the chief's port may connect (see `reception`), and
only who holds the cluster's token is answered (see `messages`).
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from tfloop.config import FIELDS, Config
from tfloop.errors import UserError
from tfloop.machine.messages import PATIENCE, TOKEN, opened, read_line, send, signed
from tfloop.machine.places import Place
from tfloop.machine.reception import MOST, Reception, Visitor
from tfloop.version import __version__
from tfloop.wording import counted, joined, printable

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
LINGER = 10.0  # seconds that the chief stays to tell those who come late what is wrong


class Meeting(NamedTuple):
    """What a meeting comes to.

    Attributes:
      settings: to train with. They are the chief's, but for what MAY_DIFFER.
      links: the connections that were met over, by worker: the chief's to all others, the others'
        to the chief.
    """

    settings: Config
    links: dict[int, socket.socket]


def meet(place: Place, asked: Config, settings: Config, device: str) -> Meeting:
    """Wait for all workers, and compare.

    Args:
      place: of this process.
      asked: the settings as given to this process.
      settings: on the chief, those to train with, which are a resumed run's where there is one.
      device: "CPU" or "GPU".

    Raises:
      UserError: a port that is taken, a worker that did not come within asked.worker_timeout
        seconds, two of one index, or workers that differ; on all workers that are there.
      NothingToDo: as the chief says.
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
                with contextlib.closing(Reception(listener)) as reception:
                    return _gather(place, hello, settings, reception, deadline)
            answer, link = _ask(place, hello, asked.worker_timeout)
    except _CannotListen as error:
        if not place.is_chief:
            with contextlib.suppress(UserError):
                _ask(place, hello | {"error": error.as_flags}, asked.worker_timeout)
        raise
    if "error" in answer:
        raise UserError(printable(answer["error"]))
    if "done" in answer:
        raise NothingToDo(printable(answer["done"]))
    local = {name: getattr(asked, name) for name in MAY_DIFFER}
    return Meeting(_settings_of(place, answer, local), {0: link})


def _settings_of(place: Place, answer: dict, local: dict[str, Any]) -> Config:
    """Those that the chief sent, with this worker's own where they may differ."""
    settings = answer["settings"]
    if set(settings) != set(FIELDS) or settings["strategy"] != "multi_worker":
        raise UserError(f"{place.name(0)}, the chief, sent settings that are no cluster's")
    return Config.make(**{**settings, **local})


class NothingToDo(Exception):
    """The chief says that nothing is left to train."""


def refuse(place: Place, asked: Config, reason: str, is_mistake: bool = True) -> None:
    """On the chief: tell the workers, as they come, why there will be no training."""
    answer = {"error" if is_mistake else "done": f"{place.name(0)}: {reason}"}
    deadline = time.monotonic() + asked.worker_timeout
    refused: set[int] = set()
    with (
        contextlib.suppress(UserError, OSError),
        _listening(place) as listener,
        contextlib.closing(Reception(listener)) as reception,
    ):
        while len(refused) < len(place.addresses) - 1:
            event = reception.wait(deadline)
            if event is None:
                break
            if event.hello:
                refused.add(event.hello["index"])
                event.visitor.answer(answer)


class _CannotListen(UserError):
    pass


@contextlib.contextmanager
def _listening(place: Place) -> Iterator[socket.socket]:
    """A socket that listens at this worker's address, and at no other of this machine."""
    host, _, port = place.addresses[place.index].rpartition(":")
    try:
        family, address = _own_address(place, host.strip("[]"), int(port))
        listener = socket.socket(family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", "") or error
        raise _CannotListen(f"{place.name(place.index)}: cannot listen there: {reason}") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(len(place.addresses) + MOST)
        except OSError as error:
            raise _CannotListen(
                f"{place.name(place.index)}: cannot listen there: {error.strerror}; is there "
                "another process of this index, or of another job, and is it an address of this "
                "machine?"
            ) from None
        yield listener


def _own_address(place: Place, host: str, port: int) -> tuple[Any, Any]:
    """(family, address) to listen at.

    Many systems map their own name to 127.0.1.1, where no other machine reaches them. There it is
    the address from which this machine speaks to the other workers.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    is_named_so = host in ("localhost", "::1") or host.startswith("127.")
    is_loopback = str(address[0]).startswith("127.") or address[0] == "::1"
    others = [a for index, a in enumerate(place.addresses) if index != place.index]
    if is_named_so or not is_loopback or not others:
        return family, address
    other, _, other_port = others[0].rpartition(":")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((other.strip("[]"), int(other_port)))
        return family, (probe.getsockname()[0], port, *address[2:])


# --- the chief


def _gather(
    place: Place, own: dict, settings: Config, reception: Reception, deadline: float
) -> Meeting:
    """The chief's part: wait for every other worker, and answer.

    Go, to all at once; or what is wrong, as soon as it is known.
    """
    waiting: dict[int, Visitor] = {}
    others, wrong = set(range(1, len(place.addresses))), ""
    told: set[int] = set()
    while others - set(waiting) - told:
        event = reception.wait(deadline)
        if event is None:
            late = joined([place.name(index) for index in sorted(others - set(waiting) - told)])
            seconds = f"{settings.worker_timeout:g} s"
            wrong = wrong or f"{late} did not come within {seconds}{_turned_away(reception)}"
            break
        visitor, hello = event
        if not hello:  # it is gone again, and may come back
            if waiting.get(visitor.index) is visitor:  # type: ignore[arg-type]
                del waiting[visitor.index]  # type: ignore[arg-type]
            continue
        index = hello["index"]
        wrong = wrong or _difference(place, own, hello, others - set(waiting))
        if wrong:
            deadline = min(deadline, time.monotonic() + LINGER)
            for other in (*waiting.values(), visitor):
                other.answer({"error": f"the cluster cannot train: {wrong}"})
            told |= {*waiting, index}
            waiting.clear()
        else:
            waiting[index] = visitor
    if wrong:
        for visitor in waiting.values():
            visitor.answer({"error": f"the cluster cannot train: {wrong}"})
        raise UserError(f"the cluster cannot train: {wrong}")
    for visitor in waiting.values():
        visitor.answer({"settings": dataclasses.asdict(settings)})
    return Meeting(settings, {index: reception.keep(each) for index, each in waiting.items()})


def _turned_away(reception: Reception) -> str:
    """How many others connected, and why they were turned away."""
    parts = []
    if count := reception.turned_away["another token"]:
        parts.append(f"{counted(count, 'connection')} had another {TOKEN}")
    if count := sum(reception.turned_away.values()) - count:
        parts.append(f"{counted(count, 'connection')} said no hello")
    return f"; {joined(parts)}" if parts else ""


def _difference(place: Place, own: dict, hello: dict, missing: set[int]) -> str:
    """What is wrong with a worker that said hello; empty where nothing is."""
    index = hello["index"]
    if hello["workers"] != own["workers"]:
        theirs = printable(", ".join(hello["workers"]) or "none")
        return f"a worker {index} has another list of workers than worker 0: {theirs}"
    if "error" in hello:
        return printable(hello["error"])
    if not 0 < index < len(place.addresses):
        return f"a worker says that it has index {index}; there are {len(place.addresses)} workers"
    if index not in missing:
        return f"there are two workers with index {index}"
    for what in ("tfloop", "tensorflow", "device"):
        if hello.get(what) != own[what]:
            name, theirs = place.name(index), printable(str(hello.get(what)))
            return f"{name} has {what} {theirs}, worker 0 has {own[what]}"
    settings = hello["settings"]
    differences = [
        f"--{name}={printable(str(settings.get(name)))} where worker 0 has {value}"
        for name, value in own["settings"].items()
        if settings.get(name) != value
    ]
    return f"{place.name(index)} has {', '.join(differences)}" if differences else ""


# --- the others


def _ask(place: Place, hello: dict, timeout: float) -> tuple[dict, socket.socket]:
    """Say hello to the chief until it answers: (the answer, the connection).

    Raises:
      UserError: there is no answer, or the chief has another token.
    """
    host, _, port = place.addresses[0].rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        with contextlib.suppress(OSError, ValueError):
            patience = max(0.1, min(left, PATIENCE))
            address = (host.strip("[]"), int(port))
            connection = socket.create_connection(address, timeout=patience)
            try:
                # The chief waits as long for the others.
                answer = _converse(connection, hello, max(0.1, left + PATIENCE))
            except BaseException:
                connection.close()
                raise
            if answer is not None:
                return answer, connection
            connection.close()
            break
        if time.monotonic() > deadline:
            raise UserError(f"{place.name(0)}, the chief, did not answer within {timeout:g} s")
        time.sleep(0.1)
    raise UserError(
        f"{place.name(0)}, the chief, has another {TOKEN} in its environment; give all workers the "
        "same"
    )


def _converse(connection: socket.socket, hello: dict, patience: float) -> dict | None:
    """The chief's answer to the hello; None where it holds another token.

    Raises:
      OSError: it is gone, or takes too long.
      ValueError: it says something else.
    """
    nonce = secrets.token_hex(16)
    end = time.monotonic() + patience
    greeting, rest = read_line(connection, b"", time.monotonic() + PATIENCE)
    theirs = greeting.get("nonce")
    if not isinstance(theirs, str):
        raise ValueError("no chief")
    send(connection, {**signed(hello, theirs, nonce), "nonce": nonce})
    message, _ = read_line(connection, rest, end)
    if "refused" in message:
        return None
    answer = opened(message, nonce, theirs)
    reasons = [answer[name] for name in ("error", "done") if name in answer]
    if not all(isinstance(reason, str) for reason in reasons):
        raise ValueError("no answer")
    if not reasons and not isinstance(answer.get("settings"), dict):
        raise ValueError("no answer")
    return answer


def _to_compare(config: Config) -> dict:
    values = dataclasses.asdict(config)
    compared = {name: value for name, value in values.items() if name not in MAY_DIFFER}
    return json.loads(json.dumps(compared))
