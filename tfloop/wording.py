"""How numbers, shapes and lists are written in messages: each way once."""

import errno
import os
import re
from collections.abc import Iterable, Sequence


def plural(noun: str, count: int) -> str:
    """The noun in the number that `count` asks for: "epoch" or "epochs"."""
    if count == 1:
        return noun
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def counted(count: int, noun: str) -> str:
    """ "1 epoch", "5 epochs" """
    return f"{count} {plural(noun, count)}"


def shape_text(shape: Iterable[int | None]) -> str:
    """ "28×28×1" """
    return "×".join(map(str, shape))


def listed(values: Iterable[object]) -> str:
    """ "3,4,5", as a flag takes a list"""
    return ",".join(map(str, values))


def value_text(value: object) -> str:
    """A setting's value as one would type it after the flag's equals sign."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return listed(value) if isinstance(value, (tuple, list)) else str(value)


def joined(names: Sequence[str]) -> str:
    """ "a", "a and b", "a and b and c" """
    return " and ".join(names)


def names_text(names: Iterable[str], most: int = 8) -> str:
    """The names; of many the first ones and how many others; "nothing" where there are none."""
    shown = list(names)
    if not shown:
        return "nothing"
    if len(shown) > most:
        return f"{', '.join(shown[:most])} and {len(shown) - most} more"
    return ", ".join(shown)


def first_sentence(error: BaseException) -> str:
    """The kind of an error, and the first sentence of what it says, or so much as fits a line."""
    lines = str(error).strip().splitlines() or [""]
    sentence = lines[0].partition(". ")[0].rstrip(".")
    shown = sentence if len(sentence) <= 160 else f"{sentence[:160].rsplit(' ', 1)[0]} …"
    return f"{type(error).__name__}: {shown}"


_REASONS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)


def systems_reason(message: str) -> str:
    """What the system said in a message of TensorFlow's, such as that a disk is full; or ""."""
    return next((text for text in map(os.strerror, _REASONS) if text in message), "")


def of_tensorflow(message: str) -> str:
    """The first line of a message of TensorFlow's, or what the system said, without its nodes."""
    plain = re.sub(r"\{\{.*?\}\} ?", "", message).split(" [Op")[0].strip()
    return systems_reason(message) or plain.partition("\n")[0]


def without_controls(text: str) -> str:
    """The text with what a terminal would act on, as in a name of a file, written as \\x1b.

    Bytes of a name that are no text stay: a stream writes them so itself.
    """
    is_shown = [c.isprintable() or "\udc80" <= c <= "\udcff" for c in text]
    pairs = zip(text, is_shown, strict=True)
    return "".join(c if shown else f"\\x{ord(c):02x}" for c, shown in pairs)


def printable(text: str, most: int = 200) -> str:
    """A stranger's text, safe to print: one line of at most so many characters, no controls."""
    shown = without_controls(text)
    return shown if len(shown) <= most else f"{shown[:most]} …"
