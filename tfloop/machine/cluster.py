"""The meeting of a cluster's workers before they train.

Each listens at its address; the others say hello to the chief, which compares versions and settings
and answers, to all the same: go, or what is wrong. So a mistake of one is a clear line on every
one, within a bounded time.

Whoever can reach the chief's port may connect. So both sides show that they hold the cluster's
token, without sending it: the chief begins with a number of its own, and what follows is signed
with token and numbers (HMAC-SHA256). From those who do not sign, or send no hello, the chief takes
a limited number of bytes and seconds, whatever they send. Without a token anyone can sign.
"""

import collections
import contextlib
import dataclasses
import hashlib
import hmac
import importlib.metadata
import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.machine.places import Place
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
TOKEN = "TFLOOP_CLUSTER_TOKEN"  # the variable that holds it
LONGEST = 1 << 20  # bytes of one message
PATIENCE = 5.0  # seconds that a visitor has for its hello
LINGER = 10.0  # seconds that the chief stays to tell those who come late what is wrong
MOST = 64  # visitors that may be about to say hello, beside the workers


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
                with contextlib.closing(_Reception(listener)) as reception:
                    return _gather(place, hello, settings, reception, deadline)
            answer, link = _ask(place, hello, asked.worker_timeout)
    except _CannotListen as error:
        if not place.is_chief:
            with contextlib.suppress(UserError):
                _ask(place, hello | {"error": error.as_flags}, asked.worker_timeout)
        raise
    if "error" in answer:
        raise UserError(printable(answer["error"]))
    local = {name: getattr(asked, name) for name in MAY_DIFFER}
    return Meeting(Config.make(**{**answer["settings"], **local}), {0: link})


def refuse(place: Place, asked: Config, reason: str) -> None:
    """On the chief: tell the workers, as they come, why there will be no training."""
    deadline = time.monotonic() + asked.worker_timeout
    refused: set[int] = set()
    with (
        contextlib.suppress(UserError, OSError),
        _listening(place) as listener,
        contextlib.closing(_Reception(listener)) as reception,
    ):
        while len(refused) < len(place.addresses) - 1:
            event = reception.wait(deadline)
            if event is None:
                break
            if event.hello:
                refused.add(event.hello["index"])
                event.visitor.answer({"error": f"{place.name(0)}: {reason}"})


class _CannotListen(UserError):
    pass


@contextlib.contextmanager
def _listening(place: Place) -> Iterator[socket.socket]:
    """A socket that listens at this worker's address, and at no other of this machine."""
    host, _, port = place.addresses[place.index].rpartition(":")
    try:
        family, address = _own_address(place, host.strip("[]"), int(port))
        listener = socket.socket(family)
    except OSError as error:
        raise _CannotListen(
            f"{place.name(place.index)}: cannot listen there: {error.strerror or error}"
        ) from None
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


