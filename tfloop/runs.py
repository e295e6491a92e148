"""From settings to objects: data, schedule, optimizer, state and loop, for a new run or for one on disk."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tfloop import checkpoints, data, folders, models, sources
from tfloop.augmentation import Augmentation
from tfloop.config import HYPER, Config
from tfloop.errors import UserError
from tfloop.loop import Loop
from tfloop.optimizers import CLIPS, Optimizer
from tfloop.schedules import SCHEDULES, Schedule, parameters
from tfloop.state import TrainState


def load_data(config: Config) -> data.Dataset:
    """The data set that `config` names."""
    load = lambda dataset, validation_size=config.validation_size: sources.load(
        dataset, config.split, validation_size, config.standardize, config.split_seed, config.on_bad_record)
    if not config.cache:
        return load(config.dataset)
    from tfloop import pack

    whole = load(config.dataset, validation_size=0)
    if not whole.digest:
        raise UserError(f"--cache={config.cache}: --dataset={config.dataset} has no shards; only those are cached")
    return dataclasses.replace(load(str(pack.cached(whole, config.cache))), left_out=whole.left_out)


def make_schedule(config: Config, steps: int) -> Schedule:
    """The schedule that `config` names, for epochs of `steps` steps."""
    unit = steps if config.schedule_unit == "epoch" else 1
    chosen = _chosen(config, HYPER["schedule"])
    accepted = parameters(SCHEDULES[config.schedule])
    if "decay_steps" in accepted and accepted["decay_steps"] is None and "decay_steps" not in chosen:
        chosen["decay_steps"] = max(config.epochs * steps / unit - config.warmup_steps, 1.0 / unit)
    return Schedule(config.schedule, learning_rate=config.learning_rate, warmup_steps=config.warmup_steps,
                    unit_steps=unit, **chosen)


def make_optimizer(config: Config) -> Optimizer:
    """The optimizer that `config` names."""
    return Optimizer(config.optimizer, **_chosen(config, HYPER["optimizer"] + tuple(CLIPS)))


def make_augmentation(config: Config) -> Augmentation:
    """The augmentation that `config` names."""
    return Augmentation(config.augment_shift, config.augment_rotate, config.augment_scale, config.augment_elastic, config.augment_cutout)


def settle(loop: Loop, config: Config) -> None:
    """Make the numbers of `config` those that the loop's state begins with, as if it had been made with them.

    Raises:
      UserError: the loop was made without a variable that `config` needs, or with one that it does not have.
    """
    parts = make_schedule(config, loop.steps), make_optimizer(config), make_augmentation(config)
    numbers = {name: variable.numpy() for part in parts for name, variable in part.hyper.items()}
    numbers |= {name: np.float32(getattr(config, name)) for name in ("l1", "l2", "label_smoothing")}
    numbers |= {"ema": config.ema} if config.ema is not None else {}
    if numbers.keys() != loop.state.hyper.keys():
        raise UserError(f"--{min(numbers.keys() ^ loop.state.hyper.keys())} needs a loop of its own")
    loop.state.initial_hyper = numbers


def _chosen(config: Config, names: tuple[str, ...]) -> dict:
    """The settings of `names` that differ from their default, which leaves the choice to the rule or schedule."""
    default = Config()
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}


def make_state(config: Config, image_shape: tuple[int, ...], classes: int, steps: int,
               standardizer: data.Standardizer | None = None, replicas=None) -> TrainState:
    """Model, optimizer, schedule and penalties that `config` names, as one state; the model on all `replicas`."""
    schedule, optimizer = make_schedule(config, steps), make_optimizer(config)
    with replicas.strategy.scope() if replicas else contextlib.nullcontext():
        model = models.build(config, image_shape, classes)
    return TrainState(model, optimizer, schedule, l1=config.l1, l2=config.l2, penalize=config.penalize,
                      label_smoothing=config.label_smoothing, seed=config.seed, ema=config.ema,
                      average_shifts=config.average_shifts,
                      scale_loss=config.precision == "mixed_float16",
                      augmentation=make_augmentation(config),
                      standardizer=standardizer or data.Standardizer.identity(image_shape),
                      initial_weights=lambda seed: models.initial_weights(model, seed))


def make_loop(config: Config, dataset: data.Dataset | None = None, replicas=None, **options) -> Loop:
    """Data, unless given, state and loop that `config` describes, on distribution.Replicas; `options` are more of Loop's."""
    if not isinstance(config, Config):
        raise UserError(f"expected a tfloop.Config, found {type(config).__name__}; tfloop.Config.make(…) makes one")
    dataset = dataset or load_data(config)
    for name in ("augment_shift", "augment_cutout", "average_shifts"):
        if (pixels := getattr(config, name)) >= min(dataset.image_shape[:2]):
            raise UserError(f"--{name}={pixels} pixels leave nothing of images of {'×'.join(map(str, dataset.image_shape))}")
    steps = -(-len(dataset.train) // config.batch_size)
    state = make_state(config, dataset.image_shape, dataset.classes, steps, dataset.standardizer, replicas)
    loop = Loop(state, dataset, batch_size=config.batch_size, pipeline=config.pipeline,
                steps_per_call=config.steps_per_call, jit_compile=config.jit_compile, eager=config.eager,
                fast=config.fast, shards=max(config.shards, 1), accumulate=config.accumulate, time_input=not config.deterministic,
                check_numerics=config.check_numerics, replicas=replicas, **options)
    loop.single = config.profile_steps
    loop.stop_every = int(config.checkpoint_every) if config.checkpoint_every.isdecimal() else 0
    return loop


def open_run(folder: str | Path, best: bool = False,
             warn: Callable[[str], None] = lambda message: None) -> tuple[Config, TrainState, dict]:
    """(settings, state, manifest) of a run, from its newest checkpoint that is whole; `warn` is told of others.

    The weights are their moving average where the run keeps one.

    Args: `best` takes the one that did best on the validation images.

    Raises:
      UserError: not a run's folder, or no checkpoint in it is whole.
    """
    folder = Path(folder)
    folders.settings(folder)
    path, manifest = checkpoints.newest(folder / "checkpoints", warn)
    if best:
        if not manifest["best"]:
            raise UserError(f"{folder}: has no best checkpoint: the run had no validation images, see --validation_size")
        path = folder / "checkpoints" / manifest["best"]["checkpoint"]
        manifest = checkpoints.read_manifest(path)
    config = Config.make(**manifest["config"])
    state = make_state(config, tuple(manifest["image_shape"]), manifest["classes"], manifest["steps_per_epoch"])
    checkpoints.restore(state, path)
    state.take_averages()
    return config, state, manifest


def check_fit(images: np.ndarray, state: TrainState, manifest: dict, where: str) -> None:
    """Raises UserError for images of another shape or pixel type than the model was trained on."""
    shape, pixels = tuple(state.model.input_shape[1:]), manifest["pixels"]
    if images.shape[1:] != shape:
        raise UserError(f"{where}: images are {'×'.join(map(str, images.shape[1:]))}, the model takes "
                        f"{'×'.join(map(str, shape))}")
    if images.dtype.name != pixels:
        raise UserError(f"{where}: pixels are {images.dtype.name}, the model was trained on {pixels}")
