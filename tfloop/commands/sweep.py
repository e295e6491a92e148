"""Search for settings in one process and one trace."""

import math
import sys
from pathlib import Path
from typing import Any

from tfloop.commands.command import Command, Stop, curves_only, start, whole_number, without
from tfloop.config import FIELDS, Config
from tfloop.errors import UserError
from tfloop.search import sweeps
from tfloop.training import folders
from tfloop.wording import counted, plural

# Of the training images, to choose by, where --validation_size is not given.
SHARE_HELD_OUT, MOST_HELD_OUT = 1 / 6, 10000
ALL_DIVERGED = 3  # exit code


def sweep(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    stop = Stop()
    values = _values(options, arguments)
    halving = _halving(config, options, values)
    name = f"{folders.name_of(config)}-sweep"
    config = curves_only(config, options)
    folder = _resumed(config, name, options["resume"])
    sweeps.trials(config, values, Path())  # says what is wrong before TensorFlow is imported
    folders.check_writable(folder or Path(config.logdir))
    config, device = start(config)

    def say(line: str) -> None:
        if not config.quiet:
            print(line, flush=True)

    config, data = _hold_out(config, say)
    _check_trials(sweeps.trials(config, values, Path()), data)
    folder = folder or folders.numbered(Path(config.logdir), name)
    trials = sweeps.trials(config, values, folder)
    search = {
        "grid": options["grid"],
        "random": options["random"],
        "spaces": arguments,
        "search_seed": options["search_seed"],
        "halving": halving,
    }
    with folders.locked(folder):
        sweeps.opened(folder, config, search, bool(options["resume"]))
        say(_first_line(config, trials, len(values), folder))
        running = sweeps.Sweep(config, trials, data.without_test(), device, say)
        if not running.run(halving, stop.asked):
            print(f"stopped; --resume={folder} goes on")
            return stop.code()
        return _close(folder, trials, running, data, config.quiet)


def _values(options: dict[str, Any], arguments: list[str]) -> list[dict[str, str]]:
    if bool(options["grid"]) == bool(options["random"]):
        raise UserError(
            'sweep: choose --grid="NAME=VALUE,VALUE …", or --random=TRIALS "NAME=log:LOW:HIGH …"'
        )
    if options["random"]:
        count, seed = whole_number(options, "random", 1), whole_number(options, "search_seed", 0)
        return sweeps.random(count, arguments, seed)
    if arguments:
        raise UserError(
            f"sweep: {arguments[0]!r} goes with --random; with --grid write all of it in one pair "
            "of quotes"
        )
    return sweeps.grid(options["grid"])


def _halving(config: Config, options: dict[str, Any], values: list[dict[str, str]]) -> int:
    halving = whole_number(options, "halving", 1)
    if halving > 1 and any("epochs" in chosen for chosen in values):
        raise UserError(
            f"--halving={halving} and epochs in the search exclude each other: it compares trials "
            "after the same epochs"
        )
    if halving > 1 and sweeps.rungs(config.epochs, halving) == [config.epochs]:
        raise UserError(
            f"--halving={halving} needs more epochs than {config.epochs}: it would cut no trial off"
        )
    return halving


def _resumed(config: Config, name: str, resume: str) -> Path | None:
    """The folder of the sweep to go on with; None for a new one."""
    if not resume:
        return None
    folder = sweeps.find(config, name) if resume == "auto" else Path(resume)
    if not folder:
        raise UserError(
            f"--resume=auto: there is no unfinished {name} in {config.logdir}; leave --resume out "
            "for a new one"
        )
    if not (folder / sweeps.FILE).is_file():
        raise UserError(f"--resume={folder}: is no sweep's folder: it has no {sweeps.FILE}")
    return folder


def _hold_out(config: Config, say: Any) -> tuple[Config, Any]:
    """(the settings, the data), with validation images to choose by."""
    from tfloop import assembly

    data = assembly.load_data(config)
    if config.validation_size or len(data.validation):
        return config, data
    size = max(1, min(MOST_HELD_OUT, int(SHARE_HELD_OUT * len(data.train))))
    config = config.replace(validation_size=size)
    say(f"--validation_size={size}: {size} training images are held out to choose by")
    return config, assembly.load_data(config)


def _check_trials(trials: list[sweeps.Trial], data: Any) -> None:
    """Raises UserError for what cannot be tried."""
    from tfloop import assembly, models

    for trial in trials:
        if not trial.config.model:
            models.check_sizes(trial.config, data.image_shape)
        assembly.make_schedule(trial.config, 1)  # does it have what is searched?
        assembly.make_optimizer(trial.config)
        if trial.config.batch_size > len(data.train):
            raise UserError(
                f"--batch_size={trial.config.batch_size} is larger than the {len(data.train)} "
                "training images"
            )


def _first_line(config: Config, trials: list[sweeps.Trial], drawn: int, folder: Path) -> str:
    graphs = len({sweeps.structure(trial.config) for trial in trials})
    repeats = drawn - len(trials)
    left_out = f"; {repeats} left out that repeat another" if repeats else ""
    return (
        f"{counted(len(trials), 'trial')} of {counted(config.epochs, 'epoch')}, "
        f"{counted(graphs, 'graph')} to trace{left_out}: {folder}"
    )


def _close(
    folder: Path, trials: list[sweeps.Trial], running: sweeps.Sweep, data: Any, quiet: bool
) -> int:
    """Rank, look at the test images of the best alone, and write both down."""
    from rich.console import Console

    ranked = sweeps.standings(trials)
    best = ranked[0]
    judged = not best.diverged and len(data.test)
    test = [_test_metrics(trial, data) for trial in best.trials] if judged else []
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120, quiet=quiet)
    console.print()
    console.print(_table(ranked))
    for line in _last_lines(best, test, running):
        console.print(line, soft_wrap=True, markup=False)
    if running.trained or not (folder / sweeps.RESULT).is_file():
        chosen = {"values": best.values, "test": test}
        content = {
            "ranking": [_json(standing) for standing in ranked],
            "chosen": chosen,
            "traces": running.traced,
            "trained_here": len(running.trained),
            "seconds_here": running.seconds,
        }
        folders.write_json(folder / sweeps.RESULT, content)
    return ALL_DIVERGED if best.diverged else 0


