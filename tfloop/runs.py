"""A run on disk: a folder with config.json, event files, checkpoints and result.json. Made by `train`, read by others."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tfloop import __version__, checkpoints, data, models
from tfloop.config import HYPER, Config
from tfloop.errors import DivergenceError, UserError
from tfloop.loop import Epoch, Loop
from tfloop.optimizers import Optimizer
from tfloop.plots import LivePlot
from tfloop.progress import Display
from tfloop.schedules import SCHEDULES, Schedule, parameters
from tfloop.state import TrainState
from tfloop.summaries import Summaries


def load_data(config: Config) -> data.Dataset:
    """The data set that `config` names."""
    return data.load(config.dataset, config.split, config.validation_size, config.standardize, config.split_seed)


def make_schedule(config: Config, steps: int) -> Schedule:
    """The schedule that `config` names, for epochs of `steps` steps."""
    unit = steps if config.schedule_unit == "epoch" else 1
    chosen = _chosen(config, HYPER["schedule"])
    accepted = parameters(SCHEDULES[config.schedule])
    if "decay_steps" in accepted and accepted["decay_steps"] is None and "decay_steps" not in chosen:
        chosen["decay_steps"] = max(config.epochs * steps / unit - config.warmup_steps, 1.0)
    return Schedule(config.schedule, learning_rate=config.learning_rate, warmup_steps=config.warmup_steps,
                    unit_steps=unit, **chosen)


def make_optimizer(config: Config) -> Optimizer:
    """The optimizer that `config` names."""
    return Optimizer(config.optimizer, **_chosen(config, HYPER["optimizer"]))


def _chosen(config: Config, names: tuple[str, ...]) -> dict:
    """The settings of `names` that differ from their default, which leaves the choice to the rule or schedule."""
    default = Config()
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}


def make_state(config: Config, image_shape: tuple[int, ...], classes: int, steps: int,
               standardizer: data.Standardizer | None = None) -> TrainState:
    """Model, optimizer, schedule and penalties that `config` names, as one state."""
    schedule, optimizer = make_schedule(config, steps), make_optimizer(config)
    model = models.build(config, image_shape, classes)
    return TrainState(model, optimizer, schedule, l1=config.l1, l2=config.l2, penalize=config.penalize,
                      label_smoothing=config.label_smoothing, seed=config.seed,
                      standardizer=standardizer or data.Standardizer.identity(image_shape),
                      initial_weights=lambda seed: models.initial_weights(model, seed))


def make_loop(config: Config, dataset: data.Dataset | None = None, **options) -> Loop:
    """Data, unless given, state and loop that `config` describes; `options` are more of Loop's."""
    dataset = dataset or load_data(config)
    steps = -(-len(dataset.train) // config.batch_size)
    state = make_state(config, dataset.image_shape, dataset.classes, steps, dataset.standardizer)
    return Loop(state, dataset, batch_size=config.batch_size, pipeline=config.pipeline,
                steps_per_call=config.steps_per_call, jit_compile=config.jit_compile, eager=config.eager,
                fast=config.fast, shards=max(config.shards, 1), **options)


def train(config: Config, device: str = "", started: float | None = None,
          interrupted: Callable[[], bool] = lambda: False) -> list[dict]:
    """Train once for each seed in one process, each into a folder of its own; the results.

    Args:
      config: the settings.
      device: the device's name, for the record.
      started: time.perf_counter() when the program began, from which set-up is counted.
      interrupted: asked after every record; true ends the run with what it has reached.

    Raises:
      UserError: settings that do not go together, data that cannot be read, a logdir that cannot be written.
      DivergenceError: as Loop.run; the run's folder keeps the last good weights.
    """
    started = time.perf_counter() if started is None else started
    _writable(Path(config.logdir))
    loop = make_loop(config)
    state = loop.state
    with Display(config.epochs, loop.steps, config.quiet) as display:
        display.say(f"{len(loop.data.train)} training and {len(loop.data.test)} test images of "
                    f"{'×'.join(map(str, loop.data.image_shape))}, {loop.data.classes} classes; "
                    f"{sum(w.shape.num_elements() for w in state.weights.values()):,} weights; "
                    f"{device or 'default device'}, {loop.pipeline.name} pipeline"
                    f"{' (auto)' * (config.pipeline == 'auto')}")
        display.say(_settings_line(config, state))
        results = []
        for seed in config.seeds or (config.seed,) * config.runs:
            own = config.replace(seed=seed, seeds=(), runs=1)
            folder = create_folder(own)
            result = _train_once(own, loop, folder, display, device, started, interrupted)
            results.append({**result, "folder": str(folder)})
            display.say(f"{_closing_line(result)}\n{folder}")
            started = time.perf_counter()
            if interrupted():
                break
        if len(results) > 1 and all(result["epochs"] for result in results):
            final = 100 * np.array([result["epochs"][-1]["test"]["accuracy"] for result in results])
            display.say(f"{len(results)} runs: test accuracy {final.mean():.2f} % on average, standard deviation "
                        f"{final.std(ddof=1):.2f}, from {final.min():.2f} to {final.max():.2f}; the step was traced "
                        f"{loop.traces['train']} time{'s' * (loop.traces['train'] != 1)}")
    return results


def _train_once(config: Config, loop: Loop, folder: Path, display: Display, device: str, started: float,
                interrupted: Callable[[], bool]) -> dict:
    """One run from its start, into `folder`; its result, as written to result.json."""
    state = loop.state
    state.begin(config.seed)
    before = dict(loop.seconds)
    seconds = {"setup": time.perf_counter() - started, "summaries": 0.0, "pictures": 0.0}
    epochs: list[Epoch] = []
    diverged = None
    try:
        with Summaries(folder, loop, config) as summaries, Profile(config, loop, folder, display.say) as profile:
            plot = LivePlot(folder / "curves.png") if config.live_plot else None
            for record in loop.run(config.epochs):
                profile.write(record)
                with _timed(seconds, "summaries"):
                    summaries.write(record)
                display.write(record)
                if isinstance(record, Epoch):
                    epochs.append(record)
                    if plot:
                        plot.write(record)
                if interrupted():
                    break
            else:
                with _timed(seconds, "pictures"):
                    summaries.finish()
    except DivergenceError as error:
        diverged = error
    finally:
        checkpoints.save(state, folder / "checkpoints", {
            "tfloop": __version__, "config": dataclasses.asdict(config), "image_shape": loop.data.image_shape,
            "pixels": loop.data.train.images.dtype.name, "classes": loop.data.classes, "steps_per_epoch": loop.steps})
    seconds |= {key: loop.seconds[key] - before[key] for key in before}
    result = _result(config, loop, epochs, seconds, device, interrupted(), diverged)
    write_json(folder / "result.json", result)
    if diverged:
        raise diverged
    return result


@contextlib.contextmanager
def _timed(seconds: dict[str, float], what: str):
    started = time.perf_counter()
    yield
    seconds[what] += time.perf_counter() - started


class Profile:
    """Records a profile of the steps that `config.profile` names into the run's folder; use it in a `with` block."""

    def __init__(self, config: Config, loop: Loop, folder: Path, say: Callable[[str], None]):
        self._steps, self._folder, self._say, self._running = config.profile_steps, folder / "train", say, False
        loop.single = self._steps

    def write(self, record) -> None:
        """Start or stop after this record, where it is time to."""
        self._move_to(record.step)

    def _move_to(self, step: int) -> None:
        if step in self._steps and not self._running:
            tf.profiler.experimental.start(str(self._folder))
            self._running = True
        elif self._running and step not in self._steps:
            tf.profiler.experimental.stop()
            self._running = False
            installed = any(importlib.util.find_spec(name) for name in ("xprof", "tensorboard_plugin_profile"))
            self._say(f"profile of steps {self._steps.start} to {self._steps.stop - 1} written" + (
                "" if installed else "; TensorBoard shows it with its plugin: pip install xprof"))

    def __enter__(self) -> "Profile":
        self._move_to(0)
        return self

    def __exit__(self, *_) -> None:
        self._move_to(-1)


def dry_run(config: Config, device: str = "") -> None:
    """One step of everything, training, evaluation, summaries, checkpoint, in a folder that is removed afterwards."""
    _writable(Path(config.logdir))
    Path(config.logdir).mkdir(parents=True, exist_ok=True)
    dataset = load_data(config).head(config.batch_size)
    with tempfile.TemporaryDirectory(dir=config.logdir, prefix="dry_run-") as folder:
        own = config.replace(epochs=1, seeds=(), runs=1, logdir=folder)
        loop = make_loop(own, dataset)
        with Display(1, loop.steps, config.quiet) as display:
            result = _train_once(own, loop, create_folder(own), display, device, time.perf_counter(), lambda: False)
            display.say(f"dry run: one step of {config.batch_size} images, evaluation, summaries and checkpoint work; "
                        f"loss {result['final']['train']['total']:.4f}; nothing is kept")


def _result(config: Config, loop: Loop, epochs: list[Epoch], seconds: dict, device: str, interrupted: bool,
            diverged: DivergenceError | None) -> dict:
    state = loop.state
    best = max(epochs, key=lambda e: e.validation.accuracy, default=None) if len(loop.data.validation) else None
    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "config": dataclasses.asdict(config), "hyper": _numbers(state), "interrupted": interrupted,
        "diverged": {"step": diverged.step, "layer": diverged.layer} if diverged else None,
        "steps": int(state.global_step), "steps_per_epoch": loop.steps,
        "epochs": [_epoch_json(epoch) for epoch in epochs],
        "final": _epoch_json(epochs[-1]) if epochs else None,
        "best_by_validation": best.epoch if best else None,
        "seconds": {key: round(value, 4) for key, value in seconds.items()},
        "ms_per_step": 1000 * seconds["training"] / max(int(state.global_step), 1),
        "peak_memory_mib": round(maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1),
        "traces": loop.traces, "pipeline": loop.pipeline.name, "steps_per_call": loop.steps_per_call,
        "device": device, "cores": os.cpu_count(),
        "versions": {"tfloop": __version__, "python": platform.python_version(), "tensorflow": tf.__version__,
                     "keras": keras.__version__, "numpy": np.__version__},
        "weights_sha256": state.digest("weights", "moving"),
    }


