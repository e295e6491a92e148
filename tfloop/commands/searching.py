"""Search for settings: sweeps, the range of rates."""

import math
import sys
from pathlib import Path

from tfloop import folders, reports, sweeps
from tfloop.commands.command import HOW, WHERE, Command, Stop, start
from tfloop.config import FIELDS, GROUPS, HYPER, Config
from tfloop.errors import UserError

SHARE_HELD_OUT, MOST_HELD_OUT = 1 / 6, 10000  # of the training images, to choose by, where --validation_size is not given


def sweep(config: Config, options: dict, arguments: list[str]) -> int:
    stop = Stop()
    values = _values(options, arguments)
    halving = _whole(options, "halving", 1)
    if halving > 1 and any("epochs" in chosen for chosen in values):
        raise UserError(f"--halving={halving} and epochs in the search exclude each other: it compares trials after the same epochs")
    if "summaries" not in options["given"]:
        config = config.replace(summaries="scalars")
    name = f"{config.name or config.preset}-sweep"
    folder = _folder(config, name, options["resume"])
    sweeps.trials(config, values, folder)  # says what is wrong before TensorFlow is there
    folders.check_writable(folder)
    config, device = start(config)
    from tfloop import models, runs

    data = runs.load_data(config)
    if not config.validation_size:
        size = min(MOST_HELD_OUT, int(SHARE_HELD_OUT * len(data.train)))
        config = config.replace(validation_size=size)
        data = runs.load_data(config)
        print(f"--validation_size={size}: so many training images are held out to choose by")
    found = sweeps.trials(config, values, folder)
    for trial in found:
        models.check_sizes(trial.config, data.image_shape)
        if trial.config.batch_size > len(data.train):
            raise UserError(f"--batch_size={trial.config.batch_size} is larger than the {len(data.train)} training images")
    folder.mkdir(parents=True, exist_ok=True)
    search = {"grid": options["grid"], "random": options["random"], "spaces": arguments, "search_seed": options["search_seed"], "halving": halving}
    with folders.locked(folder):
        sweeps.opened(folder, config, search, bool(options["resume"]))
        structures = len({sweeps.structure(trial.config) for trial in found})
        print(f"{len(found)} trials of {config.epochs} epochs, {structures} graph{'s' * (structures > 1)} to trace: {folder}", flush=True)
        running = sweeps.Sweep(config, found, data.without_test(), device, lambda line: print(line, flush=True))
        if not running.run(halving, stop.asked):
            print(f"stopped; --resume={folder} goes on")
            return stop.code()
        return _close(folder, found, running, data)


def _values(options: dict, arguments: list[str]) -> list[dict[str, str]]:
    if bool(options["grid"]) == bool(options["random"]):
        raise UserError("sweep: choose --grid=\"NAME=VALUE,VALUE …\", or --random=TRIALS \"NAME=log:LOW:HIGH …\"")
    if options["grid"]:
        if arguments:
            raise UserError(f"sweep: {arguments[0]!r} goes with --random; with --grid write all of it in one pair of quotes")
        return sweeps.grid(options["grid"])
    return sweeps.random(_whole(options, "random", 1), arguments, _whole(options, "search_seed", 0))


def _whole(options: dict, name: str, least: int) -> int:
    text = options[name]
    if not (text.isdecimal() and least <= int(text) < 2**31):
        raise UserError(f"--{name}={text}: expected a whole number, {least} or more")
    return int(text)


def _folder(config: Config, name: str, resume: str) -> Path:
    """The folder to go on in, or a new one's path."""
    if resume and resume != "auto":
        return Path(resume)
    if resume and (unfinished := sweeps.find(config, name)):
        return unfinished
    if resume:
        raise UserError(f"--resume=auto: there is no unfinished {name} in {config.logdir}; leave --resume out for a new one")
    return next(path for number in range(1, 10**6) if not (path := Path(config.logdir) / f"{name}-{number:03d}").exists())


