"""Run folders: made, found again, locked. Needs no TensorFlow.

A run's folder holds config.json from its first moment, checkpoints/ while it goes on, event files
in train/, test/ and validation/, and result.json at every end, with "finished" true where all
epochs were done. Runs that one command began have a group.json.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tfloop import plain_files, scratch
from tfloop.config import CODE, FIELDS, GROUPS, Config
from tfloop.errors import UserError
from tfloop.schedules import needs_length
from tfloop.training import kinds
from tfloop.user_code import is_reference
from tfloop.wording import listed

CONFIG = "config.json"
RESULT = "result.json"
GROUP = "group.json"
# Settings that change where a run runs and what it writes, not its mathematics.
FREE = {
    name
    for group in ("where and how it runs", "looking inside", "what is written")
    for name in GROUPS[group]
} | {"max_time", "until"}


def create(config: Config) -> Path:
    """A new folder in config.logdir: "article2-001", "article2-002" …"""
    folder = numbered(Path(config.logdir), name_of(config))
    try:
        write(folder / CONFIG, config.to_json())
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


PARTIAL = ".unfinished-"  # the folders of runs that are not whole begin so


@contextlib.contextmanager
def made_whole(config: Config) -> Iterator[Path]:
    """A folder beside the runs in which one is made; `placed` gives it its name when it is whole.

    Nobody takes it for a run. What was left by a process that was killed is removed.

    Raises:
      UserError: it cannot be made.
    """
    logdir = Path(config.logdir)
    try:
        with scratch.folder(logdir, PARTIAL) as folder:
            write(folder / CONFIG, config.to_json())
            yield folder
    except OSError as error:
        raise UserError(f"--logdir={logdir}: cannot be written: {error.strerror}") from None


def placed(folder: Path, config: Config) -> Path:
    """Rename the folder to the first free name of a run."""
    scratch.open_up(folder)
    while True:
        taken = numbered(Path(config.logdir), name_of(config))
        try:
            return folder.rename(taken)  # an empty folder is replaced
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise UserError(f"{taken}: cannot be made: {error.strerror}") from None


def create_all(config: Config) -> list[Path]:
    """A new folder for each run that `config` asks for; several say which belong together."""
    created = [create(config.of_one_run(seed)) for seed in config.all_seeds]
    if len(created) > 1:
        group = {"folders": [path.name for path in created], "ensemble": config.ensemble}
        for folder in created:  # the newest last: whoever finds it there finds it in all
            write_json(folder / GROUP, group)
    return created


def numbered(logdir: Path, name: str) -> Path:
    """A new folder NAME-001, NAME-002 …, the first that does not exist.

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
        folder.mkdir(parents=True, exist_ok=True)  # it exists where making it was interrupted
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}") from None
    write(folder / CONFIG, config.to_json())


def name_of(config: Config) -> str:
    """The name that its runs' folders begin with.

    Raises:
      UserError: it is no plain name.
    """
    name = config.name or config.preset
    if Path(name).name != name or name == "..":
        raise UserError(
            f"--name={name}: expected a plain name, not a path; --logdir chooses the folder"
        )
    return name


def newest_unfinished(config: Config) -> tuple[list[Path], int]:
    """(folders, ensemble): the newest that `create` made under this name, or all of its group.

    `ensemble` is how many of them train side by side. There are no folders where there is none, or
    all are finished.

    Raises:
      UserError: as `group_of`.
    """
    prefix = f"{name_of(config)}-"

    def number(path: Path) -> int:
        return int(path.name.removeprefix(prefix))

    logdir = Path(config.logdir)
    runs = [
        path
        for path in (logdir.iterdir() if logdir.is_dir() else ())
        if path.name.startswith(prefix) and path.name.removeprefix(prefix).isdecimal()
    ]
    newest = max((path for path in runs if _is_begun(path)), key=number, default=None)
    if not newest:
        return [], 1
    if not (newest / CONFIG).is_file():
        raise UserError(
            f"--resume=auto: {newest}, the newest, has no {CONFIG}; put it back, or remove the "
            "folder"
        )
    group, ensemble = group_of(newest)
    batches = [group[first : first + ensemble] for first in range(0, len(group), ensemble)]
    return ([], 1) if all(map(all_finished, batches)) else (group, ensemble)


