"""The process that stands over a worker of a cluster, from before it meets the others to its end.

While TensorFlow starts a cluster it waits for the other workers without end, and neither signals
nor Python's threads get a turn. So a worker is two processes: the one that trains, and its
guardian, which never imports TensorFlow. The connections over which the workers met lead from
guardian to guardian from then on. A process that ends closes its own, whatever ends it; the
chief's guardian, which has one to every worker, tells the others.

The guardian ends the training process, and says why in one line, where

- TensorFlow has not started within the timeout after the meeting;
- another worker is gone, and the training process has not noticed within GRACE;
- it was asked to end, and has not within the timeout.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from tfloop.machine.places import Place
from tfloop.stopping import AT_ONCE
from tfloop.wording import joined

GRACE = 15.0  # seconds that training gets to end by itself once another worker is gone
MISTAKE = 5.0  # the same, where another ended with a mistake that may be this one's, too
BEAT = 1.0  # seconds between the signs of life that guardians send each other
LONGEST = 1 << 12  # bytes of one message
WORKER_LOST = 4  # exit code
AGREED = (0, 3, 129, 130, 143)  # exit codes that all workers end with together
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Guard:
    """The training process's end of the line to its guardian."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def watch(self, links: dict[int, socket.socket]) -> None:
        """The workers have met: the guardian takes the connections, and waits for `started`."""
        for index, link in links.items():
            message = json.dumps({"link": index}).encode() + b"\n"
            socket.send_fds(self._line, [message], [link.fileno()])
            link.close()
        self._send({"met": True})

    def started(self) -> None:
        """TensorFlow runs on all workers, and signals are listened to."""
        self._send({"started": True})

    def gone(self) -> list[int]:
        """The workers that are gone, as far as can be told within some seconds."""
        self._send({"gone": True})
        with contextlib.suppress(OSError, ValueError), self._line.makefile("rb") as file:
            return [int(index) for index in json.loads(file.readline(LONGEST))]
        return []

    def _send(self, message: dict) -> None:
        self._line.sendall(json.dumps(message).encode() + b"\n")


def stand_over(place: Place, timeout: float) -> Guard:
    """Go on in a process of its own, over which this one stands.

    Returns in the new process only; this one ends with the exit code of the new one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # One that is ignored from the start, as nohup asks for, stays so.
    heeded = [each for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, (*heeded, signal.SIGTSTP))
    guardians, line = socket.socketpair()
    guardian = os.getpid()
    child = os.fork()
    if child:
        line.close()
        raise SystemExit(_Guardian(place, timeout, child, guardians, heeded).run())
    guardians.close()
    end_with(guardian, signal.SIGKILL)
    os.setpgid(0, 0)  # what a terminal or a shell sends comes once, from the guardian
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*heeded, signal.SIGTSTP))
    return Guard(line)


def end_with(parent: int, number: int) -> None:
    """This process gets the signal when its parent ends. Linux can do that."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it has ended in between
        os.kill(os.getpid(), number)


def lost_text(place: Place, lost: list[int]) -> str:
    names = joined([place.name(index) for index in lost])
    return f"{names} {'are' if len(lost) > 1 else 'is'} gone; {_AGAIN}"


_AGAIN = "start the cluster again with --resume=auto to go on from the last checkpoint"


def _is_stopped(process: int) -> bool:
    """Was it stopped, as by SIGSTOP? Linux can tell."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/stat", encoding="utf-8") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"
    return False


class _Link:
    """The connection to another worker's guardian."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.heard = time.monotonic()
        self.has_started = False
        self.code: int | None = None  # with which it has ended
        self.is_open = True
        self._received = b""

    def send(self, message: dict) -> None:
        if self.is_open:
            with contextlib.suppress(OSError):
                self.connection.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT)

    def read(self) -> list[dict]:
        """The messages that have come.

        Raises:
          OSError: the other end is closed, or no guardian's.
        """
        received = self.connection.recv(LONGEST, socket.MSG_DONTWAIT)
        *lines, self._received = (self._received + received).split(b"\n")
        if not received or len(self._received) > LONGEST:
            raise ConnectionError
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise ConnectionError from None
        self.heard = time.monotonic()
        return [message for message in messages if isinstance(message, dict)]


