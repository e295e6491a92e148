"""One run in its folder, new or resumed: its records go to files and to the screen, its state to checkpoints."""

import contextlib
import dataclasses
import importlib.util
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tfloop import __version__, checkpoints, folders
from tfloop.config import Config
from tfloop.distribution import Replicas
from tfloop.errors import DivergenceError, UserError
from tfloop.events import finite
from tfloop.loop import Call, Epoch, Loop, Ready
from tfloop.plots import LivePlot
from tfloop.progress import Display
from tfloop.state import TrainState
from tfloop.summaries import Summaries

MOST_REWINDS = 3


@dataclasses.dataclass
class Reached:
    """What a run has reached beside its state; saved in the manifest of every checkpoint, and restored with it."""

    epochs: list[dict] = dataclasses.field(default_factory=list)  # an entry of result.json for each
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    best: dict | None = None  # epoch, validation accuracy and checkpoint of the best so far
    resumed_at: list[int] = dataclasses.field(default_factory=list)  # global steps
    rewinds: list[int] = dataclasses.field(default_factory=list)  # global steps that diverged, with --on_nan=rewind


class Run:
    """One run in its folder, new or resumed: `train` takes it to its end, or to where it is stopped.

    Attributes: `outputs`, the logits of the test images at the end of the last epoch made.
    """

    def __init__(self, config: Config, loop: Loop, folder: Path, display: Display, device: str, replicas: Replicas | None = None,
                 label: str = "", finished: bool = False):
        """Args: settings, what trains, where to; where to show it, on what device, on which replicas; what to call it there; whether
        it is finished already, so that there is only its state to be read."""
        self.outputs, self._label, self._finished = None, label, finished
        self._config, self._loop, self._folder, self._display, self._device = config, loop, folder, display, device
        self._checkpoints = checkpoints.Checkpoints(loop.state, folder / "checkpoints", config.keep)
        self._reached, self._saved, self._before = Reached(), None, {}
        self._told_of = len(loop.data.left_out)
        self._replicas, self._agree = replicas, replicas.agree if replicas else bool

    def train(self, started: float, stop: Callable[[], bool]) -> Generator[Ready, None, dict]:
        """A coroutine: yields the steps that are ready to be made, returns the result, as written to result.json.

        Raises:
          DivergenceError: as Loop.run; the folder has the last good weights, and the result.
        """
        if self._finished:
            self._loop.state.begin(self._config.seed)
            checkpoints.restore(self._loop.state, checkpoints.newest(self._folder / "checkpoints", self._display.warn)[0])
            return folders.result(self._folder)
        resumed = self._resume()
        self._count("setup", time.perf_counter() - started)
        while (diverged := (yield from self._go_on(stop, resumed))) and self._agree(self._may_rewind()):
            resumed = self._rewind(diverged)
        result = self._result(diverged)
        folders.write_json(self._folder / folders.RESULT, result)
        self._agree(result["finished"])
        if diverged:
            raise diverged
        return result

    def _go_on(self, stop: Callable[[], bool], resumed: bool) -> Generator[Ready, None, DivergenceError | None]:
        """Train from where the state is, until all epochs are done, `stop` says so, or the step diverges."""
        config, loop, state, diverged = self._config, self._loop, self._loop.state, None
        if self._replicas:
            self._replicas.share(state)
        with Summaries(self._folder, loop, config.summaries, dataclasses.asdict(config), resumed) as summaries, \
                Profile(config, self._folder, self._display.say) as profile:
            plot = LivePlot(self._folder / "curves.png", before=self._reached.epochs) if config.live_plot else None
            due = Due(config.checkpoint_every, int(state.global_step))
            try:
                for record in () if self._agree(self._has_settled()) else loop.ready(config.epochs):
                    if isinstance(record, Ready):
                        yield record
                        continue
                    profile.write(record)
                    with self._timed("summaries"):
                        summaries.write(record)
                    self._display.write(record, self._label)
                    if isinstance(record, Epoch):
                        self.outputs = record.outputs
                        self._tell_of_skipped()
                    is_best = isinstance(record, Epoch) and self._add(record)
                    if plot:
                        plot.write(record)
                    if not may_end(record, loop):
                        continue
                    stopped = self._agree(stop() or self._has_settled())
                    if due(record) or stopped or is_best:
                        self.save(summaries.sync())
                    if stopped:
                        break
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

    def _left_out(self) -> list[str]:
        """The damaged records that were left out: those known from the start, and those found on the way."""
        return [*self._loop.data.left_out, *getattr(self._loop.data.train.images, "skipped", ())]

    def _tell_of_skipped(self) -> None:
        for name in self._left_out()[self._told_of:]:
            self._display.warn(f"{name} is damaged: left out")
        self._told_of = len(self._left_out())

    def _is_finished(self, diverged: DivergenceError | None) -> bool:
        return not diverged and (int(self._loop.state.epoch) >= self._config.epochs or self._has_settled())

    def _has_settled(self) -> bool:
        return folders.has_settled(self._config, len(self._reached.epochs), self._reached.best)

    def _may_rewind(self) -> bool:
        return self._config.on_nan == "rewind" and len(self._reached.rewinds) < MOST_REWINDS

    def _rewind(self, diverged: DivergenceError) -> bool:
        """Go back to the newest checkpoint, or to the start where there is none, with half the rate of before."""
        rewinds = [*self._reached.rewinds, diverged.step]
        resumed = self._resume()
        factor = 0.5 ** len(rewinds)
        for name in {"learning_rate", "rates"} & set(self._loop.state.schedule.hyper):
            self._loop.state.hyper[name].assign(factor * self._loop.state.initial_hyper[name])
        self._reached.rewinds = rewinds
        self._display.warn(f"{str(diverged).partition(';')[0]}; back to step {int(self._loop.state.global_step)}, with {factor:g} times the rate "
                           f"({len(rewinds)} of at most {MOST_REWINDS} times)")
        return resumed

    def _resume(self) -> bool:
        """Go to the newest checkpoint, if there is one; were summaries written before it?"""
        self._loop.state.begin(self._config.seed)
        self._reached, self._saved, self._before = Reached(), None, dict(self._loop.seconds)
        folder = self._folder / "checkpoints"
        kept = {}
        if checkpoints.all_in(folder):
            path, manifest = checkpoints.newest(folder, self._display.warn)
            checkpoints.restore(self._loop.state, path, self._may_change(manifest))
            if (done := int(self._loop.state.epoch)) > self._config.epochs:
                raise UserError(f"{self._folder}: has made {done} epochs, more than --epochs={self._config.epochs}")
            self._reached = Reached(**manifest["reached"])
            if self._may_change(manifest):
                self._loop.state.reset(weights=False, slots=False, schedule=False, data=False, hyper=True)
            folders.write(self._folder / "config.json", self._config.to_json())
            step = int(self._loop.state.global_step)
            self._saved = step
            kept = manifest["events"]
            self._reached.resumed_at.append(step)
            self._display.say(f"resumed at step {step}, in epoch {min(int(self._loop.state.epoch) + 1, self._config.epochs)}, "
                              f"from {path}")
        elif made := folders.result(self._folder).get("steps"):
            raise UserError(f"{self._folder}: made {made} steps, but {folder} holds no checkpoint of them; put them back, or begin a new run")
        (self._folder / folders.RESULT).unlink(missing_ok=True)
        for path in self._folder.rglob("*tfevents*"):  # what was written after that checkpoint will be written again
            size = kept.get(str(path.relative_to(self._folder)), 0)
            if not size:
                path.unlink()
            elif size <= path.stat().st_size:
                os.truncate(path, size)
            else:
                self._display.warn(f"{path}: is shorter than when the checkpoint was made: part of the curves is lost")
        return bool(kept)

    def _may_change(self, manifest: dict) -> bool:
        """Do the settings change the mathematics of what the checkpoint holds, with --override?"""
        return bool(folders.changed(Config.make(**manifest["config"]), self._config))

    def _add(self, epoch: Epoch) -> bool:
        """Add an epoch to what was reached; is it the best so far?"""
        self._reached.epochs.append(_epoch_json(epoch))
        if not epoch.validation or self._reached.best and epoch.validation.accuracy <= self._reached.best["accuracy"]:
            return False
        self._reached.best = {"epoch": epoch.epoch, "accuracy": epoch.validation.accuracy,
                              "checkpoint": self._checkpoints.next_name()}
        return True

    def save(self, events: dict[str, int]) -> None:
        """Make a checkpoint; `events` are the sizes of the event files at this moment."""
        state, loop = self._loop.state, self._loop
        reached = {**dataclasses.asdict(self._reached), "seconds": self._seconds()}
        self._checkpoints.save({
            "tfloop": __version__, "config": dataclasses.asdict(self._config), "image_shape": loop.data.image_shape,
            "pixels": loop.data.train.images.dtype.name, "classes": loop.data.classes, "steps_per_epoch": loop.steps,
            "reached": reached, "best": self._reached.best, "events": events},
            self._reached.best["checkpoint"] if self._reached.best else None)
        self._saved = int(state.global_step)

    def _count(self, what: str, seconds: float) -> None:
        self._reached.seconds[what] = self._reached.seconds.get(what, 0.0) + seconds

    @contextlib.contextmanager
    def _timed(self, what: str):
        started = time.perf_counter()
        yield
        self._count(what, time.perf_counter() - started)

    def _seconds(self) -> dict[str, float]:
        """All seconds of the run, those before it was resumed included."""
        spent = {key: self._reached.seconds.get(key, 0.0) + self._loop.seconds[key] - self._before[key] for key in self._before}
        return {"setup": 0.0, "summaries": 0.0, "pictures": 0.0} | self._reached.seconds | spent

    def _result(self, diverged: DivergenceError | None) -> dict:
        config, loop, state, reached = self._config, self._loop, self._loop.state, self._reached
        seconds = self._seconds()
        maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "config": dataclasses.asdict(config), "hyper": _numbers(state), "finished": self._is_finished(diverged),
            "diverged": {"step": diverged.step, "layer": diverged.layer} if diverged else None,
            "weights": sum(weight.shape.num_elements() for weight in state.weights.values()),
            "steps": int(state.global_step), "steps_per_epoch": loop.steps, "resumed_at": reached.resumed_at, "rewinds": reached.rewinds,
            "epochs": reached.epochs, "final": reached.epochs[-1] if reached.epochs else None,
            "best_by_validation": reached.best, "left_out": self._left_out(),
            "seconds": {key: round(value, 4) for key, value in seconds.items()},
            "ms_per_step": 1000 * seconds["training"] / max(int(state.global_step), 1),
            "peak_memory_mib": round(maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1),
            "traces": loop.traces, "pipeline": loop.pipeline.name, "steps_per_call": loop.steps_per_call,
            "device": self._device, "cores": os.cpu_count(),
            "versions": {"tfloop": __version__, "python": platform.python_version(), "tensorflow": tf.__version__,
                         "keras": keras.__version__, "numpy": np.__version__},
            "weights_sha256": state.digest("weights", "moving"), "state_sha256": state.digest(),
        }


