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
    stop, say = Stop(), _saying(config)
    values = _values(options, arguments)
    halving = _whole(options, "halving", 1)
    if halving > 1 and any("epochs" in chosen for chosen in values):
        raise UserError(f"--halving={halving} and epochs in the search exclude each other: it compares trials after the same epochs")
    if halving > 1 and sweeps.rungs(config.epochs, halving) == [config.epochs]:
        raise UserError(f"--halving={halving}: {config.epochs} epochs are too few for it")
    config, name = _briefly(config, options), f"{folders.name_of(config)}-sweep"
    folder = _resumed(config, name, options["resume"])
    sweeps.trials(config, values, Path())  # says what is wrong before TensorFlow is there
    folders.check_writable(folder or Path(config.logdir))
    config, device = start(config)
    from tfloop import models, runs

    data = runs.load_data(config)
    if not config.validation_size:
        size = max(1, min(MOST_HELD_OUT, int(SHARE_HELD_OUT * len(data.train))))
        config = config.replace(validation_size=size)
        data = runs.load_data(config)
        say(f"--validation_size={size}: so many training images are held out to choose by")
    for trial in sweeps.trials(config, values, Path()):
        models.check_sizes(trial.config, data.image_shape)
        runs.make_schedule(trial.config, 1), runs.make_optimizer(trial.config)  # do they have what is searched?
        if trial.config.batch_size > len(data.train):
            raise UserError(f"--batch_size={trial.config.batch_size} is larger than the {len(data.train)} training images")
    folder = folder or folders.numbered(Path(config.logdir), name)
    found = sweeps.trials(config, values, folder)
    search = {"grid": options["grid"], "random": options["random"], "spaces": arguments, "search_seed": options["search_seed"], "halving": halving}
    with folders.locked(folder):
        sweeps.opened(folder, config, search, bool(options["resume"]))
        structures = len({sweeps.structure(trial.config) for trial in found})
        repeats = len(values) - len(found)
        say(f"{len(found)} trial{'s' * (len(found) > 1)} of {config.epochs} epoch{'s' * (config.epochs > 1)}, {structures} "
            f"graph{'s' * (structures > 1)} to trace{f'; {repeats} left out that repeat another' if repeats else ''}: {folder}")
        running = sweeps.Sweep(config, found, data.without_test(), device, say)
        if not running.run(halving, stop.asked):
            print(f"stopped; --resume={folder} goes on")
            return stop.code()
        return _close(folder, found, running, data, config.quiet)


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


def _saying(config: Config):
    return lambda line: None if config.quiet else print(line, flush=True)


def _briefly(config: Config, options: dict) -> Config:
    """Curves only, where nothing else was asked for: many runs would write many pictures."""
    return config.replace(summaries="scalars") if config.summaries == Config.summaries and "summaries" not in options["given"] else config


def _resumed(config: Config, name: str, resume: str) -> Path | None:
    """The folder of the sweep to go on with; None for a new one."""
    if not resume:
        return None
    folder = sweeps.find(config, name) if resume == "auto" else Path(resume)
    if not folder:
        raise UserError(f"--resume=auto: there is no unfinished {name} in {config.logdir}; leave --resume out for a new one")
    if not (folder / sweeps.FILE).is_file():
        raise UserError(f"--resume={folder}: is no sweep's folder: it has no {sweeps.FILE}")
    return folder


def _close(folder: Path, found: list[sweeps.Trial], running: sweeps.Sweep, data, quiet: bool) -> int:
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
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120, quiet=quiet)
    table, seeds = Table(box=box.SIMPLE_HEAD), len(best.trials) > 1
    for title in ("rank", "trial", *best.values, "validation", "loss", "epochs", "seconds"):
        table.add_column(title, justify="right")
    for rank, standing in enumerate(ranked, start=1):
        accuracy = "diverged" if standing.diverged else f"{100 * standing.accuracy:.2f} %" + f" ± {100 * standing.spread:.2f}" * seeds
        table.add_row(str(rank), ", ".join(str(trial.number) for trial in standing.trials),
                      *(sweeps.shown(value) for value in standing.values.values()), accuracy,
                      "" if math.isnan(standing.loss) else f"{standing.loss:.4f}", str(standing.epochs), f"{standing.seconds:.1f}")
    console.print()
    console.print(table)
    say = lambda line: console.print(line, soft_wrap=True, markup=False)
    if test:
        say(f"chosen: {sweeps.described(best.values)}: test accuracy {100 * sum(test) / len(test):.2f} %"
            + f", on average over {len(test)} seeds" * seeds + f"; {best.trials[0].folder}")
    else:
        say("every trial diverged; try lower rates")
    if count := len(running.trained):
        say(f"{count} trial{'s' * (count > 1)} in {running.seconds:.1f} s, {running.seconds / count:.2f} s a trial, all included; the "
            f"training step was traced {running.traced} time{'s' * (running.traced != 1)}")
    if running.trained or not (folder / sweeps.RESULT).is_file():
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
    if config.precision == "mixed_float16":
        raise UserError("--precision=mixed_float16: a step that overflows has no loss to compare; use another")
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
    if len({*presets}) < len(presets) or len({*seeds}) < len(seeds):
        raise UserError("report: an experiment or a seed comes twice")
    config = _briefly(config, options)
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
        "epochs", "seeds", "summaries", *WHERE), {
        "experiments": ("article2,article3,article3_32", "which"), "out": ("report", "the folder for runs, report.md, report.png and report.json")}),
    "lr_find": Command(lr_find, "the learning-rate range test: at which rate does the loss fall fastest?", "", tuple(
        name for name in HOW if name not in (*GROUPS["schedule"], "learning_rate", "epochs", "eager", "seeds", "runs", "ensemble", "on_nan", "steps_per_call")), {
        "low": ("1e-6", "first rate"), "high": ("1", "last rate"), "steps": ("300", "how many steps, at most"),
        "plot": ("", "write a plot to this PNG file")}),
    "sweep": Command(sweep, "search over settings in one process and one trace, ranked by validation", "[SPACE]", tuple(
        name for name in FIELDS if name not in ("seeds", "runs", "strategy", "replicas", "worker_timeout", "profile", "live_plot",
                                                "debugger_dump", "check_numerics", "eager")), {
        "grid": ("", "every combination of these: \"l2=0,0.001 momentum=0.5,0.9\"; a list is written 32/64/64"),
        "random": ("", "so many draws, of what follows the flags: \"learning_rate=log:1e-4:1e-2 seed=0,1\"; also lin:LOW:HIGH"),
        "search_seed": ("0", "of these draws"),
        "halving": ("1", "after epochs / N, / N² …, only every N-th trial goes on; 1: all go to the end"),
        "resume": ("", "go on with a sweep: its folder; auto: the newest of this name that is not finished")}),
}
