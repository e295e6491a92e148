"""Where a run that is asked to end may break off what it is doing.

A compiled call ends between two steps, an evaluation between two batches: there one asks. Tracing
cannot ask, but it can be broken off anywhere, since nothing has changed yet: there whoever handles
the signal raises StopAsked.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

AT_ONCE = 0.2  # seconds within which several signals are one: systemd sends SIGTERM and SIGHUP
LONGEST = 1.0  # seconds of compiled work between two questions


class StopAsked(BaseException):
    """What was being done was broken off, because the run is asked to end.

    It is no Exception: it is raised amid other people's code, which catches those.

    Attributes:
      signal: that asked, where it was raised at once; else 0.
    """

    def __init__(self, signal: int = 0) -> None:
        super().__init__("asked to end")
        self.signal = signal


_under_way: list[int] = []  # the signal for which StopAsked was raised and has not come out yet


def break_off(signal: int) -> NoReturn:
    """Raise StopAsked, wherever the program is, for a signal that has come."""
    _under_way.append(signal)
    raise StopAsked(signal)


@contextlib.contextmanager
def surfacing() -> Iterator[None]:
    """What `break_off` raises in this block comes out of it, whatever became of it.

    TensorFlow's tracing and importing run through C, where an exception may be lost, or become
    another one, such as SystemError.
    """
    try:
        yield
    except BaseException as error:
        if stop := _pending():
            raise stop from error
        raise
    if stop := _pending():
        raise stop


def _pending() -> StopAsked | None:
    found = StopAsked(_under_way[-1]) if _under_way else None
    _under_way.clear()
    return found


_blocks: list[None] = []


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """In this block StopAsked may be raised anywhere."""
    _blocks.append(None)
    with surfacing():
        try:
            yield
        finally:
            _blocks.pop()


def is_interruptible() -> bool:
    return bool(_blocks)


abandoned: list[threading.Thread] = []  # with these, Python cannot be ended in an orderly way


def wait_for(work: Callable[[], Any]) -> Any:
    """What the work gives, which may be long and changes nothing.

    It is done in a thread of its own, so that StopAsked can be raised meanwhile. It then goes on,
    and nobody waits for it any more.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((work(), None))
        except BaseException as error:  # raised where the result is waited for
            outcome.extend((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)  # signals are handled in between
    except BaseException:
        abandoned.append(thread)
        raise
    result, error = outcome
    if error:
        raise error
    return result


class Pace:
    """How many pieces of work fit into LONGEST; at first unknown, so it begins with a few."""

    def __init__(self, first: int) -> None:
        self._pieces = first

    def next(self, left: int) -> int:
        return min(left, self._pieces)

    def note(self, pieces: int, seconds: float) -> None:
        """So many pieces took so long."""
        self._pieces = max(1, int(LONGEST * pieces / max(seconds, 1e-6)))