def may_end(record: Call | Epoch, loop: Loop) -> bool:
    """May the run stop after this record, to go on there? Not between an epoch's last call and its evaluation."""
    return isinstance(record, Epoch) or record.batch < loop.steps


class Due:
    """Is it time for a checkpoint? `every` is "epoch", a number of steps, "1000", or of seconds, "30s"."""

    def __init__(self, every: str, step: int):
        self._every, self._step, self._time = every, step, time.monotonic()

    def __call__(self, record: Call | Epoch) -> bool:
        if self._every == "epoch":
            return isinstance(record, Epoch)
        if self._every.endswith("s"):
            due = time.monotonic() - self._time >= float(self._every[:-1])
        else:
            due = record.step // int(self._every) > self._step // int(self._every)
        if due:
            self._step, self._time = record.step, time.monotonic()
        return due


class Profile:
    """Records a profile of the steps that `config.profile` names into the run's folder; use it in a `with` block."""

    def __init__(self, config: Config, folder: Path, say: Callable[[str], None]):
        self._steps, self._folder, self._say, self._running = config.profile_steps, folder / "train", say, False
        self._last, self._done = 0, False

    def write(self, record) -> None:
        """Start or stop after this record, where it is time to."""
        self._last = record.step
        self._move_to(record.step)

    def _move_to(self, step: int) -> None:
        if step in self._steps and not self._running:
            tf.profiler.experimental.start(str(self._folder))
            self._running = True
        elif self._running and step not in self._steps:
            tf.profiler.experimental.stop()
            self._running, self._done = False, True
            installed = any(importlib.util.find_spec(name) for name in ("xprof", "tensorboard_plugin_profile"))
            self._say(f"profile of steps {self._steps.start} to {min(self._last, self._steps.stop) - 1} written" + (
                "" if installed else "; TensorBoard shows it with its plugin: pip install xprof"))

    def __enter__(self) -> "Profile":
        self._move_to(0)
        return self

    def __exit__(self, *_) -> None:
        self._move_to(-1)
        if self._steps and not self._done:
            self._say(f"--profile={self._steps.start}:{self._steps.stop}: no such step was made; nothing is profiled")


def _numbers(state: TrainState) -> dict:
    """The numbers that the run really had, defaults included."""
    return {name: variable.numpy().tolist() for name, variable in state.hyper.items()}


def _epoch_json(epoch: Epoch) -> dict:
    parts = {part: {name: None if value is None else finite(value) for name, value in getattr(epoch, part)._asdict().items()}
             for part in ("train", "test", "validation") if getattr(epoch, part)}
    return {"epoch": epoch.epoch, "step": epoch.step, "rate": epoch.rate, "seconds": epoch.seconds, "steps": epoch.steps, **parts}