def _test_metrics(trial: sweeps.Trial, data: Any) -> dict[str, Any]:
    from tfloop.loop import Loop
    from tfloop.training.saved_run import open_run

    config, state, _ = open_run(trial.folder)
    return Loop(state, data, batch_size=config.batch_size).evaluate(data.test).by_name()


def _table(ranked: list[sweeps.Standing]) -> Any:
    from rich import box
    from rich.table import Table

    table, several = Table(box=box.SIMPLE_HEAD), len(ranked[0].trials) > 1
    by = "validation" if ranked[0].by.name == "accuracy" else ranked[0].by.text
    for title in ("rank", "trial", *ranked[0].values, by, "loss", "epochs", "seconds"):
        table.add_column(title, justify="right")
    for rank, standing in enumerate(ranked, start=1):
        value = "missing" if math.isnan(standing.value) else standing.by.shown(standing.value)
        if several:
            factor = 100 if value.endswith("%") else 1
            value = f"{value} ± {factor * standing.spread:.2f}"
        table.add_row(
            str(rank),
            ", ".join(str(trial.number) for trial in standing.trials),
            *(sweeps.shown(value) for value in standing.values.values()),
            "diverged" if standing.diverged else value,
            "" if math.isnan(standing.loss) else f"{standing.loss:.4f}",
            str(standing.epochs),
            f"{standing.seconds:.1f}",
        )
    return table


def _last_lines(best: sweeps.Standing, test: list[dict], running: sweeps.Sweep) -> list[str]:
    lines = ["every trial diverged; try lower rates"]
    if not best.diverged:
        seeds = f", on average over {len(test)} seeds" if len(test) > 1 else ""
        means = {
            name: None if None in values else sum(values) / len(test)
            for name in (test[0] if test else {})
            for values in [[metrics[name] for metrics in test]]
        }
        found = f": test {folders.reached_text(means)}{seeds}" if test else ""
        chosen = sweeps.described(best.values)
        lines = [f"chosen: {chosen}{found}; {best.trials[0].folder}"]
    if count := len(running.trained):
        each = running.seconds / count
        traced = f"{running.traced} {plural('time', running.traced)}"
        lines.append(
            f"{counted(count, 'trial')} in {running.seconds:.1f} s, {each:.2f} s a trial, all "
            f"included; the training step was traced {traced}"
        )
    return lines


def _json(standing: sweeps.Standing) -> dict[str, Any]:
    return {
        "values": standing.values,
        "trials": [trial.folder.name for trial in standing.trials],
        "epochs": standing.epochs,
        "metric": standing.by.text,
        "value": folders.finite(standing.value),
        "validation_loss": folders.finite(standing.loss),
        "diverged": standing.diverged,
        "training_seconds": standing.seconds,
    }


COMMAND = Command(
    sweep,
    "search over settings in one process and one trace, ranked by validation",
    topic="search",
    arguments="[SPACE]",
    settings=without(
        tuple(FIELDS),
        "seeds",
        "runs",
        "strategy",
        "replicas",
        "worker_timeout",
        "profile",
        "live_plot",
        "debugger_dump",
        "check_numerics",
        "eager",
    ),
    options={
        "grid": (
            "",
            'every combination of these: "l2=0,0.001 momentum=0.5,0.9"; a list is written 32/64/64',
        ),
        "random": (
            "",
            'N draws of what follows the flags: "learning_rate=log:1e-4:1e-2 seed=0,1"; also '
            "lin:LOW:HIGH",
        ),
        "search_seed": ("0", "seed of the draws of --random"),
        "halving": (
            "1",
            "after epochs / N, / N² …, only every N-th trial goes on; 1: all go to the end",
        ),
        "resume": (
            "",
            "go on with a sweep: its folder; auto: the newest of this name that is not finished",
        ),
    },
)
