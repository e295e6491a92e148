"""One run in its folder, new or resumed.

Its records go to files and to the screen, its state to checkpoints.
"""

import contextlib
import dataclasses
import functools
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfloop import criterion
from tfloop.config import Config
from tfloop.data.spec import of_data, ranges
from tfloop.errors import DivergenceError, UserError
from tfloop.inspection.event_files import own_events
from tfloop.inspection.plots import LivePlot
from tfloop.inspection.progress import Display
from tfloop.inspection.summaries import Summaries
from tfloop.loop import Loop, PendingCall
from tfloop.machine import arithmetic
from tfloop.machine.replicas import Replicas
from tfloop.metrics import NAMES, Metrics
from tfloop.records import Call, CallPart, Epoch, Evaluation, Record
from tfloop.state import TrainState
from tfloop.stopping import StopAsked
from tfloop.training import checkpoints, code, folders
from tfloop.training.profile import Profile
from tfloop.vectors import count_elements
from tfloop.version import __version__

MOST_REWINDS = 3
NAMES_WITHOUT_CLASSES = tuple(name for name in NAMES if name != "accuracy")


@dataclasses.dataclass
class Reached:
    """What a run has reached beside its state.

    It is saved in the manifest of every checkpoint, and restored with it.
    """

    epochs: list[dict] = dataclasses.field(default_factory=list)  # each an entry of result.json
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    # epoch, step, metric, value and checkpoint of the best evaluation so far
    best: dict | None = None
    # Each like an entry of `epochs`, of evaluations within an epoch.
    evaluations: list[dict] = dataclasses.field(default_factory=list)
    goal: str = ""  # --until, once it is reached
    resumed_at: list[int] = dataclasses.field(default_factory=list)  # global steps
    rewinds: list[int] = dataclasses.field(default_factory=list)  # global steps that diverged
    rewound_to: list[int] = dataclasses.field(default_factory=list)  # where each went back to
    overridden_at: list[int] = dataclasses.field(default_factory=list)  # steps of --override


