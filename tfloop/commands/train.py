"""Train a model."""

from pathlib import Path
from typing import Any

from tfloop.commands.command import STARTED, TERMINATED, Command, Stop, warn
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.machine import cluster, guardian, network, places
from tfloop.stopping import StopAsked
from tfloop.training import code, folders
from tfloop.wording import counted


def train(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    if options["dry_run"] and config.strategy == "multi_worker":
        raise UserError("--dry_run and --strategy=multi_worker exclude each other: try one process")
    if options["override"] and not options["resume"]:
        raise UserError("--override counts with --resume only")
    place = places.find() if config.strategy == "multi_worker" else None
    guard = guardian.stand_over(place, config.worker_timeout) if place else None
    stop, asked = Stop(listen=not place), config
    resume: list[Path] = []
    if options["resume"] and (not place or place.is_chief):
        try:
            config, resume = _resumed(config, options)
        except UserError as error:
            if place:
                cluster.refuse(place, asked, error.as_flags)
            raise
    if finished := _finished(config, resume):
        print(finished)
        if place:
            cluster.refuse(place, asked, finished, is_mistake=False)
        return 0
    from tfloop.machine import devices

    try:
        config, device, replicas = devices.start(config, asked, guard)
    except cluster.NothingToDo as error:
        print(error)
        return 0
    stop.listen(is_alone=not guard)
    if guard:
        guard.started()
        if replicas.is_chief and not network.is_private():
            warn(network.OPEN_PORTS)
    from tfloop.training import session

    if options["dry_run"]:
        session.dry_run(config, device, replicas)
        return stop.code()
    override = options["override"]
    try:
        results = session.train(config, device, STARTED, stop.asked, resume, replicas, override)
    except StopAsked:
        if not stop.code():
            raise
        return stop.code()
    last = results[-1] if results else {"finished": True}
    was_stopped_by_another = not last["finished"] and not last["out_of_time"]
    return stop.code() or (TERMINATED if was_stopped_by_another else 0)


def _resumed(config: Config, options: dict[str, Any]) -> tuple[Config, list[Path]]:
    """(settings, folders) of the run that --resume names.

    With auto, of the newest that is not finished and those that were begun with it; no folders
    where nothing is left to go on with.
    """
    resume, given, override = options["resume"], options["given"], options["override"]
    several = len(config.all_seeds) > 1
    if options["dry_run"]:
        raise UserError(
            "--resume and --dry_run exclude each other: one goes on with a run, the other keeps "
            "nothing"
        )
    if resume != "auto":
        if several:
            raise UserError(
                f"--resume={resume} goes on with one run: leave --seeds, --runs and --ensemble out "
                "(or --ensemble=1), or go on with all that were begun together: --resume=auto"
            )
        folder = Path(resume)
        config = folders.resumed(folder, config, given, override)
        return code.trusted(folder, config, given, override, goes_on=True), [folder]
    group, ensemble = folders.newest_unfinished(config)
    if not group or (several and len(group) == 1):
        return config, []
    if len(group) == 1:
        config = folders.resumed(group[0], config, given, override)
    else:
        config = folders.resumed_group(group, ensemble, config, given, override)
    return code.trusted(group[0], config, given, override, goes_on=True), group


def _finished(config: Config, resume: list[Path]) -> str:
    """That the only run to go on with is finished; empty where it is not."""
    if len(resume) != 1 or not (done := folders.epochs_done(resume[0], config)):
        return ""
    epochs = counted(done, "epoch")
    return f"{resume[0]}: is finished, after {epochs}; --epochs=N goes on to more"


COMMAND = Command(
    train,
    "train a model; the default is the article's CNN on MNIST",
    topic="train",
    options={
        "dry_run": (False, "do one step of everything, keep nothing, and stop"),
        "resume": (
            "",
            "go on with a run: its folder; auto: the newest unfinished one of its name, with those "
            "begun together, or a new one",
        ),
        "override": (
            False,
            "with --resume: allow settings that change the mathematics of the run",
        ),
    },
)
