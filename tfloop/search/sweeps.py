"""A search over settings in one process: every number is a variable, so all trials share a trace.

A sweep's folder holds `sweep.json`, what is searched and how, and a run's folder for each trial.
Nothing else is kept: how far the sweep has come is read from the trials' own results, so it goes on
wherever it was interrupted.
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
from typing import Any

import numpy as np

from tfloop import criterion, plain_files
from tfloop.config import FIELDS, GROUPS, Config
from tfloop.criterion import Criterion
from tfloop.errors import UserError
from tfloop.training import folders
from tfloop.user_code import options_of
from tfloop.wording import counted

FILE, RESULT = "sweep.json", "ranking.json"
ALIASES = {"rate": "learning_rate"}
OWN = "model."  # in front of an option of the user's own function
_GROUPS = ("augmentation", "model", "loss", "optimizer", "schedule")
SEARCHED = [
    *(name for group in _GROUPS for name in GROUPS[group]),
    "seed",
    "epochs",
    "early_stopping",
    "batch_size",
    "accumulate",
]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One choice of values with one seed, and its run."""

    number: int  # from 1
    values: dict  # of the settings searched
    config: Config
    folder: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """What result.json says; None where there is none yet."""
        return folders.result(self.folder) or None


def grid(text: str) -> list[dict[str, str]]:
    """Every combination of "NAME=VALUE,VALUE… NAME=…".

    A list such as --conv is written 32/64/64, an unset value as nothing: "ema=,0.9".
    """
    names, choices = [], []
    for part in text.split():
        name, value = _name(part, "--grid")
        if name in names:
            raise UserError(f"--grid: {name} comes twice; give all its values at once")
        names.append(name)
        choices.append(_choices(name, value))
    if not names:
        raise UserError("--grid: expected NAME=VALUE,VALUE and more of them, found nothing")
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*choices)]


def random(count: int, spaces: list[str], seed: int = 0) -> list[dict[str, str]]:
    """`count` draws, each a value for every space.

    Args:
      count: of draws.
      spaces: "NAME=log:LOW:HIGH", "NAME=lin:LOW:HIGH" or "NAME=VALUE,VALUE…", several in a text.
      seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    draws: dict[str, list[str]] = {}
    for part in " ".join(spaces).split():
        name, value = _name(part, "--random")
        if name in draws:
            raise UserError(f"--random: {name} comes twice")
        scale, _, bounds = value.partition(":")
        if scale in ("log", "lin"):
            low, high = _bounds(part, name, scale, bounds)
            draws[name] = _draw(generator, name, scale, low, high, count)
        else:
            choices = _choices(name, value)
            draws[name] = [choices[i] for i in generator.integers(len(choices), size=count)]
    if not draws:
        raise UserError(
            "--random: expected what to draw, such as 'learning_rate=log:1e-4:1e-2'; found nothing"
        )
    return [dict(zip(draws, values, strict=True)) for values in zip(*draws.values(), strict=True)]


def _bounds(part: str, name: str, scale: str, text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low = high = math.nan
    is_range = math.isfinite(high - low) and low < high
    if not is_range or (scale == "log" and low <= 0):
        positive = ", both above 0" if scale == "log" else ""
        raise UserError(
            f"--random: {part}: expected {name}={scale}:LOW:HIGH, two numbers that rise{positive}"
        )
    return low, high


def _draw(
    generator: np.random.Generator, name: str, scale: str, low: float, high: float, count: int
) -> list[str]:
    if scale == "log":
        values = np.exp(generator.uniform(math.log(low), math.log(high), count))
    else:
        values = generator.uniform(low, high, count)
    if name in FIELDS and FIELDS[name].element is int:
        return [str(round(value)) for value in values]
    return [f"{value:.6g}" for value in values]


def _name(part: str, flag: str) -> tuple[str, str]:
    """(setting, text after its =).

    Raises:
      UserError: it is no setting, or cannot differ between the trials of a sweep.
    """
    name, equals, value = part.partition("=")
    name = ALIASES.get(name, name)
    if not equals or not value:
        raise UserError(f"{flag}: {part!r}: expected NAME=VALUES")
    if name.startswith(OWN) and name.removeprefix(OWN).isidentifier():
        return name, value
    if name not in FIELDS:
        raise UserError(f"{flag}: there is no setting '{name}'")
    if FIELDS[name].element not in (int, float):
        raise UserError(f"{flag}: --{name} is not a number; make a sweep for each")
    if name not in SEARCHED:
        reason = "it does not change what is learnt"
        if name in GROUPS["data"]:
            reason = "they would not be compared on the same images"
        raise UserError(f"{flag}: --{name} cannot differ between trials: {reason}")
    return name, value


def _choices(name: str, text: str) -> list[str]:
    choices = text.split(",")
    if name in FIELDS and FIELDS[name].is_list:
        return [choice.replace("/", ",") for choice in choices]
    return choices


def structure(config: Config) -> tuple:
    """What the graph is made for: two trials that agree in it share one trace."""
    views: dict[str, Callable[[Any], Any]] = {
        "value": lambda value: value,
        "set": lambda value: value is not None,
        "nonzero": bool,
        "length": len,
    }
    retraces = {name: field.retrace for name, field in FIELDS.items()}
    retraces |= dict.fromkeys(GROUPS["model"], "value")
    return tuple(
        views[retrace](getattr(config, name))
        for name, retrace in retraces.items()
        if retrace != "never"
    )


def _with_options(config: Config, chosen: dict[str, str]) -> Config:
    """The settings with chosen values; those of "model.…" go to the user's own function."""
    options = options_of(config.model_options, "model_options")
    own = {name.removeprefix(OWN): value for name, value in chosen.items() if name.startswith(OWN)}
    if own and not config.model:
        raise UserError(f"{OWN}{next(iter(own))} is an option of a function: give its --model")
    settings = {name: value for name, value in chosen.items() if not name.startswith(OWN)}
    pairs = tuple(f"{name}={value}" for name, value in {**options, **own}.items())
    return config.replace(**settings, model_options=pairs)


