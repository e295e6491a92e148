"""Run folders: made, found again, locked. Needs no TensorFlow.

A run's folder holds config.json from its first moment, checkpoints/ while it goes on, event files in train/, test/ and
validation/, and result.json at every end, with "finished" true where all epochs were done. Runs that one command began
have a group.json.
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
GROUP = "group.json"
FREE = {name for group in ("where and how it runs", "looking inside", "what is written") for name in GROUPS[group]}


def create(config: Config) -> Path:
    """A new folder in config.logdir, never one that was there: "article2-001", "article2-002" …"""
    folder = numbered(Path(config.logdir), name_of(config))
    write(folder / "config.json", config.to_json())
    return folder


def create_all(config: Config) -> list[Path]:
    """A new folder for each run that `config` asks for; where they are several, each says which belong together."""
    made = [create(config.of_one_run(seed)) for seed in config.all_seeds]
    for folder in made if len(made) > 1 else ():  # the newest last: whoever finds it there finds it in all
        write_json(folder / GROUP, {"folders": [path.name for path in made], "ensemble": config.ensemble})
    return made


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


def newest_unfinished(config: Config) -> tuple[list[Path], int]:
    """(folders, ensemble): the newest that `create` made under this name, or all of its group, and how many of them train side
    by side; no folders where there is none, or all are finished.

    Raises:
      UserError: as `group_of`.
    """
    name = name_of(config)
    made = [path for path in Path(config.logdir).glob(f"{name}-*") if path.name.removeprefix(f"{name}-").isdecimal()]
    newest = max(made, key=lambda path: int(path.name.removeprefix(f"{name}-")), default=None)
    if not newest or not (newest / "config.json").is_file():
        return [], 1
    there, ensemble = group_of(newest)
    batches = [there[first:first + ensemble] for first in range(0, len(there), ensemble)]
    return ([], 1) if all(map(all_finished, batches)) else (there, ensemble)


def group_of(folder: Path) -> tuple[list[Path], int]:
    """(the folders of the runs that were begun together with this one, itself among them; how many train side by side).

    Raises:
      UserError: the file that tells cannot be read.
    """
    try:
        group = json.loads((folder / GROUP).read_text(encoding="utf-8"))
        there, ensemble = [folder.parent / name for name in group["folders"]], int(group["ensemble"])
        if folder not in there or ensemble < 1:
            raise ValueError
        return there, ensemble
    except FileNotFoundError:
        return [folder], 1
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / GROUP}: cannot be read; go on with one run: --resume={folder}") from None


def result(folder: Path) -> dict:
    """What its result.json says; empty where there is none that can be read."""
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def all_finished(folders: list[Path]) -> bool:
    """Have these runs, which train side by side, done all their epochs, and been judged together?"""
    return all(map(is_finished, folders)) and (len(folders) == 1 or "together" in result(folders[0]))


def is_finished(folder: Path) -> bool:
    """Has the run done all its epochs?"""
    return result(folder).get("finished") is True


def epochs_done(folder: Path, config: Config) -> int:
    """The epochs of a finished run that has nothing left to do with these settings; else 0."""
    if not is_finished(folder):
        return 0
    found = result(folder)
    done = len(found.get("epochs", ()))
    return done if done >= config.epochs or has_settled(config, done, found.get("best_by_validation")) else 0


def has_settled(config: Config, done: int, best: dict | None) -> bool:
    """Did the last of the epochs done, as many as --early_stopping says, bring nothing better?"""
    return bool(config.early_stopping and best and done - best["epoch"] >= config.early_stopping)


def settings(folder: Path) -> dict:
    """The settings of the run in `folder`, unchecked.

    Raises:
      UserError: it is no run's folder.
    """
    if not folder.exists():
        raise UserError(f"{folder}: does not exist; a run's folder is needed, such as runs/article2-001")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a run's folder: it has no config.json")
    return Config.read(folder, named="")


def _of(folder: Path) -> Config:
    """The settings of the run in `folder`.

    Raises:
      UserError: it is no run's folder, or its settings are none.
    """
    try:
        return Config.make(**settings(folder))
    except UserError as error:
        raise error if str(error).startswith(str(folder)) else UserError(f"{folder / 'config.json'}: {error}") from None


def resumed(folder: Path, asked: Config, given: dict, override: bool) -> Config:
    """The settings of the run in `folder` with `given` in place of its own, on the devices that are `asked` for.

    Raises:
      UserError: a given setting changes the mathematics of the run, unless `override`.
    """
    old = _of(folder)
    where = {name: getattr(asked, name) for name in ("strategy", "replicas")}
    if any(getattr(old, name) != value for name, value in where.items()):
        where |= dict.fromkeys(("shards", "intra_op_threads", "inter_op_threads"), 0)  # to be chosen anew
    new = old.replace(**{**where, **given})
    if not override and (names := changed(old, new)):
        raise UserError(f"--resume={folder}: " + ", ".join(f"--{name} is {_text(getattr(old, name))} in this run, not "
                        f"{_text(getattr(new, name))}" for name in names) + "; that changes its mathematics: leave it out, "
                        "or add --override")
    return new


def resumed_group(there: list[Path], ensemble: int, asked: Config, given: dict, override: bool) -> Config:
    """As `resumed`, for the runs of a group: the settings that make them all.

    Raises:
      UserError: as `resumed`; other seeds are asked for; one of them has gone another way since.
    """
    first, *others = map(_of, there)
    seeds = tuple(config.seed for config in (first, *others))
    if len(asked.all_seeds) > 1 and (asked.all_seeds, asked.ensemble) != (seeds, ensemble):
        told = lambda seeds, ensemble: f"--seeds={_text(seeds)}" + f" --ensemble={ensemble}" * (ensemble > 1)
        raise UserError(f"--resume=auto: the newest runs, {there[0]} to {there[-1].name}, are not finished and have {told(seeds, ensemble)}, "
                        f"not {told(asked.all_seeds, asked.ensemble)}: go on with them first, or begin under another --name")
    for folder, config in zip(there[1:], others):
        if names := changed(first.of_one_run(config.seed), config):
            raise UserError(f"{folder}: has another --{names[0]} than {there[0]}; go on with one run at a time: --resume={folder}")
    alone = {name: value for name, value in given.items() if name not in ("seeds", "runs", "ensemble")}
    return resumed(there[0], asked, alone, override).replace(seed=0, seeds=seeds, ensemble=ensemble)


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
