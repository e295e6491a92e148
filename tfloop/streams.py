"""Standard output and error, whatever becomes of them.

- One that is closed from the start is nothing: what is written there is dropped.
- One that takes ASCII only gets plain characters in place of others: "x" for "×".
- Training does not depend on who watches. Where a reader or a terminal is gone, what would be shown
  is dropped, and the run goes on.
"""

import codecs
import contextlib
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

_PLAIN = {
    "×": "x",
    "÷": "/",
    "−": "-",
    "–": "-",
    "—": "-",
    "─": "-",
    "━": "-",
    "│": "|",
    "┃": "|",
    "…": "...",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "±": "+-",
    "·": "*",
    "•": "*",
    "√": "sqrt ",
    "Σ": "sum ",
    "σ": "sigma",
    "μ": "u",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}


def prepare() -> None:
    """Make the standard streams such that writing text to them cannot fail."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or the next file to be opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (it stays)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    codecs.register_error("tfloop.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="tfloop.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """In place of what an encoding lacks; bytes of names that are no text are written as \\xNN."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(map(_plain_character, found)), error.end


def _plain_character(character: str) -> str:
    if character in _PLAIN:
        return _PLAIN[character]
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte, by surrogateescape
        return f"\\x{ord(character) - 0xDC00:02x}"
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain or "?"


def go_on_without_readers() -> None:
    """From now on, what cannot be written is dropped."""
    sys.stdout = _Steady(sys.stdout)
    sys.stderr = _Steady(sys.stderr)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """After this block the streams are those that were there before, but for one that moved."""
    before = sys.stdout, sys.stderr
    try:
        yield
        sys.stdout.flush()  # here, where it may fail without harm
    except BrokenPipeError:
        drop(before[0])
    finally:
        sys.stdout, sys.stderr = before
        if _moved:
            sys.stderr = _moved[-1]


_moved: list[Any] = []


def move_stderr(stream: Any) -> None:
    """From now on, to the end of the process, Python's errors go there."""
    sys.stderr = _Steady(stream)
    _moved.append(sys.stderr)


def drop(stream: Any) -> None:
    """Let what is still to be written to it, and what comes later, go nowhere."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


class _Steady:
    """A text stream whose writing does not fail."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            drop(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            drop(self._stream)
