"""The user's own code that a run was made with: kept in its folder, and when it may be run again.

A run's folder holds source.json, which names each function with the digest of its files, and the
place of the data, and source/ with the files' contents. Code that a folder names, and not the
command line, is run only if the user has named it before: every function that was named on a
command line, or in Python, is noted in a file of the user's own, outside all run folders. What is
kept in a folder is for reading; it is never run unless it is named. Needs no TensorFlow.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from tfloop import plain_files, user_code
from tfloop.config import CODE, Config
from tfloop.errors import UserError
from tfloop.machine import devices
from tfloop.training import folders
from tfloop.user_code import is_reference

FILE, FOLDER = "source.json", "source"
_DATA = "data"  # the entry of FILE that says where the data lie


def references(config: Config) -> list[tuple[str, str]]:
    """(setting, reference) of each function that the settings name."""
    named = [(name, value) for name in CODE for value in _values(config, name)]
    return [(name, value) for name, value in named if is_reference(value)]


def _values(config: Config, name: str) -> tuple[str, ...]:
    value = getattr(config, name)
    return value if isinstance(value, tuple) else (value,)


def notes() -> Path:
    """The file that notes which functions the user has named: a line each."""
    return devices.state_folder() / "code.txt"


def _key(reference: str) -> str:
    """A reference as it is noted: with the whole path of a file."""
    source, _, function = reference.rpartition(":")
    return f"{Path(source).resolve()}:{function}" if source.endswith(".py") else reference


def _noted() -> set[str]:
    try:
        return set(plain_files.read_text(notes()).splitlines())
    except (OSError, UnicodeDecodeError):
        return set()


def note(references: Collection[str]) -> None:
    """Note that the user has named these functions. Where it cannot be, they are named again."""
    new = [key for key in map(_key, references) if key not in _noted() and "\n" not in key]
    if not new:
        return
    try:
        notes().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(notes(), "a", encoding="utf-8") as file:
            file.write("".join(f"{key}\n" for key in new))
    except OSError:
        return


def store(folder: Path, config: Config) -> None:
    """Keep what the settings name in the run's folder; where it is kept already, nothing is done.

    Raises:
      UserError: the folder cannot be written.
    """
    stored, entries = _stored(folder), {}
    note([reference for _, reference in references(config)])
    for flag, reference in references(config):
        code = user_code.load(reference, flag, or_dict=True)
        if not code.files:
            continue
        root = Path(next(iter(code.files))).resolve().parent
        contents = {
            str(Path(path).resolve().relative_to(root)): content
            for path, content in code.files.items()
        }
        digest = user_code.digest_of(contents)
        entry = {"digest": digest, "root": str(root), "files": [*contents]}
        entries[f"{flag}={_short(reference)}"] = entry
        kept = folder / FOLDER / digest[:12]
        if not kept.is_dir():
            for name, content in contents.items():
                _make((kept / name).parent)
                folders.write(kept / name, content)
    if not is_reference(config.dataset) and Path(config.dataset).exists():
        entries[_DATA] = {config.dataset: str(Path(config.dataset).resolve())}
    if entries and {**stored, **entries} != stored:
        folders.write_json(folder / FILE, {**stored, **entries})


def _with_place_of_data(folder: Path, config: Config) -> Config:
    """The settings, with the whole path that the data had, where they are still there.

    From another folder, the path as it was given may lead to other data.
    """
    places = _stored(folder).get(_DATA)
    place = places.get(config.dataset) if isinstance(places, dict) else None
    if is_reference(config.dataset) or not isinstance(place, str) or not Path(place).exists():
        return config
    if Path(config.dataset).resolve() == Path(place):
        return config
    return config.replace(dataset=place)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


def _stored(folder: Path) -> dict[str, Any]:
    try:
        content = plain_files.read_json(folder / FILE)
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
    needed: Collection[str] = CODE,
) -> Config:
    """The settings of a run, whose code may be run now, with the paths where it is.

    Args:
      folder: the run's.
      config: its settings.
      named: the settings that were given on the command line; their code is run as it is.
      override: take files that changed since the run was made.
      goes_on: the run is to go on, for which named code may not have changed either.
      needed: the settings whose code will be run.

    Raises:
      UserError: code that the user has not named, now or before, that is not there, or that is not
        what the run was made with.
    """
    stored, known = _stored(folder), _noted()
    note([reference for flag, reference in references(config) if flag in named])
    found: dict[str, dict[str, str]] = {}
    for flag, reference in references(config):
        entry = stored.get(f"{flag}={_short(reference)}")
        entry = entry if isinstance(entry, dict) else None
        if flag in named:
            place: str | None = reference
        elif flag not in needed:
            continue
        else:
            place = _place(reference, entry, known)
        if place is None:
            raise UserError(
                f"{folder}: its settings name code, --{flag}={reference}, that you have not named "
                f"here before; look at it, and name it: --{flag}={_kept(folder, entry, reference)}"
            )
        is_to_be_same = goes_on or flag not in named
        if is_to_be_same and not override and (changed := _changed(place, entry)):
            raise UserError(
                f"{folder}: {changed} of --{flag} is not what the run was made with, which is kept "
                f"in {folder / FOLDER}; put it back, or go on with what it is now: --{flag} names "
                "it for a finished run, --override for one that is resumed"
            )
        found.setdefault(flag, {})[reference] = place
    values = {}
    for flag, by_reference in found.items():
        moved = tuple(by_reference.get(value, value) for value in _values(config, flag))
        values[flag] = moved if isinstance(getattr(config, flag), tuple) else moved[0]
    config = config.replace(**values) if values else config
    return config if "dataset" in named else _with_place_of_data(folder, config)


def _place(reference: str, entry: dict | None, known: set[str]) -> str | None:
    """The reference with the path of a file that the user named before; None where there is none.

    Nothing is imported to find that out.
    """
    source, _, function = reference.rpartition(":")
    if not source.endswith(".py"):
        return reference if reference in known else None
    candidates = [Path(source)]
    if entry and isinstance(entry.get("root"), str):
        candidates.append(Path(entry["root"]) / Path(source).name)
    for path in candidates:
        if path.is_file() and _key(f"{path}:{function}") in known:
            return f"{path}:{function}"
    return None


def _changed(reference: str, entry: dict | None) -> str:
    """The files that are not what the run was made with; "" where all are, or nobody knows."""
    source = Path(reference.rpartition(":")[0])
    names = entry.get("files") if entry else None
    if source.suffix != ".py" or not isinstance(names, list) or entry is None:
        return ""  # a package's files are found only by importing it
    contents = {}
    for name in map(str, names):
        path = source.parent / name
        try:
            contents[name] = plain_files.read_text(path)
        except (OSError, UnicodeDecodeError):
            return str(path)
    if user_code.digest_of(contents) == entry.get("digest"):
        return ""
    return names[0] if len(names) == 1 else f"one of {', '.join(map(str, names))}"


def _kept(folder: Path, entry: dict | None, reference: str) -> str:
    digest = str(entry.get("digest", "")) if entry else ""
    place = folder / FOLDER / digest[:12] / _short(reference)
    is_there = digest and Path(str(place).rpartition(":")[0]).is_file()
    return str(place) if is_there else reference


def check_config_file(path: str, config: Config, named: Collection[str]) -> Config:
    """The settings of a --config file, whose code may be run.

    Raises:
      UserError: it names code that the user has not named, now or before.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return trusted(folder, config, named)