class Run:
    """One run in its folder, new or resumed: `train` takes it to its end, or to where it stops.

    Attributes:
      outputs: the logits of the test images at the end of the last epoch; None before the first.
    """

    def __init__(
        self,
        config: Config,
        loop: Loop,
        folder: Path,
        display: Display,
        device: str,
        replicas: Replicas | None = None,
        label: str = "",
        finished: bool = False,
    ) -> None:
        """Make one.

        Args:
          config: the settings.
          loop: what trains.
          folder: the run's.
          display: where it is shown.
          device: the device's name, for the record.
          replicas: what it trains on, in place of one device.
          label: which of several runs it is, on the display.
          finished: it is finished already, so that there is only its state to be read.
        """
        self.outputs: np.ndarray | None = None
        self._config, self._loop, self._folder = config, loop, folder
        self._display, self._device, self._label = display, device, label
        self._is_done = finished
        keep = config.keep
        self._checkpoints = checkpoints.Checkpoints(loop.state, folder / "checkpoints", keep)
        self._reached = Reached()
        self._saved: int | None = None  # global step of the newest checkpoint
        self._before: dict[str, float] = {}  # the loop's seconds when the run began
        self._warned_of = len(loop.data.left_out)
        self._replicas = replicas
        self._identity = folders.identity_of(folder)
        self._agree: Callable[[bool], bool] = replicas.agree if replicas else bool

    @functools.cached_property
    def _ranges(self) -> dict[str, list[float]]:
        return ranges(self._loop.data.train.inputs)

    @functools.cached_property
    def _fingerprint(self) -> int:
        return self._loop.data.fingerprint

    @functools.cached_property
    def _held_out(self) -> dict[str, int]:
        return self._loop.data.held_out_fingerprints

    def train(
        self, started: float, stop: Callable[[], bool]
    ) -> Generator[PendingCall, None, dict[str, Any]]:
        """A coroutine: yields the calls whose steps are to be made before it goes on.

        Args:
          started: time.perf_counter() when the set-up began.
          stop: asked after every record; true ends the run with a checkpoint.

        Returns:
          The result, as written to result.json.

        Raises:
          DivergenceError: as Loop.run; the folder has the last good weights, and the result.
        """
        if self._is_done:
            self._loop.state.begin(self._config.seed)
            path, _ = checkpoints.newest(self._folder / "checkpoints", self._display.warn)
            checkpoints.restore(self._loop.state, path)
            return folders.result(self._folder)
        self._started = started
        code.store(self._folder, self._config)
        self._check_steering()
        if not self._replicas or self._replicas.workers == 1:  # several end at the same place
            self._loop.stop = stop
        resumed = self._resume()
        self._count("setup", time.perf_counter() - started)
        diverged = yield from self._go_on(stop, resumed)
        while diverged and self._agree(self._may_rewind()):
            resumed = self._rewind(diverged)
            diverged = yield from self._go_on(stop, resumed)
        folders.check_kept(self._folder, self._identity)
        result = self._result(diverged)
        folders.write_json(self._folder / folders.RESULT, result)
        self._agree(result["finished"])
        if diverged:
            raise diverged
        return result

    def _go_on(
        self, stop: Callable[[], bool], resumed: bool
    ) -> Generator[PendingCall, None, DivergenceError | None]:
        """Train until all epochs are done, `stop` says so, or the step diverges."""
        config, state = self._config, self._loop.state
        if self._replicas:
            self._replicas.share(state)
        settings = dataclasses.asdict(config)
        with (
            Summaries(self._folder, self._loop, config.summaries, settings, resumed) as summaries,
            Profile(config, self._folder, self._display.say) as profile,
        ):
            diverged = None
            try:
                yield from self._records(stop, summaries, profile)
            except StopAsked:
                pass
            except DivergenceError as error:
                diverged = error
                if self._may_rewind():
                    return diverged
            if diverged or self._saved != int(state.global_step):
                self.save(summaries.sync())
            if self._is_finished(diverged):
                with self._timed("pictures"):
                    summaries.finish()
            elif diverged:
                summaries.end(succeeded=False)
        return diverged

    def _records(
        self, stop: Callable[[], bool], summaries: Summaries, profile: Profile
    ) -> Iterator[PendingCall]:
        """Take the loop's records, and write and show them; yields its pending calls."""
        config, loop = self._config, self._loop
        plot = None
        if config.live_plot:
            plot = LivePlot(self._folder / "curves.png", before=self._reached.epochs)
        due = Due(config.checkpoint_every, int(loop.state.global_step))
        if self._agree(self._has_settled()):
            return
        for record in loop.pending(config.epochs):
            if isinstance(record, PendingCall):
                yield record
                continue
            profile.write(record)
            folders.check_kept(self._folder, self._identity)
            with self._timed("summaries"):
                summaries.write(record)
            self._display.write(record, self._label)
            is_best = not isinstance(record, Call) and self._add(record)
            if plot and isinstance(record, Epoch):
                plot.write(record)
            if not may_end(record, loop):
                continue
            stopped = self._agree(stop() or self._has_settled() or self._is_out_of_time())
            if due(record) or stopped or is_best:
                self.save(summaries.sync())
            if stopped:
                return

    def _left_out(self) -> list[str]:
        """The damaged records that were left out: from the start, and those found on the way."""
        skipped = getattr(self._loop.data.train.inputs, "skipped", ())
        return [*self._loop.data.left_out, *skipped]

    def _warn_of_skipped(self) -> None:
        for name in self._left_out()[self._warned_of :]:
            self._display.warn(f"{name} is damaged: left out")
        self._warned_of = len(self._left_out())

    def _is_finished(self, diverged: DivergenceError | None) -> bool:
        has_made_all = int(self._loop.state.epoch) >= self._config.epochs
        return not diverged and (has_made_all or self._has_settled())

    def _has_settled(self) -> bool:
        """Is there nothing more to gain: by --early_stopping, or because --until is reached?"""
        reached = self._reached
        is_settled = folders.has_settled(self._config, reached.epochs, reached.best)
        return is_settled or bool(reached.goal and reached.goal == self._config.until)

    def _is_out_of_time(self) -> bool:
        limit = self._config.max_time
        return bool(limit) and time.perf_counter() - self._started >= criterion.seconds(limit)

    def _may_rewind(self) -> bool:
        return self._config.on_nan == "rewind" and len(self._reached.rewinds) < MOST_REWINDS

    def _rewind(self, diverged: DivergenceError) -> bool:
        """Go back to the newest checkpoint, or to the start, with half the rate of before.

        Returns:
          Were summaries written before that checkpoint?
        """
        rewinds, rewound_to = [*self._reached.rewinds, diverged.step], self._reached.rewound_to
        resumed = self._resume()
        state, factor = self._loop.state, 0.5 ** len(rewinds)
        scale_rate(state, factor)
        self._reached.rewinds = rewinds
        self._reached.rewound_to = [*rewound_to, int(state.global_step)]
        what, step = diverged.as_flags.partition(";")[0], int(state.global_step)
        self._display.warn(
            f"{what}; back to step {step}, with {factor:g} times the rate ({len(rewinds)} of at "
            f"most {MOST_REWINDS} times)"
        )
        return resumed

    def _resume(self) -> bool:
        """Go to the newest checkpoint, if there is one.

        Returns:
          Were summaries written before it?
        """
        self._loop.state.begin(self._config.seed)
        self._loop.part = None
        self._reached, self._saved = Reached(), None
        self._before = dict(self._loop.seconds)
        folder, events = self._folder / "checkpoints", {}
        if checkpoints.all_in(folder):
            events = self._restore(*checkpoints.newest(folder, self._display.warn))
        elif steps := folders.result(self._folder).get("steps"):
            raise UserError(
                f"{self._folder}: made {steps} steps, but {folder} holds no checkpoint of them; "
                "put them back, or begin a new run"
            )
        (self._folder / folders.RESULT).unlink(missing_ok=True)
        self._cut_events(events)
        return bool(events)

    def _restore(self, path: Path, manifest: dict[str, Any]) -> dict[str, int]:
        """Take over a checkpoint; the sizes of the event files when it was made."""
        state, config = self._loop.state, self._config
        # With --override the settings may change the mathematics of what the checkpoint holds.
        differs = bool(folders.changed(folders.config_in(manifest, path), config))
        checkpoints.restore(state, path, differs)
        if (done := int(state.epoch)) > config.epochs:
            raise UserError(
                f"{self._folder}: has made {done} epochs, more than --epochs={config.epochs}"
            )
        try:
            self._reached = Reached(**manifest["reached"])
            # Of other settings, such as other metrics, the sums are others.
            self._loop.part = None if differs else call_part(manifest, path, self._loop)
        except (TypeError, KeyError):
            raise UserError(f"{path}: its manifest is not what a run writes") from None
        for entry in self._reached.epochs:
            if "rate" in entry:  # as version 0.1 called it
                entry["learning_rate"] = entry.pop("rate")
        if differs:
            state.reset(weights=False, slots=False, schedule=False, data=False, hyper=True)
            self._reached.overridden_at.append(int(state.global_step))
        folders.write(self._folder / folders.CONFIG, config.to_json())
        self._saved = step = int(state.global_step)
        self._reached.resumed_at.append(step)
        epoch = min(int(state.epoch) + 1, config.epochs)
        self._display.say(f"resumed at step {step}, in epoch {epoch}, from {path}")
        return manifest["events"]

    def _cut_events(self, sizes: dict[str, int]) -> None:
        """Cut off what was written after the checkpoint: it will be written again."""
        for path in own_events(self._folder):
            size = sizes.get(str(path.relative_to(self._folder)), 0)
            if not size:
                path.unlink()
            elif size <= path.stat().st_size:
                if path.stat().st_nlink > 1:  # a backup may share the file
                    copy = shutil.copy2(path, path.with_name(f"{path.name}.copy"))
                    os.replace(copy, path)
                os.truncate(path, size)
            else:
                self._display.warn(
                    f"{path}: is shorter than when the checkpoint was made: part of the curves is "
                    "lost"
                )

    def _add(self, record: Epoch | Evaluation) -> bool:
        """Add an epoch or an evaluation to what was reached; is it the best so far?

        Raises:
          UserError: there is no metric to choose by.
        """
        entry = _entry(record)
        if record.outputs is not None:
            self.outputs = record.outputs
        if isinstance(record, Epoch):
            self._warn_of_skipped()
            self._reached.epochs.append(entry)
        else:
            self._reached.evaluations.append(entry)
        until = self._config.until
        if until and criterion.parse_goal(until).is_reached(entry):
            self._reached.goal = until
        return self._is_best(record, entry)

    def _is_best(self, record: Epoch | Evaluation, entry: dict[str, Any]) -> bool:
        config = self._config
        by = criterion.parse(config.choose_by) if config.choose_by else criterion.default(entry)
        value, best = by.of(entry), self._reached.best
        if best and best.get("metric", by.text) != by.text:  # --override chose another
            best = None
        if value is None or (best and not by.is_better(value, folders.value_of(best))):
            return False
        self._reached.best = {
            "epoch": record.epoch,
            "step": record.step,
            "metric": by.text,
            "value": value,
            "checkpoint": self._checkpoints.next_name(),
        }
        return True

    def _check_steering(self) -> None:
        """Raises UserError for a metric to choose, stop or steer by that there is none of."""
        config, loop = self._config, self._loop
        objective, data = loop.state.objective, loop.data
        common = ["loss", *NAMES] if objective.classifies else ["loss", *NAMES_WITHOUT_CLASSES]
        held_out = [*common, *objective.extra, *objective.whole_metrics]
        known = {"train": [*common, *objective.extra]}
        known |= {"test": held_out} if len(data.test) else {}
        known |= {"validation": held_out} if len(data.validation) else {}
        asked = {}
        if config.choose_by:
            asked[f"--choose_by={config.choose_by}"] = criterion.parse(config.choose_by)
        if config.until:
            asked[f"--until={config.until}"] = criterion.parse_goal(config.until).criterion
        for flag, by in asked.items():
            if by.name not in known.get(by.part, []):
                own = [f"{part} {name}" for part in known for name in known[part]]
                shown = [text for text in own if text.split()[1] not in NAMES[:-2]]
                raise UserError(f"{flag}: there is no {by.text}; there are {', '.join(shown)}")
        looks = config.early_stopping or loop.state.schedule.slots
        if looks and not config.choose_by and "validation" not in known:
            flag = "--early_stopping" if config.early_stopping else "--schedule=plateau"
            raise UserError(
                f"{flag} looks at validation examples, and there are none; set --validation_size, "
                "or --choose_by"
            )

    def save(self, events: dict[str, int]) -> None:
        """Make a checkpoint; `events` are the sizes of the event files at this moment."""
        folders.check_kept(self._folder, self._identity)
        loop, best = self._loop, self._reached.best
        manifest = {
            "tfloop": __version__,
            "config": dataclasses.asdict(self._config),
            "data": of_data(loop.data).to_json(),
            "ranges": self._ranges,
            "fingerprint": self._fingerprint,
            "held_out_fingerprints": self._held_out,
            "machine": machine(self._device),
            "steps_per_epoch": loop.steps,
            "reached": {**dataclasses.asdict(self._reached), "seconds": self._seconds()},
            "best": best,
            "events": events,
            "part": dataclasses.asdict(loop.part) if loop.part else None,
        }
        self._checkpoints.save(manifest, best["checkpoint"] if best else None)
        self._saved = int(loop.state.global_step)

    def _count(self, what: str, seconds: float) -> None:
        self._reached.seconds[what] = self._reached.seconds.get(what, 0.0) + seconds

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._count(what, time.perf_counter() - started)

    def _seconds(self) -> dict[str, float]:
        """All seconds of the run, those before it was resumed included."""
        spent = dict.fromkeys(("setup", "summaries", "pictures"), 0.0) | self._reached.seconds
        for key, before in self._before.items():
            earlier = self._reached.seconds.get(key, 0.0)
            spent[key] = earlier + self._loop.seconds[key] - before
        return spent

    def _arithmetic(self, milliseconds: float) -> dict[str, float | None]:
        """What a step multiplies, and what share of it the machine's matmul would need for that."""
        flop = arithmetic.flop_per_step(self._loop)
        if not flop or not milliseconds:
            return {"flop_per_step": flop, "of_floor": None}
        return {"flop_per_step": flop, "of_floor": 1000 * flop / arithmetic.peak() / milliseconds}

    def _result(self, diverged: DivergenceError | None) -> dict[str, Any]:
        loop, state, reached = self._loop, self._loop.state, self._reached
        seconds, steps = self._seconds(), int(state.global_step)
        milliseconds = 1000 * seconds["training"] / max(steps, 1)
        where = {"step": diverged.step, "layer": diverged.layer} if diverged else None
        return {
            "config": dataclasses.asdict(self._config),
            "hyper": {name: v.numpy().tolist() for name, v in state.hyper.items()},
            "finished": self._is_finished(diverged),
            "out_of_time": not self._is_finished(diverged) and self._is_out_of_time(),
            "diverged": where,
            "weights": count_elements(state.weights.values()),
            "steps": steps,
            "steps_per_epoch": loop.steps,
            "resumed_at": reached.resumed_at,
            "rewinds": reached.rewinds,
            "rewound_to": reached.rewound_to,
            "overridden_at": reached.overridden_at,
            "fingerprint": self._fingerprint,
            "epochs": reached.epochs,
            "final": reached.epochs[-1] if reached.epochs else None,
            "best": reached.best,
            "evaluations": reached.evaluations,
            "reached": reached.goal or None,
            "left_out": self._left_out(),
            "seconds": {key: round(value, 4) for key, value in seconds.items()},
            "ms_per_step": milliseconds,
            **self._arithmetic(milliseconds),
            "peak_memory_mib": _peak_memory(),
            "traces": loop.traces,
            "pipeline": loop.pipeline.name,
            "steps_per_call": loop.steps_per_call,
            **machine(self._device),
            "weights_sha256": state.digest("weights", "moving"),
            "state_sha256": state.digest(),
        }


