"""Which files of a folder are shards, of which part, and whether they are all there."""

import re
from pathlib import Path

from tfloop.data import parts
from tfloop.data.tfrecords import PACKED, unpacked
from tfloop.errors import UserError

# "…tfrecord", "…tfrecords", "…tfrec", and TF-slim's names without that word.
_SHARD = re.compile(r"tfrec(ords?)?(-\d+-of-\d+)?$|-\d{5}-of-\d{5}$", re.IGNORECASE)
_PLACE = re.compile(r"-(\d+)-of-(\d+)(?=\D*$)")
_ENDING = re.compile(r"\.tfrec(ords?)?$", re.IGNORECASE)
_COPY = re.compile(r"[ _-]copy( ?\d+)?(?=\.|$)| ?\(\d+\)(?=\.|$)", re.IGNORECASE)


def is_shard(path: Path) -> bool:
    """Is it, by its name, a shard: not hidden, and with no other ending, such as .bak?"""
    name = path.name
    return not name.startswith(".") and bool(_SHARD.search(PACKED.sub("", name)))


def find(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """(part → its shards by name, shards of no part); compressed ones as their unpacked copies.

    Raises:
      UserError: some are missing, by the numbers in their names, or they are of two sets; or a
        compressed one cannot be unpacked.
    """
    found: dict[str, list[Path]] = {"train": [], "test": [], "validation": []}
    others: list[Path] = []
    for path in sorted(p for p in folder.iterdir() if is_shard(p) and p.is_file()):
        part = parts.of_file(PACKED.sub("", path.name))
        (found[part] if part else others).append(path)
    for files in found.values():
        _check_complete(files)
    return {part: [unpacked(path) for path in files] for part, files in found.items()}, others


def _check_complete(files: list[Path]) -> None:
    """Raises UserError where the numbers in the names, 3 of 10, do not make a whole."""
    by_base: dict[str, dict[int, dict[int, Path]]] = {}  # → of how many → number → file
    for path in files:
        name = _COPY.sub("", PACKED.sub("", path.name))
        place = _PLACE.search(name)
        base = _ENDING.sub("", name[: place.start()] if place else name)
        number, count = (int(place[1]), int(place[2])) if place else (0, 0)
        numbers = by_base.setdefault(base, {}).setdefault(count, {})
        if number in numbers:
            raise UserError(
                f"{path.parent}: {numbers[number].name} and {path.name} are one shard by their "
                "names; remove the one that does not belong to it"
            )
        numbers[number] = path
    numbered = sorted(base for base, by_count in by_base.items() if any(by_count))
    if len(numbered) > 1 and all(map(parts.named, numbered)):
        raise UserError(
            f"{files[0].parent}: holds shards of two sets, {numbered[0]}-… and {numbered[1]}-…; "
            "remove those that do not belong to it"
        )
    for by_count in by_base.values():
        if len(by_count) > 1:
            one, other, *_ = (next(iter(numbers.values())).name for numbers in by_count.values())
            raise UserError(
                f"{files[0].parent}: holds shards of two sets, such as {one} and {other}; remove "
                "those that do not belong to it"
            )
        ((count, numbers),) = by_count.items()
        first = 1 if min(numbers) == 1 and max(numbers) == count else 0
        if missing := sorted(set(range(first, first + count)) - set(numbers)):
            example = next(iter(numbers.values())).name
            raise UserError(
                f"{files[0].parent}: {len(missing)} of {count} shards are missing, the first is "
                f"{_numbered(example, missing[0])}"
            )


def _numbered(name: str, number: int) -> str:
    """The name of a shard with another number."""
    return _PLACE.sub(lambda place: f"-{number:0{len(place[1])}d}-of-{place[2]}", name)
