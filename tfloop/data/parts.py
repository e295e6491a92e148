"""The parts of a data set, by the names that people give them: folders, shards and arrays alike."""

import re
from collections.abc import Callable, Iterable

from tfloop.errors import UserError

NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation", "validate", "dev", "eval"),
}
_BY_NAME = {name: part for part, names in NAMES.items() for name in names}
NO_TEST = "has no test examples: those of the validation are taken as the test"


def named(name: str) -> str:
    """The part of this name, whatever the case of its letters; "" where it is none's."""
    return _BY_NAME.get(name.lower(), "")


def in_words(name: str) -> str:
    """The one part that the words of a name tell of: "training_set", "seg_test"; "" for none."""
    found = {_BY_NAME[word] for word in re.findall(r"[a-z]+", name.lower()) if word in _BY_NAME}
    return found.pop() if len(found) == 1 else ""


def of_file(name: str) -> str:
    """The part that a file's name begins with, or holds: "train-00000-of-00004", "set-test.…"."""
    begins = re.match(r"([a-z]+)(?![a-z])", name.lower())
    if begins and begins[1] in _BY_NAME:
        return _BY_NAME[begins[1]]
    ends = [word for word in re.findall(r"[-_]([a-z]+)\.", name.lower()) if word in _BY_NAME]
    return _BY_NAME[ends[0]] if ends else in_words(name)


def by_part(
    names: Iterable[str], where: str, part_of: Callable[[str], str] = named
) -> dict[str, str]:
    """part → the one of these names that is its own, for parts that are there.

    Args:
      names: of folders, or of arrays.
      where: where they are, for messages.
      part_of: the part that a name is of; "" for none.

    Raises:
      UserError: two names are of one part.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        if part := part_of(name):
            if part in found:
                raise UserError(
                    f"{where}: {name} stands beside {found[part]}; which one is to be taken?"
                )
            found[part] = name
    return found