def _close(folder: Path, found: list[sweeps.Trial], running: sweeps.Sweep, data) -> int:
    """Rank, look at the test images of the best alone, and write both down."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tfloop import runs
    from tfloop.loop import Loop

    ranked = sweeps.standings(found)
    best, test = ranked[0], []
    for trial in best.trials if not best.diverged else ():
        config, state, _ = runs.open_run(trial.folder)
        test.append(Loop(state, data, batch_size=config.batch_size).evaluate(data.test).accuracy)
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("rank", "trial", *best.values, "validation", "loss", "epochs", "seconds"):
        table.add_column(title, justify="right")
    seeds = len(best.trials) > 1
    for rank, standing in enumerate(ranked, start=1):
        accuracy = "diverged" if standing.diverged else f"{100 * standing.accuracy:.2f} %" + f" ± {100 * standing.spread:.2f}" * seeds
        table.add_row(str(rank), ", ".join(str(trial.number) for trial in standing.trials),
                      *(sweeps.shown(value) for value in standing.values.values()), accuracy,
                      "" if math.isnan(standing.loss) else f"{standing.loss:.4f}", str(standing.epochs), f"{standing.seconds:.1f}")
    print()
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
    if test:
        mean = sum(test) / len(test)
        print(f"chosen: {sweeps.described(best.values)}: test accuracy {100 * mean:.2f} %"
              + f", on average over {len(test)} seeds" * seeds + f"; {best.trials[0].folder}")
    else:
        print("every trial diverged; try lower rates")
    if running.trained:
        print(f"{len(running.trained)} trials in {running.seconds:.1f} s, {running.seconds / len(running.trained):.2f} s a trial, all included; the "
              f"training step was traced {running.traced} time{'s' * (running.traced != 1)}")
    folders.write_json(folder / sweeps.RESULT, {
        "ranking": [{"values": standing.values, "trials": [trial.folder.name for trial in standing.trials], "epochs": standing.epochs,
                     "validation_accuracy": None if math.isnan(standing.accuracy) else standing.accuracy,
                     "validation_loss": None if math.isnan(standing.loss) else standing.loss, "diverged": standing.diverged,
                     "training_seconds": standing.seconds} for standing in ranked],
        "chosen": {"values": best.values, "test_accuracy": test}, "traces": running.traced, "trained_here": len(running.trained),
        "seconds_here": running.seconds})
    return 0 if test else 3


def lr_find(config: Config, options: dict, arguments: list[str]) -> int:
    low, high = (_rate(options, name) for name in ("low", "high"))
    steps = _whole(options, "steps", 10)
    if low >= high:
        raise UserError(f"--low={options['low']} must lie below --high={options['high']}")
    unset = {name: getattr(Config, name) for name in HYPER["schedule"]}
    config, _ = start(config.replace(**unset, schedule="constant", warmup_steps=0.0, ensemble=1))
    from tfloop import plots, runs
    from tfloop.lr_find import range_test

    loop = runs.make_loop(config)
    before = loop.state.digest()
    found = range_test(loop, low, high, steps)
    print(f"{len(found.rates)} steps of {config.batch_size} images at rates from {low:g} to {found.rates[-1]:.3g}, {config.optimizer}; the state is "
          f"{'as it was' if loop.state.digest() == before else 'CHANGED'}")
    print(f"{'rate':>10}  loss, smoothed")
    for row in sorted({round(share * (len(found.rates) - 1) / 12) for share in range(13)}):
        print(f"{found.rates[row]:10.2e}  {found.smoothed[row]:.4f}")
    print(f"suggestion: --learning_rate={found.suggestion:.1e}, where the loss falls fastest; it is least at {found.least:.1e}"
          + (f", and too large at {found.rates[-1]:.1e}" if found.diverged else ""))
    if options["plot"]:
        plots.range_test(found, f"range test: {config.preset}, {config.optimizer}, batch {config.batch_size}", options["plot"])
        print(options["plot"])
    return 0


def _rate(options: dict, name: str) -> float:
    try:
        rate = float(options[name])
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise UserError(f"--{name}={options[name]}: expected a rate above 0")
    return rate


def report(config: Config, options: dict, arguments: list[str]) -> int:
    stop, folder = Stop(), Path(options["out"])
    presets = options["experiments"].split(",")
    if unknown := [preset for preset in presets if preset not in reports.EXPERIMENTS]:
        raise UserError(f"--experiments={options['experiments']}: '{unknown[0]}' is none; choose from {', '.join(reports.EXPERIMENTS)}")
    seeds = config.seeds or tuple(range(5))
    if "summaries" not in options["given"]:
        config = config.replace(summaries="scalars")
    folders.check_writable(folder, "--out")
    config, device = start(config)
    from tfloop import plots

    trials = reports.planned(config, presets, seeds, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with folders.locked(folder):
        if not reports.train(config, trials, device, stop.asked, lambda line: print(line, flush=True)):
            print("stopped; the same command goes on")
            return stop.code()
        found = reports.rows(trials)
        plots.save(plots.report(found), folder / "report.png")
        folders.write(folder / "report.md", reports.markdown(found, "report.png", device))
        folders.write_json(folder / "report.json", {"device": device, "rows": [row._asdict() for row in found]})
    print((folder / "report.md").read_text(encoding="utf-8") + f"\n{folder / 'report.md'}")
    return 0


COMMANDS = {
    "report": Command(report, "the article's three experiments over several seeds, by its protocol and by a clean one", "", (
        "epochs", "seeds", "ensemble", "summaries", *WHERE), {
        "experiments": ("article2,article3,article3_32", "which"), "out": ("report", "the folder for runs, report.md, report.png and report.json")}),
    "lr_find": Command(lr_find, "the learning-rate range test: at which rate does the loss fall fastest?", "", tuple(
        name for name in HOW if name not in (*GROUPS["schedule"], "learning_rate", "epochs", "eager", "seeds", "runs", "ensemble", "on_nan", "steps_per_call")), {
        "low": ("1e-6", "first rate"), "high": ("1", "last rate"), "steps": ("300", "how many steps, at most"),
        "plot": ("", "write a plot to this PNG file")}),
    "sweep": Command(sweep, "search over settings in one process and one trace, ranked by validation", "[SPACE]", tuple(
        name for name in FIELDS if name not in ("seeds", "runs", "strategy", "replicas", "worker_timeout", "profile", "live_plot",
                                                "debugger_dump", "check_numerics", "eager")), {
        "grid": ("", "every combination of these: \"l2=0,0.001 momentum=0.5,0.9\"; a list is written 32-64-64"),
        "random": ("", "so many draws, of what follows the flags: \"learning_rate=log:1e-4:1e-2 seed=0,1\"; also lin:LOW:HIGH"),
        "search_seed": ("0", "of these draws"),
        "halving": ("1", "after epochs / N, / N² …, only every N-th trial goes on; 1: all go to the end"),
        "resume": ("", "go on with a sweep: its folder; auto: the newest of this name that is not finished")}),
}