def _is_begun(folder: Path) -> bool:
    """Is there more in it than a process leaves that was killed as it made the folder?"""
    return any(path.name != f"{CONFIG}.partial" for path in folder.iterdir())


def runs_in(folder: Path) -> list[Path]:
    """The run that this folder is, or the runs in it and below, by name.

    Raises:
      UserError: there are none.
    """
    if (folder / CONFIG).is_file():
        return [folder]
    try:
        found = sorted(path.parent for path in folder.rglob(CONFIG)) if folder.is_dir() else []
    except RecursionError:
        raise UserError(f"{folder}: its folders are nested too deep") from None
    found = [path for path in found if not path.name.startswith(PARTIAL)]
    if not found:
        what = "holds no runs" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder}: {what}; name a run's folder, or one with runs in it")
    return found


def group_of(folder: Path) -> tuple[list[Path], int]:
    """(folders, ensemble): the runs that were begun together with this one, itself among them.

    Raises:
      UserError: the file that tells cannot be read.
    """
    try:
        group = plain_files.read_json(folder / GROUP)
        if any(name in ("", "..") or Path(name).name != name for name in group["folders"]):
            raise ValueError  # a group lies in one folder
        members = [folder.parent / name for name in group["folders"]]
        ensemble = int(group["ensemble"])
        if folder not in members or len(set(members)) < len(members) or ensemble < 1:
            raise ValueError
        return members, ensemble
    except FileNotFoundError:
        return [folder], 1
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        raise UserError(
            f"{folder / GROUP}: cannot be read; go on with one run: --resume={folder}"
        ) from None


def result(folder: Path) -> dict[str, Any]:
    """What its result.json says; empty where there is none that can be read.

    Raises:
      UserError: it can be read, and says something that no run writes.
    """
    try:
        content = plain_files.read_json(folder / RESULT)
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    if name := kinds.wrong(content, _KINDS):
        raise UserError(
            f"{folder / RESULT}: is damaged: {name} is {str(content[name])[:40]!r}; remove the "
            "file, and --resume the run to have it written again"
        )
    return content


# The types of what others read of a result, and of each entry of its lists.
_KINDS: dict[str, Any] = {
    "steps": int,
    "steps_per_epoch": int,
    "finished": bool,
    "fingerprint": int,
    "ms_per_step": kinds.NUMBER,
    "weights_sha256": str,
    "diverged": kinds.Maybe({"step": int}),
    "final": kinds.Maybe(kinds.ENTRY),
    "best": kinds.Maybe(kinds.BEST),
    "hyper": dict,
    "seconds": dict,
    "versions": dict,
    "together": dict,
    "epochs": [kinds.ENTRY],
    "evaluations": [kinds.ENTRY],
    "rewinds": [int],
    "rewound_to": [int],
    "overridden_at": [int],
}


def all_finished(folders: list[Path]) -> bool:
    """Have these runs, which train side by side, done all, and been judged together?"""
    are_judged = len(folders) == 1 or "together" in result(folders[0])
    return are_judged and all(map(is_finished, folders))


def is_finished(folder: Path) -> bool:
    """Has the run done all its epochs?"""
    return result(folder).get("finished") is True


def epochs_done(folder: Path, config: Config) -> int:
    """The epochs of a finished run that has nothing left to do with these settings; else 0."""
    if not is_finished(folder):
        return 0
    content = result(folder)
    epochs = content.get("epochs", [])
    done = len(epochs)
    is_done = done >= config.epochs
    has_reached = bool(config.until) and content.get("reached") == config.until
    return done if is_done or has_reached or has_settled(config, epochs, content.get("best")) else 0


def has_settled(config: Config, epochs: list[dict], best: dict | None) -> bool:
    """Did the last epochs, as many as --early_stopping says, bring nothing better?

    Epochs without an evaluation do not count.
    """
    if not config.early_stopping or not best:
        return False
    later = [entry for entry in epochs if entry["epoch"] > best["epoch"]]
    evaluated = [entry for entry in later if "test" in entry or "validation" in entry]
    return len(evaluated) >= config.early_stopping


def settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`, unchecked.

    Raises:
      UserError: it is no run's folder.
    """
    if not folder.exists():
        raise UserError(
            f"{folder}: does not exist; a run's folder is needed, such as runs/article2-001"
        )
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not a run's folder: it has no {CONFIG}")
    return Config.read(folder, named="")


def config_of(folder: Path) -> Config:
    """The settings of the run in `folder`.

    Raises:
      UserError: it is no run's folder, or its settings are none.
    """
    try:
        return Config.make(**settings(folder))
    except UserError as error:
        if error.as_flags.startswith(str(folder)):
            raise
        raise UserError(f"{folder / CONFIG}: {error.as_flags}") from None


def config_in(manifest: dict[str, Any], path: Path) -> Config:
    """The settings in the manifest of the checkpoint at `path`.

    Raises:
      UserError: they are none.
    """
    try:
        return Config.make(**manifest["config"])
    except UserError as error:
        raise UserError(f"{path}: its manifest holds no settings: {error.as_flags}") from None


def resumed(folder: Path, asked: Config, given: dict[str, Any], override: bool) -> Config:
    """The settings of the run in `folder` with `given` in place of its own.

    Args:
      folder: the run's.
      asked: the settings of the command, for the devices that it asks for.
      given: the settings that were named on it.
      override: take those that change the mathematics of the run, too.

    Raises:
      UserError: a given setting changes the mathematics of the run, without `override`.
    """
    old = config_of(folder)
    where: dict[str, Any] = {name: getattr(asked, name) for name in ("strategy", "replicas")}
    if any(getattr(old, name) != value for name, value in where.items()):
        # To be chosen anew.
        where |= dict.fromkeys(("shards", "intra_op_threads", "inter_op_threads"), 0)
    new = old.replace(**{**where, **given})
    if not override and (names := changed(old, new)):
        differences = [
            f"--{name} is {_text(getattr(old, name))} in this run, not {_text(getattr(new, name))}"
            for name in names
        ]
        raise UserError(
            f"--resume={folder}: {', '.join(differences)}; that changes its mathematics: leave it "
            "out, or add --override"
        )
    return new


def resumed_group(
    folders: list[Path], ensemble: int, asked: Config, given: dict[str, Any], override: bool
) -> Config:
    """As `resumed`, for the runs of a group: the settings that make them all.

    Raises:
      UserError: as `resumed`; other seeds are asked for; one of them has gone another way since.
    """
    first, *others = map(config_of, folders)
    seeds = tuple(config.seed for config in (first, *others))
    several = len(asked.all_seeds) > 1
    if several and (asked.all_seeds, asked.ensemble) != (seeds, ensemble):
        raise UserError(
            f"--resume=auto: the newest runs, {folders[0]} to {folders[-1].name}, are not finished "
            f"and have {_group_flags(seeds, ensemble)}, not "
            f"{_group_flags(asked.all_seeds, asked.ensemble)}: go on with them first, or begin "
            "under another --name"
        )
    for folder, config in zip(folders[1:], others, strict=True):
        if names := changed(first.of_one_run(config.seed), config):
            raise UserError(
                f"{folder}: has another --{names[0]} than {folders[0]}; go on with one run at a "
                f"time: --resume={folder}"
            )
    several_runs = ("seeds", "runs", "ensemble")
    alone = {name: value for name, value in given.items() if name not in several_runs}
    one = resumed(folders[0], asked, alone, override)
    return one.replace(seed=0, seeds=seeds, ensemble=ensemble)


def _group_flags(seeds: tuple[int, ...], ensemble: int) -> str:
    flags = f"--seeds={listed(seeds)}"
    return f"{flags} --ensemble={ensemble}" if ensemble > 1 else flags


def changed(old: Config, new: Config) -> list[str]:
    """The settings that differ and change the mathematics of a run."""
    depends_on_epochs = needs_length(old.schedule) and old.decay_steps is None
    free = FREE if depends_on_epochs else FREE | {"epochs"}
    differ = [name for name in FIELDS if _bare(name, old) != _bare(name, new)]
    return [name for name in differ if name not in free]


def _bare(name: str, config: Config) -> Any:
    """A setting; the name of a file, or of a function in one, without the folder it lies in."""
    value = getattr(config, name)
    if name == "dataset" and not is_reference(value):
        return Path(value).name  # what it holds is compared by its fingerprint
    if name not in CODE:
        return value
    values = value if isinstance(value, tuple) else (value,)
    return tuple(Path(part).name if is_reference(part) else part for part in values)


def _text(value: object) -> str:
    return listed(value) if isinstance(value, tuple) else str(value)


def check_writable(folder: Path, flag: str = "--logdir") -> None:
    """Say it before minutes of training, not after.

    A folder that does not exist yet is judged by its nearest parent.

    Raises:
      UserError: it is no folder, or may not be written to.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{flag}={folder}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{flag}={folder}: {nearest} is not writable")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder for this process.

    The system lets go of it when the process ends, however it does. The folder itself is locked,
    and a file in it, since NFS locks no folders.

    Raises:
      UserError: another process holds it, or there are links in it.
    """
    check_holds_no_links(folder)
    with contextlib.ExitStack() as held:
        for name, flags in ((".", os.O_RDONLY), ("lock", os.O_RDWR | os.O_CREAT)):
            descriptor = os.open(folder / name, flags | os.O_NOFOLLOW, 0o666)
            held.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{folder}: another process trains this run; wait for it, or end it"
                ) from None
            except OSError:
                if name != ".":
                    raise
        yield


def check_holds_no_links(folder: Path) -> None:
    """Raises UserError where a link, the folder or one in it, would have something else changed."""
    if folder.is_symlink():
        raise UserError(f"{folder}: is a link; name the run's own folder: {folder.resolve()}")
    try:
        paths = [
            Path(place, n) for place, *names in os.walk(folder) for n in itertools.chain(*names)
        ]
    except RecursionError:
        raise UserError(f"{folder}: its folders are nested too deep") from None
    for path in filter(Path.is_symlink, paths):
        raise UserError(
            f"{path}: is a link, to {os.readlink(path)!r}; a run is trained in its own folder "
            "alone: put there what the link points to, or remove it"
        )


def check_kept(folder: Path, identity: tuple[int, int] | None) -> None:
    """Raises UserError where the run's folder is no longer the one that was begun in."""
    if not (folder / CONFIG).is_file() or identity != identity_of(folder):
        raise UserError(
            f"{folder}: the folder, or its {CONFIG}, was removed while the run was trained; the "
            "training ends, and what it reached since its last checkpoint is lost"
        )


def identity_of(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one of its name; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def write(path: Path, text: str) -> None:
    """Under a temporary name first, then on the disk, then renamed: what bears the name is whole.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)  # it may be a link
        with open(partial, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`write`, as JSON, which has no NaN and no infinity: null stands in their place."""
    write(path, json.dumps(_all_finite(content), indent=2, allow_nan=False) + "\n")


def _all_finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _all_finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_all_finite(value) for value in content]
    return finite(content) if isinstance(content, float) else content


def reached_text(metrics: dict[str, Any]) -> str:
    """ "accuracy 99.15 %", or "loss 0.1234, r2 0.4521" where there are no classes."""
    if metrics.get("accuracy") is not None:
        return f"accuracy {100 * metrics['accuracy']:.2f} %"
    own = [name for name in metrics if name not in COMMON and metrics[name] is not None]
    loss = metrics["total"]
    parts = [f"loss {math.nan if loss is None else loss:.4f}"]
    return ", ".join(parts + [f"{name} {metrics[name]:.4f}" for name in own])


COMMON = ("total", "data", "l1", "l2", "custom", "model", "accuracy", "gradient_norm")


def value_of(best: dict[str, Any]) -> float:
    """The value of the best evaluation; earlier versions called it by its metric."""
    return best["value"] if "value" in best else best["accuracy"]


def finite(value: float) -> float | None:
    """The value, or None in place of NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None
