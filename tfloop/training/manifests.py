"""The manifests of a run's checkpoints: which there are, and whether they are whole.

Needs no TensorFlow.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tfloop import plain_files
from tfloop.errors import UserError
from tfloop.training import kinds

FORMAT = 2
MANIFEST = "manifest.json"


def all_in(folder: str | Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    paths = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return sorted(filter(number_of, paths), key=number_of, reverse=True)


def number_of(path: Path) -> int:
    """Of a checkpoint, from 1 on, in the order they were made; 0 for what is none."""
    found = re.fullmatch(r"(\d{6,18})-step-\d{8,18}", path.name, re.ASCII)
    return int(found[1]) if found else 0


def newest(
    folder: str | Path, warn: Callable[[str], None] = lambda message: None
) -> tuple[Path, dict[str, Any]]:
    """(the newest checkpoint in `folder` that is whole, its manifest).

    Args:
      folder: of the checkpoints.
      warn: is told of every one that is not whole.

    Raises:
      UserError: there is none, all are damaged, or the newest whole one is of another format.
    """
    paths = all_in(folder)
    if not paths:
        raise UserError(f"{folder}: holds no checkpoint")
    for path in paths:
        try:
            return path, read_manifest(path)
        except DamagedCheckpoint as error:
            warn(error.as_flags)
    names = ", ".join(path.name for path in paths)
    raise UserError(f"{folder}: every checkpoint is damaged: {names}")


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not those that were written."""


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after comparing it and every file with its sum.

    Raises:
      DamagedCheckpoint: the manifest or a file is missing or damaged.
      UserError: it is of another format.
    """
    file = path / MANIFEST
    try:
        manifest = plain_files.read_json(file, finite=False)
        digest, version = manifest.pop("sha256_of_this", None), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{file}: missing or damaged: {error}") from None
    is_whole = digest == sum_of(manifest)
    if version != FORMAT and (is_whole or isinstance(version, int)):
        raise UserError(f"{path}: has format {version}, this version of tfloop reads {FORMAT}")
    if not is_whole:
        raise DamagedCheckpoint(f"{file}: damaged: its SHA-256 sum is not the one it names")
    if name := kinds.wrong(manifest, _KINDS) or next((n for n in _NEEDED if n not in manifest), ""):
        raise DamagedCheckpoint(f"{path / MANIFEST}: damaged: its {name} is not what a run writes")
    for name, expected in manifest["sha256"].items():
        file = path / Path(name).name
        if not file.is_file() or sum_of_file(file) != expected:
            raise DamagedCheckpoint(
                f"{file}: missing or damaged: its SHA-256 sum is not the one in {MANIFEST}"
            )
    of_tensorflow = {file.name for file in path.iterdir() if file.name.startswith("state")}
    if not of_tensorflow or of_tensorflow - set(manifest["sha256"]):  # it would read them unchecked
        raise DamagedCheckpoint(f"{path}: damaged: {MANIFEST} does not name the files beside it")
    return manifest


def sum_of_file(path: Path) -> str:
    """SHA-256, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 22), b""):
            found.update(part)
    return found.hexdigest()


_NEEDED = ("sha256",)
_KINDS: dict[str, Any] = {
    "sha256": kinds.Each(str),
    "tfloop": str,
    "config": dict,
    "data": {"inputs": dict, "targets": dict, "kinds": kinds.Each(dict)},
    "ranges": kinds.Each([kinds.ANY_NUMBER]),
    "fingerprint": int,
    "held_out_fingerprints": kinds.Each(int),
    "machine": dict,
    "steps_per_epoch": int,
    "reached": {
        "epochs": [kinds.ENTRY],
        "evaluations?": [kinds.ENTRY],
        "best?": kinds.Maybe(kinds.BEST),
        "rewinds?": [int],
        "rewound_to?": [int],
        "overridden_at?": [int],
        "goal?": str,
        "seconds": kinds.Each(kinds.NUMBER),
        "resumed_at": [int],
    },
    "best": kinds.Maybe({**kinds.BEST, "checkpoint": str}),
    "events": kinds.Each(int),
    "part": kinds.Maybe(
        {
            "steps": int,
            "sums": [kinds.ANY_NUMBER],
            "worst?": float,
            "seconds?": kinds.NUMBER,
            "waited?": kinds.NUMBER,
            "learning_rate?": kinds.Maybe(kinds.NUMBER),
        }
    ),
    "without_gradient": [str],
}


def sum_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
