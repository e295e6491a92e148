"""A search over settings in one process: every number is a variable, so all trials share one traced step.

A sweep's folder holds `sweep.json`, what is searched and how, and a run's folder for each trial. Nothing else is kept:
how far the sweep has come is read from the trials' own results, so it goes on wherever it was interrupted.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tfloop import folders
from tfloop.config import FIELDS, GROUPS, Config, kind
from tfloop.errors import UserError

FILE, RESULT = "sweep.json", "ranking.json"
ALIASES = {"rate": "learning_rate"}
SEARCHED = [name for group in ("augmentation", "model", "loss", "optimizer", "schedule") for name in GROUPS[group]] + [
    "seed", "epochs", "early_stopping", "batch_size", "accumulate"]
BUILT_IN = (*GROUPS["model"], "penalize", "optimizer", "nesterov", "centered", "schedule", "staircase", "restarts", "average_shifts",
            "batch_size", "accumulate")  # shape the graph
MAY_BE_UNSET = ("clip_value", "clip_norm", "clip_global_norm", "ema")  # variables, where they are set
MAY_BE_0 = GROUPS["augmentation"]  # variables, where they are not 0


@dataclasses.dataclass(frozen=True)
class Trial:
    number: int  # from 1
    values: dict  # of the settings searched
    config: Config
    folder: Path

    @property
    def result(self) -> dict | None:
        """What result.json says; None where there is none yet."""
        return folders.result(self.folder) or None


def grid(text: str) -> list[dict[str, str]]:
    """Every combination of "NAME=VALUE,VALUE… NAME=…"; a list such as --conv is written 32/64/64, an unset value as nothing: "ema=,0.9"."""
    names, choices = [], []
    for part in text.split():
        name, value = _name(part, "--grid")
        if name in names:
            raise UserError(f"--grid: {name} comes twice; give all its values at once")
        names.append(name)
        choices.append(_choices(name, value))
    if not names:
        raise UserError("--grid: expected NAME=VALUE,VALUE and more of them, found nothing")
    return [dict(zip(names, values)) for values in itertools.product(*choices)]


def random(count: int, spaces: list[str], seed: int = 0) -> list[dict[str, str]]:
    """`count` draws, each a value for every space: "NAME=log:LOW:HIGH", "NAME=lin:LOW:HIGH" or "NAME=VALUE,VALUE…"."""
    draw, found = np.random.default_rng(seed), {}
    for part in (part for space in spaces for part in space.split()):
        name, value = _name(part, "--random")
        if name in found:
            raise UserError(f"--random: {name} comes twice")
        scale, _, bounds = value.partition(":")
        if scale not in ("log", "lin"):
            choices = _choices(name, value)
            found[name] = [choices[i] for i in draw.integers(len(choices), size=count)]
            continue
        try:
            low, high = map(float, bounds.split(":"))
        except ValueError:
            low = high = math.nan
        if not (math.isfinite(high - low) and low < high and (scale == "lin" or low > 0)):
            raise UserError(f"--random: {part}: expected {name}={scale}:LOW:HIGH, two numbers that rise"
                            + ", both above 0" * (scale == "log"))
        drawn = np.exp(draw.uniform(math.log(low), math.log(high), count)) if scale == "log" else draw.uniform(low, high, count)
        whole = kind(name)[0] is int
        found[name] = [str(round(value)) if whole else f"{value:.6g}" for value in drawn]
    if not found:
        raise UserError("--random: expected what to draw, 'learning_rate=log:1e-4:1e-2' say; found nothing")
    return [dict(zip(found, values)) for values in zip(*found.values())]


def _name(part: str, flag: str) -> tuple[str, str]:
    """(setting, text after its =), checked: can it differ between the trials of a sweep?"""
    name, equals, value = part.partition("=")
    name = ALIASES.get(name, name)
    if not equals or not value:
        raise UserError(f"{flag}: {part!r}: expected NAME=VALUES")
    if name not in FIELDS:
        raise UserError(f"{flag}: there is no setting '{name}'")
    if kind(name)[0] not in (int, float):
        raise UserError(f"{flag}: --{name} is not a number; make a sweep for each")
    if name not in SEARCHED:
        raise UserError(f"{flag}: --{name} cannot differ between trials: " + (
            "they would not be compared on the same images" if name in GROUPS["data"] else "it does not change what is learnt"))
    return name, value


def _choices(name: str, text: str) -> list[str]:
    return [choice.replace("/", ",") if kind(name)[1] else choice for choice in text.split(",")]


def structure(config: Config) -> tuple:
    """What the graph is made for: two trials that agree in it share one trace."""
    return (*(getattr(config, name) for name in BUILT_IN), *(getattr(config, name) is not None for name in MAY_BE_UNSET),
            *(bool(getattr(config, name)) for name in MAY_BE_0), len(config.boundaries), len(config.rates))


def trials(config: Config, values: list[dict[str, str]], folder: Path) -> list[Trial]:
    """A trial for each, checked; one that is the same as one before is left out.

    Raises:
      UserError: a value of the wrong type, out of range, or that goes with no other.
    """
    made = {}
    for chosen in values:
        own = config.replace(**chosen, name="trial", ensemble=1)
        found = {name: getattr(own, name) for name in chosen}
        made.setdefault(tuple(found.values()), Trial(len(made) + 1, found, own, folder / f"trial-{len(made) + 1:03d}"))
    return list(made.values())


def rungs(epochs: int, factor: int) -> list[int]:
    """Epochs after which only every `factor`-th trial goes on, and the last: successive halving (arXiv:1502.07943)."""
    found = [epochs]
    while factor > 1 and found[0] // factor >= 1 and found[0] > 1:
        found.insert(0, found[0] // factor)
    return found


@dataclasses.dataclass
class Standing:
    """How one choice of values did: the mean over its seeds."""

    values: dict
    trials: list[Trial]
    epochs: int = 0
    accuracy: float = math.nan  # on the validation images, after these epochs
    loss: float = math.nan
    spread: float = 0.0  # standard deviation of the accuracy over seeds
    seconds: float = 0.0  # of training
    diverged: bool = False
    cut_off: bool = False  # by successive halving, before its last epoch

    @property
    def key(self) -> tuple:
        """Sorts from best to worst. What was cut off comes after what was not, what got further first."""
        return (self.diverged, self.cut_off, -self.epochs if self.cut_off else 0, -self.accuracy, self.loss, self.trials[0].number)


def standings(found: list[Trial], until: int | None = None) -> list[Standing]:
    """From best to worst by the validation images; with `until`, as it was after so many epochs."""
    together = {}
    for trial in found:
        values = {name: value for name, value in trial.values.items() if name != "seed"}
        together.setdefault(tuple(values.items()), Standing(values, [])).trials.append(trial)
    for standing in together.values():
        results = [trial.result for trial in standing.trials]
        standing.diverged = any(result and result["diverged"] and (until is None or len(result["epochs"]) < until) for result in results)
        standing.cut_off = until is None and not all(result and result["finished"] for result in results)
        standing.seconds = sum(result["seconds"]["training"] for result in results if result)
        done = [result["epochs"][:until] for result in results if result and result["epochs"]]
        if len(done) == len(results):
            last = [epochs[-1]["validation"] for epochs in done]
            accuracies = [epoch["accuracy"] for epoch in last]
            standing.epochs = min(map(len, done))
            standing.accuracy, standing.loss = statistics.fmean(accuracies), statistics.fmean(epoch["data"] for epoch in last)
            standing.spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return sorted(together.values(), key=lambda standing: standing.key)


def find(config: Config, name: str) -> Path | None:
    """The newest sweep of this name that has not come to its end."""
    made = sorted(Path(config.logdir).glob(f"{name}-*/{FILE}"), key=lambda path: path.stat().st_mtime)
    return next((path.parent for path in reversed(made) if not (path.parent / RESULT).is_file()), None)


def opened(folder: Path, config: Config, search: dict, resume: bool) -> None:
    """Write what is searched into a new folder, or check that the one there is of this very search.

    Raises:
      UserError: it is of another search.
    """
    asked = json.loads(json.dumps({"config": dataclasses.asdict(config), "search": search}))
    if not resume:
        folders.write_json(folder / FILE, asked)
        return
    try:
        there = json.loads((folder / FILE).read_text(encoding="utf-8"))
        pairs = [(part, name) for part in ("config", "search") for name in {*there[part], *asked[part]}]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--resume={folder}: is no sweep's folder: it has no {FILE} that can be read") from None
    free = folders.FREE - {"summaries"} | {"ensemble"}
    differ = [f"--{name} was {there[part].get(name)!r}, is {asked[part].get(name)!r}" for part, name in sorted(pairs)
              if name not in free and there[part].get(name) != asked[part].get(name)]
    if differ:
        raise UserError(f"--resume={folder}: is a sweep with other settings: {'; '.join(differ)}; leave --resume out for a new one")


class Sweep:
    """The trials of a sweep, trained one after the other or side by side.

    Attributes: `trained`, numbers of the trials worked on in this process; `seconds`.
    """

    def __init__(self, config: Config, found: list[Trial], data, device: str, say: Callable[[str], None]):
        """Args: settings; the trials; the images to train on and to choose by; the device's name; who is told of progress.

        Raises:
          UserError: a trial's folder holds a run with other settings.
        """
        self.trained, self.seconds = set(), 0.0
        self._config, self._trials, self._device, self._say, self._data = config, found, device, say, data
        self._loops, self._makes = {}, {}  # by structure
        for trial in found:
            if (trial.folder / "config.json").is_file():
                if names := folders.changed(Config.make(**folders.settings(trial.folder)), trial.config):
                    raise UserError(f"{trial.folder}: is a run with other settings: --{', --'.join(names)}; choose another folder")

    @property
    def traced(self) -> int:
        """How often a training step was traced."""
        return sum(loops[0].traces["train"] for loops in self._loops.values())

    def run(self, factor: int, stop: Callable[[], bool]) -> bool:
        """Train all trials, with successive halving by `factor` (1: none); false where `stop` was true before the end."""
        started, going = time.perf_counter(), list(self._trials)
        try:
            for until in rungs(self._config.epochs, factor):
                for group in self._groups(going):
                    if stop():
                        return False
                    self._train(group, until if factor > 1 else None, stop)
                if stop():
                    return False
                if factor == 1:
                    continue
                kept = [standing for standing in standings(going, until) if not standing.diverged]
                going = [trial for standing in kept[:math.ceil(len(kept) / factor)] for trial in standing.trials]
        finally:
            self.seconds = time.perf_counter() - started
        return True

    def _groups(self, going: list[Trial]) -> list[list[Trial]]:
        """As many at a time as the ensemble has members, those of one structure one after the other."""
        by_structure = {}
        for trial in sorted(going, key=lambda trial: trial.number):
            by_structure.setdefault(structure(trial.config), []).append(trial)
        members = self._config.ensemble
        return [same[first:first + members] for same in by_structure.values() for first in range(0, len(same), members)]

    def _train(self, group: list[Trial], until: int | None, stop: Callable[[], bool]) -> None:
        from tfloop import ensemble, runs
        from tfloop.progress import Display
        from tfloop.run import Run

        def ended(trial: Trial) -> bool:
            result = trial.result
            return bool(result) and (result["finished"] or bool(result["diverged"]) or until is not None and len(result["epochs"]) >= until)

        group = [trial for trial in group if not ended(trial)]
        if not group:
            return
        key = structure(group[0].config)
        if key not in self._loops:
            members = min(self._config.ensemble, sum(structure(trial.config) == key for trial in self._trials))
            self._loops[key] = [runs.make_loop(group[0].config, self._data) for _ in range(members)]
            self._makes[key] = ensemble.SideBySide(self._loops[key]).make if members > 1 else ensemble.alone
        started, quiet = time.perf_counter(), Display(1, 1, quiet=True)
        with contextlib.ExitStack() as locks:
            trainings = []
            for trial, loop in zip(group, self._loops[key]):
                if not (trial.folder / "config.json").is_file():
                    folders.make(trial.folder, trial.config)
                locks.enter_context(folders.locked(trial.folder))
                runs.settle(loop, trial.config)
                reached = (lambda loop=loop: stop() or int(loop.state.epoch) >= until) if until else stop
                trainings.append(Run(trial.config, loop, trial.folder, quiet, self._device).train(started, reached))
            ensemble.finish(trainings, self._makes[key])
        for trial in group:
            self.trained.add(trial.number)
            self._say(f"{trial.folder.name} (of {len(self._trials)}): {described(trial.values)}: {outcome(trial)}")


def shown(value) -> str:
    """A value as one would type it in a grid."""
    if isinstance(value, tuple):
        return "/".join(map(shown, value))
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def described(values: dict) -> str:
    """"l2 0.001, momentum 0.9" """
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def outcome(trial: Trial) -> str:
    """How far a trial has come, in a few words."""
    result = trial.result
    if not result or not result["epochs"] and not result["diverged"]:
        return "stopped"
    if result["diverged"]:
        return f"diverged at step {result['diverged']['step']}"
    last = result["epochs"][-1]
    part = "validation" if "validation" in last else "test"
    return (f"{part} accuracy {100 * last[part]['accuracy']:.2f} % after {last['epoch']} epoch{'s' * (last['epoch'] != 1)}, "
            f"{result['seconds']['training']:.1f} s of training")