def _numbers(state: TrainState) -> dict:
    """The numbers that the run really had, defaults included."""
    return {name: variable.numpy().tolist() for name, variable in state.hyper.items()}


def _settings_line(config: Config, state: TrainState) -> str:
    usual = {"warmup_steps": 0.0, "unit_steps": 1.0}  # not worth a word
    show = lambda hyper: ", ".join(f"{name} {','.join(f'{number:.7g}' for number in np.atleast_1d(variable.numpy()))}"
                                   for name, variable in hyper.items() if usual.get(name) != variable.numpy().tolist())
    return (f"{config.optimizer}: {show(state.optimizer.hyper)}; {config.schedule}: {show(state.schedule.hyper)}; "
            f"l1 {config.l1:g}, l2 {config.l2:g} on {config.penalize} kernels; batch {config.batch_size}, "
            f"{config.epochs} epochs")


def _epoch_json(epoch: Epoch) -> dict:
    parts = {part: getattr(epoch, part)._asdict() for part in ("train", "test", "validation") if getattr(epoch, part)}
    return {"epoch": epoch.epoch, "step": epoch.step, "rate": epoch.rate, "seconds": epoch.seconds, **parts}


def _closing_line(result: dict) -> str:
    seconds, final = result["seconds"], result["final"]
    reached = f"test accuracy {100 * final['test']['accuracy']:.2f} %" if final else "no epoch finished"
    return (f"{reached} after {result['steps']} steps: {seconds['training']:.1f} s of training "
            f"({result['ms_per_step']:.1f} ms/step), {seconds['setup']:.1f} s set-up, {seconds['tracing']:.1f} s tracing, "
            f"{seconds['evaluation']:.1f} s evaluation, {seconds['summaries'] + seconds['pictures']:.1f} s summaries")