class _Visitor:
    """One that has connected to the chief: a worker perhaps."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.nonce = secrets.token_hex(16)
        self.deadline = time.monotonic() + PATIENCE
        self.index: int | None = None  # of the worker, once it has said hello
        self._their_nonce = ""
        self._received = b""

    def greet(self) -> None:
        self.connection.setblocking(False)
        self.connection.send(json.dumps({"nonce": self.nonce}).encode() + b"\n")

    def read(self) -> dict | None:
        """Its hello, once it is there.

        Raises:
          OSError: it is gone.
          ValueError: it says no hello, or does not sign it with the token.
        """
        received = self.connection.recv(1 << 16)
        if not received:
            raise ConnectionError
        self._received += received
        if self.index is not None or len(self._received) > LONGEST:
            raise ValueError("said too much")
        line, end, _ = self._received.partition(b"\n")
        if not end:
            return None
        self._received = b""
        try:
            message = _parsed(line)
            nonce = message.get("nonce")
            if not isinstance(nonce, str):
                raise ValueError
            hello = _opened(message, self.nonce, nonce)
        except _OtherToken:
            self._send({"refused": "another token"})
            raise ValueError("another token") from None
        except ValueError:
            raise ValueError("no hello") from None
        if not _is_hello(hello):
            raise ValueError("no hello")
        self.index, self._their_nonce = hello["index"], nonce
        return hello

    def answer(self, message: dict) -> None:
        self._send(_signed(message, self._their_nonce, self.nonce))

    def _send(self, message: dict) -> None:
        with contextlib.suppress(OSError):  # one that is gone need not be told
            self.connection.settimeout(PATIENCE)
            _send(self.connection, message)


class _Event(NamedTuple):
    """A worker said hello, or, where there is no hello, is gone again."""

    visitor: _Visitor
    hello: dict | None


class _Reception:
    """Takes those who connect, all at a time, and hands on who says hello."""

    def __init__(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self.turned_away: collections.Counter[str] = collections.Counter()  # by reason

    def close(self) -> None:
        """Part with all that are still here, but for those that were kept."""
        for key in list(self._selector.get_map().values()):
            if key.data:
                key.data.connection.close()
        self._selector.close()

    def keep(self, visitor: _Visitor) -> socket.socket:
        """The connection is no longer the reception's."""
        self._selector.unregister(visitor.connection)
        visitor.connection.settimeout(PATIENCE)
        return visitor.connection

    def wait(self, deadline: float) -> _Event | None:
        """The next event; None where there is none until the deadline."""
        while (left := deadline - time.monotonic()) > 0:
            self._part_with_the_slow()
            for key, _ in self._selector.select(min(left, 0.5)):
                if key.data and key.data.connection.fileno() < 0:  # made room for another
                    continue
                if not key.data:
                    self._accept()
                elif event := self._read(key.data):
                    return event
        return None

    def _strangers(self) -> list[_Visitor]:
        keys = self._selector.get_map().values()
        return [key.data for key in keys if key.data and key.data.index is None]

    def _part_with_the_slow(self) -> None:
        for visitor in self._strangers():
            if time.monotonic() > visitor.deadline:
                self._part_with(visitor, "no hello")

    def _part_with(self, visitor: _Visitor, why: str) -> None:
        if visitor.index is None:
            self.turned_away[why] += 1
        self._selector.unregister(visitor.connection)
        visitor.connection.close()

    def _accept(self) -> None:
        strangers = self._strangers()
        if len(strangers) >= MOST:  # the one that has waited longest makes room
            self._part_with(min(strangers, key=lambda visitor: visitor.deadline), "no hello")
        with contextlib.suppress(OSError):
            visitor = _Visitor(self._listener.accept()[0])
            try:
                visitor.greet()
            except OSError:
                visitor.connection.close()
                raise
            self._selector.register(visitor.connection, selectors.EVENT_READ, visitor)

    def _read(self, visitor: _Visitor) -> _Event | None:
        was_known = visitor.index is not None
        try:
            hello = visitor.read()
        except BlockingIOError:
            return None
        except (OSError, ValueError) as error:
            self._part_with(visitor, str(error) if isinstance(error, ValueError) else "no hello")
            return _Event(visitor, None) if was_known else None
        return _Event(visitor, hello) if hello else None


def _gather(
    place: Place, own: dict, settings: Config, reception: _Reception, deadline: float
) -> Meeting:
    """The chief's part: wait for every other worker, and answer.

    Go, to all at once; or what is wrong, as soon as it is known.
    """
    waiting: dict[int, _Visitor] = {}
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


def _turned_away(reception: _Reception) -> str:
    """How many others connected, and why they were turned away."""
    parts = []
    if count := reception.turned_away["another token"]:
        parts.append(f"{counted(count, 'connection')} had another {TOKEN}")
    if count := sum(reception.turned_away.values()) - count:
        parts.append(f"{counted(count, 'connection')} said no hello")
    return f"; {joined(parts)}" if parts else ""


