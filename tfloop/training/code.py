"""The user's own code that a run was made with: kept in its folder, and when it may be run again.

A run's folder holds source.json, which names each function with the digest of its files, and
source/ with their contents. Code that a folder names, and not the command line, is run only from
the user's own files: one that belongs to whoever runs the command, lies outside the run's folder,
and is what the run was made with. What is kept in the folder is for reading; it is never run unless
it is named. Needs no TensorFlow.
"""

import importlib.util
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tfloop import user_code
from tfloop.config import CODE, Config
from tfloop.errors import UserError
from tfloop.training import folders
from tfloop.user_code import is_reference

FILE, FOLDER = "source.json", "source"


def references(config: Config) -> list[tuple[str, str]]:
    """(setting, reference) of each function that the settings name."""
    named = [(name, value) for name in CODE for value in _values(config, name)]
    return [(name, value) for name, value in named if is_reference(value)]


def _values(config: Config, name: str) -> tuple[str, ...]:
    value = getattr(config, name)
    return value if isinstance(value, tuple) else (value,)


def store(folder: Path, config: Config) -> None:
    """Keep what the settings name in the run's folder; where it is kept already, nothing is done.

    Raises:
      UserError: the folder cannot be written.
    """
    stored, entries = _stored(folder), {}
    for flag, reference in references(config):
        code = user_code.load(reference, flag, or_dict=True)
        if not code.files:
            continue
        paths = [str(Path(path).resolve()) for path in code.files]
        entry = {"digest": code.digest, "files": paths}
        entries[f"{flag}={_short(reference)}"] = entry
        kept = folder / FOLDER / code.digest[:12]
        if not kept.is_dir():
            _make(kept)
            for path, content in code.files.items():
                folders.write(kept / Path(path).name, content)
    if entries and entries != stored:
        folders.write_json(folder / FILE, {**stored, **entries})


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


def _stored(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _short(reference: str) -> str:
    """Without the folder: "model.py:make"."""
    source, _, function = reference.rpartition(":")
    return f"{Path(source).name}:{function}"


def trusted(
    folder: Path,
    config: Config,
    named: Collection[str] = (),
    override: bool = False,
    goes_on: bool = False,
) -> Config:
    """The settings of a run, whose code may be run now, with the paths where it is.

    Args:
      folder: the run's.
      config: its settings.
      named: the settings that were given on the command line; their code is run as it is.
      override: take files that changed since the run was made.
      goes_on: the run is to go on, for which named code may not have changed either.

    Raises:
      UserError: code that is not there, is not the user's own, or is not what the run was made
        with.
    """
    stored = _stored(folder)
    found: dict[str, dict[str, str]] = {}
    for flag, reference in references(config):
        if flag in named:
            if override or not goes_on:
                continue
            entry = stored.get(f"{flag}={_short(reference)}")
            if entry and (changed := _changed(reference, entry)):
                raise UserError(_of_other_source(folder, flag, changed))
            continue
        entry = stored.get(f"{flag}={_short(reference)}")
        place = _place(folder, reference, entry)
        if place is None:
            kept = _kept(folder, entry, reference)
            raise UserError(
                f"{folder}: was made with --{flag}={reference}, which is not among your own files "
                f"as it was; name it: --{flag}={kept}"
            )
        if not override and (changed := _changed(place, entry)):
            raise UserError(_of_other_source(folder, flag, changed))
        found.setdefault(flag, {})[reference] = place
    values = {}
    for flag, by_reference in found.items():
        moved = tuple(by_reference.get(value, value) for value in _values(config, flag))
        values[flag] = moved if isinstance(getattr(config, flag), tuple) else moved[0]
    return config.replace(**values) if values else config


def _of_other_source(folder: Path, flag: str, path: str) -> str:
    return (
        f"{folder}: {path} of --{flag} is not what the run was made with, which is kept in "
        f"{folder / FOLDER}; put it back, or go on with what it is now: --{flag} names it for a "
        "finished run, --override for one that is resumed"
    )


def _place(folder: Path, reference: str, entry: Any) -> str | None:
    """The reference with the path where the user's own file is; None where it is nowhere."""
    source, _, function = reference.rpartition(":")
    if not source.endswith(".py"):
        try:
            spec = importlib.util.find_spec(source)
        except (ImportError, ValueError):
            return None
        return reference if spec and spec.origin and _is_own(folder, Path(spec.origin)) else None
    candidates = [Path(source)]
    if isinstance(entry, dict):
        candidates += [Path(p) for p in entry.get("files", ()) if Path(p).name == Path(source).name]
    for path in candidates:
        if path.is_file() and _is_own(folder, path):
            return f"{path}:{function}"
    return None


def _is_own(folder: Path, path: Path) -> bool:
    """Does a file belong to whoever runs this, outside the folder that names it?"""
    place = path.resolve()
    is_outside = folder.resolve() not in place.parents
    return is_outside and place.stat().st_uid == os.geteuid()


def _changed(reference: str, entry: Any) -> str:
    """The file that is not what the run was made with; "" where all are."""
    source = Path(reference.rpartition(":")[0])
    if not isinstance(entry, dict):
        return str(source)  # nobody has said what it was
    if source.suffix != ".py":
        return ""  # TensorFlow must start before it is imported; `store` sees to it then
    names = [Path(path).name for path in entry.get("files", ())]
    files = {}
    for name in names:
        path = source.parent / name
        try:
            files[str(path)] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return str(path)
    return "" if user_code.digest_of(files) == entry.get("digest") else listed_names(names)


def listed_names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _kept(folder: Path, entry: Any, reference: str) -> str:
    digest = entry.get("digest", "") if isinstance(entry, dict) else ""
    return f"{folder / FOLDER / digest[:12] / _short(reference)}" if digest else reference


def check_config_file(path: str, config: Config, named: Collection[str]) -> Config:
    """The settings of a --config file, whose code may be run.

    Raises:
      UserError: it names code that the command line does not, and that is not the user's own.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return trusted(folder, config, named)