def machine(device: str) -> dict[str, Any]:
    """What a run is computed by: the device's name, cores and versions."""
    return {
        "device": device,
        "cores": os.cpu_count(),
        "versions": {
            "tfloop": __version__,
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
    }


def call_part(manifest: dict[str, Any], path: Path, loop: Loop) -> CallPart | None:
    """What was made of the call within which the checkpoint at `path` was made.

    Raises:
      UserError: it is of another loop.
    """
    part = manifest.get("part")
    if not part:
        return None
    if (
        len(part["sums"]) not in (0, loop.state.totals.shape[0])
        or not 0 <= part["steps"] < loop.steps
    ):
        raise UserError(f"{path}: its manifest names another call than the run's")
    return CallPart(**{**part, "sums": tuple(map(float, part["sums"]))})


def scale_rate(state: TrainState, factor: float) -> None:
    """Make the learning rate this factor of what it was set to at first."""
    for name in ("learning_rate", "rates"):
        if name in state.schedule.hyper:
            state.hyper[name].assign(factor * state.initial_hyper[name])


def may_end(record: Record, loop: Loop) -> bool:
    """May the run stop after this record, to go on there?

    Not between a call and the evaluation behind it.
    """
    if not isinstance(record, Call):
        return True
    return record.batch_index < loop.steps and not loop.evaluates_after(record)


class Due:
    """Is it time for a checkpoint?"""

    def __init__(self, every: str, step: int) -> None:
        """Make one.

        Args:
          every: "epoch", a number of steps, "1000", or of seconds, "30s".
          step: the global step at which the run goes on.
        """
        self._every, self._step, self._time = every, step, time.monotonic()

    def __call__(self, record: Record) -> bool:
        if self._every == "epoch":
            return isinstance(record, Epoch)
        if self._every.endswith("s"):
            is_due = time.monotonic() - self._time >= float(self._every[:-1])
        else:
            every = int(self._every)
            is_due = record.step // every > self._step // every
        if is_due:
            self._step, self._time = record.step, time.monotonic()
        return is_due


def _peak_memory() -> float:
    """Of this process, in MiB."""
    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _entry(record: Epoch | Evaluation) -> dict[str, Any]:
    """An entry of result.json."""
    entry: dict[str, Any] = {"epoch": record.epoch, "step": record.step}
    if isinstance(record, Epoch):
        entry |= {
            "learning_rate": folders.finite(record.learning_rate),
            "seconds": record.seconds,
            "steps": record.steps,
        }
    for part in criterion.PARTS:
        metrics: Metrics | None = getattr(record, part)
        if metrics:
            entry[part] = {
                name: None if value is None else folders.finite(value)
                for name, value in metrics.by_name().items()
            }
    entry["weights_sha256"] = record.digest
    return entry