def trials(config: Config, values: list[dict[str, str]], folder: Path) -> list[Trial]:
    """A trial for each choice of values; one that repeats another is left out.

    Raises:
      UserError: a value of the wrong type, out of range, or that goes with no other.
    """
    by_values: dict[tuple, Trial] = {}
    for chosen in values:
        own = _with_options(config, chosen).replace(name="trial", ensemble=1)
        parsed = {name: getattr(own, name, chosen[name]) for name in chosen}
        number = len(by_values) + 1
        trial = Trial(number, parsed, own, folder / f"trial-{number:03d}")
        by_values.setdefault(tuple(parsed.values()), trial)
    return list(by_values.values())


def rungs(epochs: int, factor: int) -> list[int]:
    """Epochs after which only every `factor`-th trial goes on, and the last.

    Successive halving (arXiv:1502.07943).
    """
    steps = [epochs]
    while factor > 1 and steps[0] // factor >= 1 and steps[0] > 1:
        steps.insert(0, steps[0] // factor)
    return steps


BY_ACCURACY = Criterion("validation", "accuracy", True)


@dataclasses.dataclass
class Standing:
    """How one choice of values did: the mean over its seeds."""

    values: dict
    trials: list[Trial]
    epochs: int = 0
    by: Criterion = BY_ACCURACY
    value: float = math.nan  # of that, after these epochs
    loss: float = math.nan  # on the validation examples
    spread: float = 0.0  # standard deviation of the value over seeds
    seconds: float = 0.0  # of training
    diverged: bool = False
    cut_off: bool = False  # by successive halving, before its last epoch

    @property
    def key(self) -> tuple:
        """Sorts from best to worst.

        What was cut off comes after what was not, and among that what got further comes first.
        """
        further = -self.epochs if self.cut_off else 0
        number = self.trials[0].number
        worse = -self.value if self.by.is_max else self.value
        return self.diverged, self.cut_off, further, worse, self.loss, number


def standings(trials: list[Trial], until: int | None = None) -> list[Standing]:
    """From best to worst by the validation images.

    Args:
      trials: those that are compared.
      until: as it was after N epochs; None: as it is now.
    """
    by_values: dict[tuple, Standing] = {}
    for trial in trials:
        values = {name: value for name, value in trial.values.items() if name != "seed"}
        standing = by_values.setdefault(tuple(values.items()), Standing(values, []))
        standing.trials.append(trial)
    for standing in by_values.values():
        _judge(standing, until)
    return sorted(by_values.values(), key=lambda standing: standing.key)


def _judge(standing: Standing, until: int | None) -> None:
    results = [trial.result for trial in standing.trials]
    known = [result for result in results if result]
    standing.diverged = any(
        result["diverged"] and (until is None or len(result["epochs"]) < until) for result in known
    )
    are_finished = all(result and result["finished"] for result in results)
    standing.cut_off = until is None and not are_finished
    standing.seconds = sum(result["seconds"]["training"] for result in known)
    epochs = [result["epochs"][:until] for result in known if result["epochs"]]
    if len(epochs) < len(results):
        return
    last = [done[-1] for done in epochs]
    asked = standing.trials[0].config.choose_by
    standing.by = criterion.parse(asked) if asked else criterion.default(last[0])
    values = [standing.by.of(entry) for entry in last]
    known_values = [value for value in values if value is not None]
    standing.epochs = min(map(len, epochs))
    if len(known_values) < len(values):
        return  # a metric that failed, or one that there is none of
    standing.value = statistics.fmean(known_values)
    standing.loss = statistics.fmean(entry["validation"]["data"] for entry in last)
    standing.spread = statistics.stdev(known_values) if len(known_values) > 1 else 0.0


def find(config: Config, name: str) -> Path | None:
    """The newest sweep of this name that has not come to its end."""
    logdir = Path(config.logdir)
    found = sorted(logdir.iterdir()) if logdir.is_dir() else []
    files = [path / FILE for path in found if path.name.startswith(f"{name}-")]
    files = [file for file in files if file.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        if not (path.parent / RESULT).is_file():
            return path.parent
    return None


def opened(folder: Path, config: Config, search: dict[str, Any], resume: bool) -> None:
    """Write what is searched into a new folder, or check that an old one is of this very search.

    Raises:
      UserError: it is of another search.
    """
    content = {"config": dataclasses.asdict(config), "search": search}
    asked = json.loads(json.dumps(content))
    if not resume:
        folders.write_json(folder / FILE, asked)
        return
    try:
        stored = plain_files.read_json(folder / FILE)
        names = [
            (part, name) for part in ("config", "search") for name in {*stored[part], *asked[part]}
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--resume={folder}: is no sweep's folder: it has no {FILE} that can be read"
        ) from None
    free = folders.FREE - {"summaries"} | {"ensemble"}
    differ = []
    for part, name in sorted(names):
        old, new = stored[part].get(name), asked[part].get(name)
        if name not in free and old != new:
            differ.append(f"--{name} was {old!r}, is {new!r}")
    if differ:
        raise UserError(
            f"--resume={folder}: is a sweep with other settings: {'; '.join(differ)}; leave "
            "--resume out for a new one"
        )


class Sweep:
    """The trials of a sweep, trained one after the other or side by side.

    Attributes:
      trained: numbers of the trials worked on in this process.
      seconds: that `run` took.
    """

    def __init__(
        self,
        config: Config,
        trials: list[Trial],
        data: Any,
        device: str,
        say: Callable[[str], None],
    ) -> None:
        """Make one.

        Args:
          config: the settings.
          trials: what is tried.
          data: the Dataset to train on and to choose by.
          device: the device's name.
          say: is told of progress.

        Raises:
          UserError: a trial's folder holds a run with other settings.
        """
        self.trained: set[int] = set()
        self.seconds = 0.0
        self._config, self._trials, self._data = config, trials, data
        self._device, self._say = device, say
        self._loops: dict[tuple, list] = {}  # by structure
        self._side_by_side: dict[tuple, Any] = {}
        for trial in trials:
            if (trial.folder / folders.CONFIG).is_file():
                stored = Config.make(**folders.settings(trial.folder))
                if names := folders.changed(stored, trial.config):
                    raise UserError(
                        f"{trial.folder}: is a run with other settings: --{', --'.join(names)}; "
                        "choose another folder"
                    )

    @property
    def traced(self) -> int:
        """How often a training step was traced."""
        return sum(loops[0].traces["train"] for loops in self._loops.values())

    def run(self, factor: int, stop: Callable[[], bool]) -> bool:
        """Train all trials; false where `stop` was true before the end.

        Args:
          factor: of successive halving; 1: none.
          stop: asked after every record and trial.
        """
        started = time.perf_counter()
        try:
            return self._run(factor, stop)
        finally:
            self.seconds = time.perf_counter() - started

    def _run(self, factor: int, stop: Callable[[], bool]) -> bool:
        going = list(self._trials)
        for until in rungs(self._config.epochs, factor):
            for group in self._groups(going):
                if stop():
                    return False
                self._train(group, until if factor > 1 else None, stop)
            if stop():
                return False
            if factor > 1:
                ranked = standings(going, until)
                kept = [standing for standing in ranked if not standing.diverged]
                kept = kept[: math.ceil(len(kept) / factor)]
                going = [trial for standing in kept for trial in standing.trials]
        return True

    def _groups(self, going: list[Trial]) -> list[list[Trial]]:
        """As many at a time as the ensemble has members, those of one structure in a row."""
        by_structure: dict[tuple, list[Trial]] = {}
        for trial in sorted(going, key=lambda trial: trial.number):
            by_structure.setdefault(structure(trial.config), []).append(trial)
        members, groups = self._config.ensemble, []
        for same in by_structure.values():
            groups += [same[first : first + members] for first in range(0, len(same), members)]
        return groups

    def _train(self, group: list[Trial], until: int | None, stop: Callable[[], bool]) -> None:
        from tfloop import assembly
        from tfloop.inspection.progress import Display
        from tfloop.training.ensemble import Together
        from tfloop.training.run import Run

        group = [trial for trial in group if not _has_ended(trial, until)]
        if not group:
            return
        key = structure(group[0].config)
        self._make_loops(key, group[0].config)
        started, quiet = time.perf_counter(), Display(1, 1, quiet=True)
        with contextlib.ExitStack() as locks:
            trainings = []
            for trial, loop in zip(group, self._loops[key], strict=False):
                if not (trial.folder / folders.CONFIG).is_file():
                    folders.make(trial.folder, trial.config)
                locks.enter_context(folders.locked(trial.folder))
                assembly.settle(loop, trial.config)
                run = Run(trial.config, loop, trial.folder, quiet, self._device)
                trainings.append(run.train(started, _stop_at(loop, until, stop)))
            together = locks.enter_context(contextlib.closing(Together(trainings)))
            for calls in together:
                with calls:
                    if self._side_by_side[key]:
                        self._side_by_side[key].make(calls)
                    else:
                        calls[0].loop.make(calls[0])
        for trial in group:
            self.trained.add(trial.number)
            name = f"{trial.folder.name} (of {len(self._trials)})"
            self._say(f"{name}: {described(trial.values)}: {outcome(trial)}")

    def _make_loops(self, key: tuple, config: Config) -> None:
        """The loops for trials of this structure, where there are none yet."""
        from tfloop import assembly
        from tfloop.training.ensemble import SideBySide

        if key in self._loops:
            return
        of_structure = [trial for trial in self._trials if structure(trial.config) == key]
        members = min(self._config.ensemble, len(of_structure))
        loops = [assembly.make_loop(config, self._data) for _ in range(members)]
        self._loops[key] = loops
        self._side_by_side[key] = SideBySide(loops) if members > 1 else None


def _has_ended(trial: Trial, until: int | None) -> bool:
    """Is there nothing left to do for this trial, up to N epochs?"""
    result = trial.result
    if not result:
        return False
    is_far_enough = until is not None and len(result["epochs"]) >= until
    return result["finished"] or bool(result["diverged"]) or is_far_enough


def _stop_at(loop: Any, until: int | None, stop: Callable[[], bool]) -> Callable[[], bool]:
    """`stop`, which is also true when the loop has made N epochs."""
    if not until:
        return stop
    return lambda: stop() or int(loop.state.epoch) >= until


def shown(value: Any) -> str:
    """A value as one would type it in a grid."""
    if isinstance(value, tuple):
        return "/".join(map(shown, value))
    if value is None:
        return "unset"
    return f"{value:g}" if isinstance(value, float) else str(value)


def described(values: dict[str, Any]) -> str:
    """ "l2 0.001, momentum 0.9" """
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def outcome(trial: Trial) -> str:
    """How far a trial has come, in a few words."""
    result = trial.result
    if result and result["diverged"]:
        return f"diverged at step {result['diverged']['step']}"
    if not result or not result["epochs"]:
        return "stopped"
    last, seconds = result["epochs"][-1], result["seconds"]["training"]
    part = "validation" if "validation" in last else "test"
    return (
        f"{part} {folders.reached_text(last[part])} after "
        f"{counted(last['epoch'], 'epoch')}, {seconds:.1f} s of training"
    )
