"""The chief's reception at a meeting: takes all who connect, and hands on who says hello.

From those who do not sign, or send no hello, it takes a limited number of bytes and seconds,
whatever they send.
"""

import collections
import contextlib
import json
import secrets
import selectors
import socket
import time
from typing import NamedTuple

from tfloop.machine.messages import LONGEST, PATIENCE, OtherToken, opened, parsed, send, signed

MOST = 64  # visitors that may be about to say hello, beside the workers


class Visitor:
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
            message = parsed(line)
            nonce = message.get("nonce")
            if not isinstance(nonce, str):
                raise ValueError
            hello = opened(message, self.nonce, nonce)
        except OtherToken:
            self._tell({"refused": "another token"})
            raise ValueError("another token") from None
        except ValueError:
            raise ValueError("no hello") from None
        if not is_hello(hello):
            raise ValueError("no hello")
        self.index, self._their_nonce = hello["index"], nonce
        return hello

    def answer(self, message: dict) -> None:
        self._tell(signed(message, self._their_nonce, self.nonce))

    def _tell(self, message: dict) -> None:
        with contextlib.suppress(OSError):  # one that is gone need not be told
            self.connection.settimeout(PATIENCE)
            send(self.connection, message)


class Event(NamedTuple):
    """A worker said hello, or, where there is no hello, is gone again."""

    visitor: Visitor
    hello: dict | None


class Reception:
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

    def keep(self, visitor: Visitor) -> socket.socket:
        """The connection is no longer the reception's."""
        self._selector.unregister(visitor.connection)
        visitor.connection.settimeout(PATIENCE)
        return visitor.connection

    def wait(self, deadline: float) -> Event | None:
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

    def _strangers(self) -> list[Visitor]:
        keys = self._selector.get_map().values()
        return [key.data for key in keys if key.data and key.data.index is None]

    def _part_with_the_slow(self) -> None:
        for visitor in self._strangers():
            if time.monotonic() > visitor.deadline:
                self._part_with(visitor, "no hello")

    def _part_with(self, visitor: Visitor, why: str) -> None:
        if visitor.index is None:
            self.turned_away[why] += 1
        self._selector.unregister(visitor.connection)
        visitor.connection.close()

    def _accept(self) -> None:
        strangers = self._strangers()
        if len(strangers) >= MOST:  # the one that has waited longest makes room
            self._part_with(min(strangers, key=lambda visitor: visitor.deadline), "no hello")
        with contextlib.suppress(OSError):
            visitor = Visitor(self._listener.accept()[0])
            try:
                visitor.greet()
            except OSError:
                visitor.connection.close()
                raise
            self._selector.register(visitor.connection, selectors.EVENT_READ, visitor)

    def _read(self, visitor: Visitor) -> Event | None:
        was_known = visitor.index is not None
        try:
            hello = visitor.read()
        except BlockingIOError:
            return None
        except (OSError, ValueError) as error:
            self._part_with(visitor, str(error) if isinstance(error, ValueError) else "no hello")
            return Event(visitor, None) if was_known else None
        return Event(visitor, hello) if hello else None


def is_hello(hello: dict) -> bool:
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