def _is_hello(hello: dict) -> bool:
    """Are the values of the types that a worker sends?"""
    index, workers = hello.get("index"), hello.get("workers")
    texts = [hello.get(name, "") for name in ("tfloop", "tensorflow", "device", "error")]
    return (
        isinstance(index, int)
        and not isinstance(index, bool)
        and isinstance(workers, list)
        and all(isinstance(text, str) for text in (*workers, *texts))
        and isinstance(hello.get("settings"), dict)
    )


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
            if answer is None:
                connection.close()
                raise UserError(
                    f"{place.name(0)}, the chief, has another {TOKEN} in its environment; give all "
                    "workers the same"
                )
            return answer, connection
        if time.monotonic() > deadline:
            raise UserError(f"{place.name(0)}, the chief, did not answer within {timeout:g} s")
        time.sleep(0.1)


def _converse(connection: socket.socket, hello: dict, patience: float) -> dict | None:
    """The chief's answer to the hello; None where it holds another token.

    Raises:
      OSError: it is gone, or takes too long.
      ValueError: it says something else.
    """
    nonce = secrets.token_hex(16)
    end = time.monotonic() + patience
    with contextlib.closing(_Lines(connection)) as lines:
        theirs = lines.read(time.monotonic() + PATIENCE).get("nonce")
        if not isinstance(theirs, str):
            raise ValueError("no chief")
        _send(connection, {**_signed(hello, theirs, nonce), "nonce": nonce})
        message = lines.read(end)
    if "refused" in message:
        return None
    answer = _opened(message, nonce, theirs)
    if not isinstance(answer.get("error", ""), str):
        raise ValueError("no answer")
    if "error" not in answer and not isinstance(answer.get("settings"), dict):
        raise ValueError("no answer")
    return answer


class _Lines:
    """Reads messages from a connection, up to a length and a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._received = connection, b""

    def close(self) -> None:
        self._connection.settimeout(PATIENCE)

    def read(self, end: float) -> dict:
        while b"\n" not in self._received:
            self._connection.settimeout(max(0.01, end - time.monotonic()))
            received = self._connection.recv(1 << 16)
            self._received += received
            if not received or len(self._received) > LONGEST or time.monotonic() > end:
                raise ValueError("no message")
        line, _, self._received = self._received.partition(b"\n")
        return _parsed(line)


# --- messages


def _send(connection: socket.socket, message: dict) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _parsed(line: bytes) -> dict:
    """Raises ValueError where the line is no JSON object."""
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("too deep") from None
    if not isinstance(message, dict):
        raise ValueError("no message")
    return message


class _OtherToken(ValueError):
    pass


def _signed(content: dict, first: str, second: str) -> dict:
    """A message that holds the content, as text, and its signature."""
    text = json.dumps(content)
    return {"content": text, "signature": _signature(text, first, second)}


def _opened(message: dict, first: str, second: str) -> dict:
    """The content of a signed message.

    Raises:
      _OtherToken: it is signed with another token.
      ValueError: it is no signed message.
    """
    text, signature = message.get("content"), message.get("signature")
    if not isinstance(text, str) or not isinstance(signature, str):
        raise ValueError("not signed")
    wanted = _signature(text, first, second)
    if not hmac.compare_digest(signature.encode(errors="replace"), wanted.encode()):
        raise _OtherToken("another token")
    return _parsed(text.encode(errors="replace"))


def _signature(text: str, first: str, second: str) -> str:
    """HMAC-SHA256 by the cluster's token of a text and the numbers of both sides."""
    signed = json.dumps([first, second, text]).encode()
    return hmac.new(os.environ.get(TOKEN, "").encode(), signed, hashlib.sha256).hexdigest()


def _to_compare(config: Config) -> dict:
    values = dataclasses.asdict(config)
    compared = {name: value for name, value in values.items() if name not in MAY_DIFFER}
    return json.loads(json.dumps(compared))