class _Guardian:
    def __init__(
        self,
        place: Place,
        timeout: float,
        child: int,
        line: socket.socket,
        heeded: Sequence[signal.Signals] = SIGNALS,
    ) -> None:
        self._place, self._timeout, self._child, self._line = place, timeout, child, line
        self._heeded = set(heeded)
        self._links: dict[int, _Link] = {}
        self._received = b""
        self._handed: list[int] = []  # file descriptors that have come with messages
        self._gone: list[int] = []  # other workers, as they went
        self._asked = self._has_started = False
        self._asked_at = 0.0
        self._deadline = float("inf")  # by which the child must have ended
        self._why = ""  # the line that is said then
        self._code = WORKER_LOST
        self._beaten = 0.0
        self._asks_who: float | None = None  # since when the child asks who is gone
        self._selector = selectors.DefaultSelector()
        self._selector.register(line, selectors.EVENT_READ)

    def run(self) -> int:
        """Stand over the child until it ends; the exit code."""
        while True:
            pid, status = os.waitpid(self._child, os.WNOHANG)
            if pid:
                return self._ended(status)
            for key, _ in self._selector.select(0.1):
                if key.data is None:
                    self._listen_to_child()
                else:
                    self._listen_to(key.data)
            self._hand_on_signals()
            self._beat()
            self._answer_who_is_gone()
            if time.monotonic() > self._deadline:
                return self._end_child()

    # -- the child

    def _listen_to_child(self) -> None:
        try:
            received, handed, _, _ = socket.recv_fds(self._line, LONGEST, 64)
        except OSError:
            received, handed = b"", []
        if not received:  # it ends
            self._selector.unregister(self._line)
            return
        self._handed += handed
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "link" in message:
                self._add_link(message["link"], socket.socket(fileno=self._handed.pop(0)))
            elif "met" in message:
                self._set_end(self._timeout, "", WORKER_LOST)
            elif "started" in message:
                self._has_started = True
                self._tell_all({"started": self._place.index})
                if not self._why:
                    self._deadline = float("inf")
            else:
                self._asks_who = time.monotonic()

    def _answer_who_is_gone(self) -> None:
        """Once it is known, or cannot be known any more; the child is about to end."""
        if self._asks_who is None:
            return
        now = time.monotonic()
        silent = [
            index
            for index, link in self._links.items()
            if link.code or (link.is_open and now - link.heard > 3 * BEAT)
        ]
        if self._gone or silent or now - self._asks_who > 5 * BEAT:
            with contextlib.suppress(OSError):
                self._line.sendall(json.dumps(self._gone or silent).encode() + b"\n")
            self._asks_who = None

    def _end_child(self) -> int:
        was_stopped = f"the training process was stopped, and the other workers went; {_AGAIN}"
        why = was_stopped if self._gone and _is_stopped(self._child) else self._why
        self._kill_child()
        self._say(why or self._not_started())
        return self._close(self._code)

    def _kill_child(self) -> None:
        os.kill(self._child, signal.SIGKILL)  # not waited for yet, so it is no other's number
        os.waitpid(self._child, 0)

    def _not_started(self) -> str:
        """Why TensorFlow waits: who has not started it, as far as is known."""
        late = [index for index, link in self._links.items() if not link.has_started]
        names = joined([self._place.name(index) for index in late]) or "the others"
        return (
            f"TensorFlow did not start within {self._timeout:g} s after the workers had met: it "
            f"waits for {names}; is a port blocked, or --worker_timeout too short?"
        )

    def _ended(self, status: int) -> int:
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number != signal.SIGTERM or not self._asked:
                self._say(f"the training process was killed by signal {number}")
            return self._close(128 + number)
        return self._close(os.WEXITSTATUS(status))

    def _close(self, code: int) -> int:
        self._tell_all({"ended": code})
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.connection.shutdown(socket.SHUT_WR)
        return code

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(f"tfloop: {text}", file=sys.stderr, flush=True)

    # -- signals

    def _hand_on_signals(self) -> None:
        while signal.sigpending() & self._heeded:
            number = signal.sigwait(self._heeded)
            if self._asked and time.monotonic() - self._asked_at < AT_ONCE:
                continue
            if self._asked or not self._has_started:
                self._kill_child()
                self._say("interrupted" if number == signal.SIGINT else "terminated")
                raise SystemExit(self._close(128 + number))
            self._asked, self._asked_at = True, time.monotonic()
            os.kill(self._child, number)
            why = f"did not end within {self._timeout:g} s after it was asked to: killed"
            self._set_end(self._timeout, why, 128 + number)
        if signal.SIGTSTP in signal.sigpending():
            signal.sigwait({signal.SIGTSTP})
            os.kill(self._child, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.kill(self._child, signal.SIGCONT)

    def _set_end(self, seconds: float, why: str, code: int) -> None:
        """The child must have ended by then; the earliest of several such times counts."""
        at = time.monotonic() + seconds
        if at < self._deadline:
            self._deadline, self._why, self._code = at, why, code

    # -- the other workers

    def _add_link(self, index: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        link = self._links[index] = _Link(connection)
        self._selector.register(connection, selectors.EVENT_READ, link)

    def _listen_to(self, link: _Link) -> None:
        index = next(index for index, other in self._links.items() if other is link)
        try:
            messages = link.read()
        except BlockingIOError:
            return
        except OSError:
            self._selector.unregister(link.connection)
            link.is_open = False
            if link.code is None:
                self._lose(index, self._grace(link))
            return
        for message in messages:
            self._take(index, link, message)

    def _take(self, index: int, link: _Link, message: dict[str, Any]) -> None:
        if "started" in message:
            link.has_started = True
        if isinstance(code := message.get("ended"), int):
            link.code = code
            has_trained = self._has_started and link.has_started
            if not has_trained and code < 128:  # a mistake that all have made is said by each
                self._lose(index, MISTAKE)
            elif not has_trained or code not in AGREED:
                self._lose(index, self._grace(link))
        if isinstance(lost := message.get("gone"), int) and lost != self._place.index:
            seconds = message.get("seconds")
            self._lose(lost, seconds if seconds in (0.0, MISTAKE, GRACE) else GRACE)

    def _grace(self, link: _Link) -> float:
        """Seconds in which the child may notice that this one is gone.

        Where TensorFlow has not started, here or there, it cannot.
        """
        return GRACE if self._has_started and link.has_started else 0.0

    def _lose(self, index: int, seconds: float) -> None:
        """A worker is gone; the child gets so long to end by itself."""
        if index in self._gone or not 0 <= index < len(self._place.addresses):
            return
        self._gone.append(index)
        self._tell_all({"gone": index, "seconds": seconds})
        self._set_end(seconds, lost_text(self._place, [index]), WORKER_LOST)

    def _tell_all(self, message: dict) -> None:
        for link in self._links.values():
            link.send(message)

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._beaten < BEAT:
            return
        if now - self._beaten > 5 * BEAT:  # this process itself was stopped: hear first
            for link in self._links.values():
                link.heard = now
        self._beaten = now
        self._tell_all({"beat": True})
        for index, link in self._links.items():
            if link.is_open and link.code is None and now - link.heard > self._timeout:
                self._lose(index, self._grace(link))
