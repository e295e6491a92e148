"""Run folders: made, found again, locked. Needs no TensorFlow.

A run's folder holds config.json from its first moment, checkpoints/ while it goes on, event files in train/, test/ and
validation/, and result.json at every end, with "finished" true where all epochs were done.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tfloop.config import FIELDS, GROUPS, Config
from tfloop.errors import UserError

RESULT = "result.json"
CHOSEN = ("shards", "intra_op_threads", "inter_op_threads")  # settings that are chosen for the machine where they are 0
FREE = {name for group in ("where and how it runs", "looking inside", "what is written") for name in GROUPS[group]}


def create(config: Config) -> Path:
    """A new folder in config.logdir, never one that was there: "article2-001", "article2-002" …"""
    folder = numbered(Path(config.logdir), name_of(config))
    write(folder / "config.json", config.to_json())
    return folder


def numbered(logdir: Path, name: str) -> Path:
    """A new folder NAME-001, NAME-002 …, the first that is not there.

    Raises:
      UserError: it cannot be made.
    """
    number = 1
    while True:
        folder = logdir / f"{name}-{number:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"--logdir={logdir}: cannot make {folder}: {error.strerror}") from None


def make(folder: Path, config: Config) -> None:
    """This very folder, for a run with these settings.

    Raises:
      UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)  # it is there where making it was interrupted
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}") from None
    write(folder / "config.json", config.to_json())


def name_of(config: Config) -> str:
    """The name that its runs' folders begin with.

    Raises:
      UserError: it is no plain name.
    """
    name = config.name or config.preset
    if Path(name).name != name:
        raise UserError(f"--name={name}: expected a plain name, not a path; --logdir chooses the folder")
    return name


def newest_unfinished(config: Config) -> Path | None:
    """The newest of the folders that `create` made under this name, unless it is finished or there is none."""
    newest = next(iter(_newest_first(config)), None)
    return newest if newest and (newest / "config.json").is_file() and not is_finished(newest) else None


def unfinished_group(config: Config) -> list[Path | None]:
    """For each of the seeds that `config` trains, the newest folder with these settings and that seed, None where there is
    none; [] where none of them is there, or all are finished."""
    found, made = [], [(path, old) for path in _newest_first(config) if (old := _settings_of(path))]
    for seed in config.all_seeds:
        own = config.of_one_run(seed)
        found.append(next((path for path, old in made if path not in found and not changed(old, own)), None))
    begun = [path for path in found if path]
    return found if begun and not (len(begun) == len(found) and all(map(is_finished, begun))) else []


def _newest_first(config: Config) -> list[Path]:
    name = name_of(config)
    made = [path for path in Path(config.logdir).glob(f"{name}-*") if path.name.removeprefix(f"{name}-").isdecimal()]
    return sorted(made, key=lambda path: int(path.name.removeprefix(f"{name}-")), reverse=True)


def _settings_of(folder: Path) -> Config | None:
    """The settings of the run in `folder`; None where it has none that can be read."""
    try:
        return Config.make(**settings(folder))
    except UserError:
        return None


def is_finished(folder: Path) -> bool:
    """Has the run done all its epochs?"""
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))["finished"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def epochs_done(folder: Path, config: Config) -> int:
    """The epochs of a finished run that has nothing left to do with these settings; else 0."""
    if not is_finished(folder):
        return 0
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    done = len(result["epochs"])
    return done if done >= config.epochs or has_settled(config, done, result["best_by_validation"]) else 0


def has_settled(config: Config, done: int, best: dict | None) -> bool:
    """Did the last of the epochs done, as many as --early_stopping says, bring nothing better?"""
    return bool(config.early_stopping and best and done - best["epoch"] >= config.early_stopping)


def settings(folder: Path) -> dict:
    """The settings of the run in `folder`, unchecked.

    Raises:
      UserError: it is no run's folder.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a run's folder: it has no config.json")
    return Config.read(folder / "config.json")


def resumed(folder: Path, asked: Config, given: dict, override: bool) -> Config:
    """The settings of the run in `folder` with `given` in place of its own, on the devices that are `asked` for.

    Raises:
      UserError: a given setting changes the mathematics of the run, unless `override`.
    """
    old = Config.make(**settings(folder))
    new = old.replace(**{**_devices(old, asked), **given})
    if not override and (names := changed(old, new)):
        raise UserError(f"--resume={folder}: " + ", ".join(f"--{name} is {_text(getattr(old, name))} in this run, not "
                        f"{_text(getattr(new, name))}" for name in names) + "; that changes its mathematics: leave it out, "
                        "or add --override")
    return new


def resumed_group(folder: Path, asked: Config, given: dict) -> Config:
    """The settings `asked` for, with what the run in `folder`, one of the group, had chosen for its machine."""
    old = Config.make(**settings(folder))
    return asked.replace(**{name: getattr(old.replace(**_devices(old, asked)), name) for name in CHOSEN if name not in given})


def _devices(old: Config, asked: Config) -> dict:
    """The devices that are asked for; what was chosen for others is to be chosen anew."""
    where = {name: getattr(asked, name) for name in ("strategy", "replicas")}
    return where | ({} if all(getattr(old, name) == value for name, value in where.items()) else dict.fromkeys(CHOSEN, 0))


def changed(old: Config, new: Config) -> list[str]:
    """The settings that differ and change the mathematics of a run, not only where it runs and what it writes."""
    free = FREE | (set() if _depends_on_epochs(old) else {"epochs"})
    return [name for name in FIELDS if name not in free and getattr(old, name) != getattr(new, name)]


def _depends_on_epochs(config: Config) -> bool:
    """Is the schedule as long as the run?"""
    return config.schedule in ("polynomial", "cosine", "one_cycle") and config.decay_steps is None


def _text(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_writable(folder: Path, flag: str = "--logdir") -> None:
    """Say it before minutes of training, not after. What does not exist yet is judged by its nearest parent."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{flag}={folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag}={folder}: {there} is not writable")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder for this process. The system lets go of it when the process ends, however it does.

    Raises:
      UserError: another process holds it.
    """
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process trains this run; wait for it, or end it") from None
        yield


def write(path: Path, text: str) -> None:
    """Under a temporary name first, then on the disk, then renamed: what bears the name is whole.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def write_json(path: Path, content: dict) -> None:
    write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