# --- folders


def create_folder(config: Config) -> Path:
    """A new folder in config.logdir, never one that was there: "article2-001", "article2-002" …"""
    logdir, name = Path(config.logdir), config.name or config.preset
    if Path(name).name != name:
        raise UserError(f"--name={name}: expected a plain name, not a path; --logdir chooses the folder")
    number = 1
    while True:
        folder = logdir / f"{name}-{number:03d}"
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"--logdir={logdir}: cannot make {folder}: {error.strerror}") from None
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    return folder


def _writable(logdir: Path) -> None:
    """Say it before minutes of training, not after. What does not exist yet is judged by its nearest parent."""
    there = next(path for path in (logdir, *logdir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--logdir={logdir}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--logdir={logdir}: {there} is not writable")


def open_run(folder: str | Path) -> tuple[Config, TrainState, dict]:
    """(settings, state, manifest) of a finished run.

    Raises:
      UserError: not a run's folder, or its newest checkpoint is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a run's folder: it has no config.json")
    path = checkpoints.newest(folder / "checkpoints")
    manifest = checkpoints.read_manifest(path)
    config = Config.make(**manifest["config"])
    state = make_state(config, tuple(manifest["image_shape"]), manifest["classes"], manifest["steps_per_epoch"])
    checkpoints.restore(state, path)
    return config, state, manifest


def check_fit(images: np.ndarray, state: TrainState, manifest: dict, where: str) -> None:
    """Raises UserError for images of another shape or pixel type than the model was trained on."""
    shape, pixels = tuple(state.model.input_shape[1:]), manifest["pixels"]
    if images.shape[1:] != shape:
        raise UserError(f"{where}: images are {'×'.join(map(str, images.shape[1:]))}, the model takes "
                        f"{'×'.join(map(str, shape))}")
    if images.dtype.name != pixels:
        raise UserError(f"{where}: pixels are {images.dtype.name}, the model was trained on {pixels}")


def write_json(path: Path, content: dict) -> None:
    """Under a temporary name first, so that what bears the name is whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.rename(path)
