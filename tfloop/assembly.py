"""From settings to objects: data, schedule, optimizer, augmentation, state and loop."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfloop import models
from tfloop.config import FIELDS, Config, hyperparameters
from tfloop.data import pack, sources
from tfloop.data.augmentation import Augmentation
from tfloop.data.dataset import Dataset, Standardizer
from tfloop.errors import UserError
from tfloop.loop import Loop
from tfloop.optimizers import CLIPS, Optimizer
from tfloop.schedules import Schedule, needs_length
from tfloop.state import TrainState
from tfloop.wording import shape_text


def load_data(config: Config) -> Dataset:
    """The data set that `config` names."""
    if not config.cache:
        return _load(config, config.dataset, config.validation_size)
    whole = _load(config, config.dataset, validation_size=0)
    if not whole.digest:
        raise UserError(
            f"--cache={config.cache}: --dataset={config.dataset} has no shards; only those are "
            "cached"
        )
    decoded = str(pack.cached(whole, config.cache))
    dataset = _load(config, decoded, config.validation_size)
    return dataclasses.replace(dataset, left_out=whole.left_out)


def _load(config: Config, dataset: str, validation_size: int) -> Dataset:
    return sources.load(
        dataset,
        config.split,
        validation_size,
        config.standardize,
        config.split_seed,
        config.on_bad_record,
    )


def steps_per_epoch(config: Config, dataset: Dataset) -> int:
    return -(-len(dataset.train) // config.batch_size)


def make_schedule(config: Config, steps: int) -> Schedule:
    """The schedule that `config` names, for epochs of `steps` steps."""
    unit = steps if config.schedule_unit == "epoch" else 1
    chosen = _chosen(config, hyperparameters("schedule"))
    if needs_length(config.schedule) and "decay_steps" not in chosen:
        length = config.epochs * steps / unit - config.warmup_steps
        chosen["decay_steps"] = max(length, 1.0 / unit)
    return Schedule(
        config.schedule,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        unit_steps=unit,
        **chosen,
    )


def make_optimizer(config: Config) -> Optimizer:
    """The optimizer that `config` names."""
    names = [*hyperparameters("optimizer"), *CLIPS]
    return Optimizer(config.optimizer, **_chosen(config, names))


def make_augmentation(config: Config) -> Augmentation:
    """The augmentation that `config` names."""
    return Augmentation(
        config.augment_shift,
        config.augment_rotate,
        config.augment_scale,
        config.augment_elastic,
        config.augment_cutout,
    )


def _chosen(config: Config, names: list[str]) -> dict[str, Any]:
    """The settings that differ from their default, which leaves the choice to the function."""
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if value != FIELDS[name].default}


def settle(loop: Loop, config: Config) -> None:
    """Make the numbers of `config` those that the loop's state begins with.

    The loop is then as if it had been made with them.

    Raises:
      UserError: the loop was made without a variable that `config` needs, or with one that it does
        not have.
    """
    parts = (
        make_schedule(config, loop.steps),
        make_optimizer(config),
        make_augmentation(config),
    )
    numbers = {name: v.numpy() for part in parts for name, v in part.hyper.items()}
    for name in ("l1", "l2", "label_smoothing"):
        numbers[name] = np.float32(getattr(config, name))
    if config.ema is not None:
        numbers["ema"] = config.ema
    if numbers.keys() != loop.state.hyper.keys():
        different = min(numbers.keys() ^ loop.state.hyper.keys())
        raise UserError(f"--{different} needs a loop of its own")
    loop.state.initial_hyper = numbers


def make_state(
    config: Config,
    image_shape: Sequence[int],
    classes: int,
    steps: int,
    standardizer: Standardizer | None = None,
    replicas: Any = None,
) -> TrainState:
    """Model, optimizer, schedule and penalties that `config` names, as one state.

    Args:
      config: the settings.
      image_shape: (height, width, channels).
      classes: how many the data have.
      steps: of an epoch.
      standardizer: of the pixels; None leaves them as they are.
      replicas: machine.replicas.Replicas that all get the model; None for one device.
    """
    schedule, optimizer = make_schedule(config, steps), make_optimizer(config)
    with replicas.strategy.scope() if replicas else contextlib.nullcontext():
        model = models.build(config, image_shape, classes)

    def initial_weights(seed: int) -> dict[str, np.ndarray]:
        return models.initial_weights(model, seed)

    return TrainState(
        model,
        optimizer,
        schedule,
        l1=config.l1,
        l2=config.l2,
        penalize=config.penalize,
        label_smoothing=config.label_smoothing,
        seed=config.seed,
        ema=config.ema,
        average_shifts=config.average_shifts,
        scale_loss=config.precision == "mixed_float16",
        augmentation=make_augmentation(config),
        standardizer=standardizer or Standardizer.identity(tuple(image_shape)),
        initial_weights=initial_weights,
    )


def make_loop(
    config: Config, dataset: Dataset | None = None, replicas: Any = None, **options: Any
) -> Loop:
    """The data, state and loop that `config` describes.

    Args:
      config: the settings.
      dataset: in place of the one that `config` names.
      replicas: machine.replicas.Replicas to train on, in place of one device.
      **options: more of Loop's.

    Raises:
      UserError: settings that do not go together, or data that cannot be read.
    """
    if not isinstance(config, Config):
        raise UserError(
            f"expected a tfloop.Config, found {type(config).__name__}; tfloop.Config.make(…) makes "
            "one"
        )
    dataset = dataset or load_data(config)
    for name in ("augment_shift", "augment_cutout", "average_shifts"):
        if (pixels := getattr(config, name)) >= min(dataset.image_shape[:2]):
            images = f"images of {shape_text(dataset.image_shape)}"
            raise UserError(f"--{name}={pixels} pixels leave nothing of {images}")
    steps = steps_per_epoch(config, dataset)
    shape, classes = dataset.image_shape, dataset.classes
    state = make_state(config, shape, classes, steps, dataset.standardizer, replicas)
    loop = Loop(
        state,
        dataset,
        batch_size=config.batch_size,
        evaluation_batch_size=config.evaluation_batch_size,
        pipeline=config.pipeline,
        steps_per_call=config.steps_per_call,
        jit_compile=config.jit_compile,
        eager=config.eager,
        fast=config.fast,
        shards=max(config.shards, 1),
        accumulate=config.accumulate,
        time_input=not config.deterministic,
        check_numerics=config.check_numerics,
        replicas=replicas,
        **options,
    )
    loop.single = config.profile_steps
    loop.stop_every = int(config.checkpoint_every) if config.checkpoint_every.isdecimal() else 0
    return loop
