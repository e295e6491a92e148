"""Files that others may have written, read whole: plain files alone, and no more than is sensible.

A named pipe would be waited for without end, and /dev/zero has no end.
"""

import io
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

MOST = 1 << 28  # bytes of one file
LARGEST = 2**64  # of a whole number, in its absolute value


def read(path: str | Path, pipes: bool = False) -> bytes:
    """What is in the file.

    Args:
      path: of the file.
      pipes: read the shell's own pipes too, as of `--config=<(command)`: their writer is there.

    Raises:
      OSError: it cannot be read, is no plain file, or is longer than MOST.
    """
    path = Path(path)
    is_shells_pipe = pipes and path.is_fifo() and not Path(os.path.realpath(path)).exists()
    waits = 0 if is_shells_pipe else os.O_NONBLOCK
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | waits)) as file:
        if not is_shells_pipe and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(None, "it is no plain file", str(path))
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise OSError(None, f"it holds more than {MOST >> 20} MiB", str(path))
    return content


def read_text(path: str | Path) -> str:
    """What is in a file of UTF-8, with every end of a line as "\\n".

    Raises:
      OSError: as `read`.
      ValueError: it is no UTF-8.
    """
    return io.StringIO(read(path).decode("utf-8"), newline=None).read()


def read_json(path: str | Path, finite: bool = True, pipes: bool = False) -> Any:
    """The content of a JSON file, whose whole numbers have at most 64 bits.

    Args:
      path: of the file.
      finite: refuse NaN, infinity, and numbers that float64 takes for infinity.
      pipes: as of `read`.

    Raises:
      OSError: as `read`.
      ValueError: it is not such JSON.
    """
    only_finite: Any = {"parse_constant": _refuse, "parse_float": _fraction} if finite else {}
    try:
        text = read(path, pipes).decode("utf-8")
        return json.loads(text, parse_int=_whole, **only_finite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _refuse(text: str) -> NoReturn:
    shown = text if len(text) <= 24 else f"{text[:24]} …"
    raise ValueError(f"the number {shown} is out of range")


def _whole(text: str) -> int:
    if len(text) > 21 or abs(int(text)) >= LARGEST:
        _refuse(text)
    return int(text)


def _fraction(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        _refuse(text)
    return value
