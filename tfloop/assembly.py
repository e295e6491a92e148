"""From settings to objects: data, schedule, optimizer, augmentation, state and loop."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfloop import criterion, models, scores, user_code
from tfloop.compatibility import batch_size_of
from tfloop.config import FIELDS, Config, hyperparameters
from tfloop.data import pack, sources
from tfloop.data.augmentation import Augmentation
from tfloop.data.dataset import Dataset, Standardizer, is_scaled, targets_text
from tfloop.data.spec import Array, Spec, of_data
from tfloop.errors import UserError
from tfloop.loop import Loop
from tfloop.nests import map_leaves
from tfloop.optimizers import CHOICES, CLIPS, Optimizer, of_keras, parsed_rates
from tfloop.schedules import Schedule, needs_length
from tfloop.state import TrainState
from tfloop.wording import shape_text


def load_data(config: Config) -> Dataset:
    """The data set that `config` names; for the article's CNN grey images have a channel."""
    data = _load_data(config)
    return data if config.model else data.as_images()


def _load_data(config: Config) -> Dataset:
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
        config.data_options if dataset == config.dataset else (),
    )


def steps_per_epoch(config: Config, dataset: Dataset) -> int:
    return -(-len(dataset.train) // batch_size_of(dataset, config.batch_size))


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


def make_optimizer(config: Config) -> Any:
    """The optimizer that `config` names: an Optimizer, or one of Keras's."""
    names = [*hyperparameters("optimizer"), *CLIPS]
    if config.optimizer in CHOICES.keras:
        others = ("rate_of", "exclude_from_weight_decay")
        given = {name: getattr(config, name) for name in others if getattr(config, name)}
        return of_keras(config.optimizer, **_chosen(config, names), **given)
    return Optimizer(
        config.optimizer,
        rate_of=parsed_rates(config.rate_of),
        exclude_from_weight_decay=config.exclude_from_weight_decay,
        **_chosen(config, names),
    )


def make_augmentation(config: Config) -> Augmentation:
    """The augmentation that `config` names."""
    return Augmentation(
        config.augment_shift,
        config.augment_rotate,
        config.augment_scale,
        config.augment_elastic,
        config.augment_cutout,
        config.augment_flip,
        config.mixup,
        config.cutmix,
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
    hypers = [getattr(part, "hyper", {}) for part in parts]  # Keras's optimizers have none
    numbers = {name: v.numpy() for hyper in hypers for name, v in hyper.items()}
    for name in ("l1", "l2", "label_smoothing"):
        numbers[name] = np.float32(getattr(config, name))
    if config.ema is not None:
        numbers["ema"] = config.ema
    if numbers.keys() != loop.state.hyper.keys():
        different = min(numbers.keys() ^ loop.state.hyper.keys())
        raise UserError(f"--{different} needs a loop of its own")
    loop.state.initial_hyper = numbers


def make_model(config: Config, spec: Spec) -> tuple[Any, Callable[[int], dict[str, np.ndarray]]]:
    """(the model that `config` names, seed → the first value of each of its variables by name).

    A function of the user's own is called with those of `config`, `inputs` (a nest of
    spec.Array: shape and dtype of one example), `input_shape` (of the only input), `classes`,
    `targets` (what each is, by name) and --model_options that it takes. Keras's random numbers
    follow from --seed, and its layers compute in --precision.

    Raises:
      UserError: the function fails, or gives no model.
    """
    if not config.model:
        if spec.target is None or spec.target.kind == "values" or spec.target.is_for_places:
            raise UserError(
                f"the article's CNN tells the class of an image; the targets are "
                f"{targets_text(spec.kinds)}: give a --model of your own, or class numbers as int"
            )
        model = models.build(config, spec.image_shape, spec.classes)
        return model, functools.partial(models.initial_weights, model)
    code = user_code.load(config.model, "model")
    known = {
        "config": config,
        "inputs": spec.inputs,
        "classes": spec.classes,
        "targets": spec.kinds,
    }
    if isinstance(spec.inputs, Array):
        known["input_shape"] = spec.inputs.shape
    options = user_code.options_of(config.model_options, "model_options")

    def build(seed: int) -> Any:
        with models.seeded(seed, config.precision), code.told("model"):
            model = code.call("model", known, options)
            _check_made(code, model)
            if not getattr(model, "built", True) or not model.variables:
                model(map_leaves(tf.constant, _as_inputs(spec)))
            return model

    made = build(config.seed)
    first = {config.seed: _values(made)}

    def initial_weights(seed: int) -> dict[str, np.ndarray]:
        values = first.get(seed) or _values(build(seed))
        return dict(zip(models.stable_names(made), values, strict=True))  # in the model's order

    return made, initial_weights


def _values(model: Any) -> list[np.ndarray]:
    """The values of all variables, in the model's order, whether they are trained or not."""
    trainable, other = models.named_variables(model)
    by_name = {**trainable, **other}
    return [by_name[name].numpy() for name in models.stable_names(model)]


def _check_made(code: user_code.Code, model: Any) -> None:
    if not isinstance(model, (keras.Model, tf.Module)) or not callable(model):
        raise UserError(
            f"--model={code.reference}: gives {type(model).__name__}; expected a keras.Model, or a "
            "tf.Module that can be called"
        )


def _as_inputs(spec: Spec) -> Any:
    """One example as a model takes it: pixels as float32."""

    def scaled(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32) if is_scaled(values) else values

    return map_leaves(scaled, spec.examples(1)[0])


def make_loss(config: Config) -> Any:
    """The loss that `config` names; None where it follows from the targets."""
    if not config.loss or not user_code.is_reference(config.loss):
        return config.loss or None
    return user_code.load(config.loss, "loss", or_dict=True).function


def make_metrics(config: Config) -> dict[str, Any]:
    """name → metric, of those that `config` names."""
    found: dict[str, Any] = {}
    for name in config.metrics:
        if user_code.is_reference(name):
            own = name.rpartition(":")[2]
            if own in found:
                raise UserError(f"--metrics: {own} comes twice; name the functions differently")
            function = user_code.load(name, "metrics", or_dict=True).function
            if isinstance(function, dict):
                found.update(function)  # by name, or by output
            else:
                found[own] = function
        else:
            found[name] = scores.named(name)
    return found


def make_state(
    config: Config,
    spec: Spec,
    steps: int,
    standardizer: Standardizer | None = None,
    replicas: Any = None,
) -> TrainState:
    """Model, loss, optimizer, schedule and penalties that `config` names, as one state.

    Args:
      config: the settings.
      spec: of the data.
      steps: of an epoch.
      standardizer: of the inputs; None leaves them as they are.
      replicas: machine.replicas.Replicas that all get the model; None for one device.
    """
    schedule, optimizer = make_schedule(config, steps), make_optimizer(config)
    with replicas.strategy.scope() if replicas else contextlib.nullcontext():
        model, initial_weights = make_model(config, spec)
    if config.freeze:
        models.freeze(model, config.freeze)
        if not model.trainable_variables:
            raise UserError(f"--freeze={config.freeze} leaves nothing to train")
    tells_layers_apart = bool(models.keras_layers(model))
    state = TrainState(
        model,
        optimizer,
        schedule,
        l1=config.l1,
        l2=config.l2,
        penalize=config.penalize if tells_layers_apart else _of_any(config),
        label_smoothing=config.label_smoothing,
        loss=make_loss(config),
        metrics=make_metrics(config),
        seed=config.seed,
        ema=config.ema,
        average_shifts=config.average_shifts,
        scale_loss=config.precision == "mixed_float16",
        augmentation=make_augmentation(config),
        standardizer=standardizer or Standardizer.identities(spec.examples(1)[0]),
        initial_weights=initial_weights,
    )
    inputs, targets = (map_leaves(tf.constant, part) for part in spec.examples(1))
    given = models.output_specs(model)
    if given is None:
        given = models.outputs(model, state.standardize(inputs), as_logits=False)
    state.settle(spec.kinds, targets, given)
    return state


def _of_any(config: Config) -> str:
    """Whose kernels penalties count in a model that does not tell its layers apart."""
    return "all" if config.penalize == FIELDS["penalize"].default else config.penalize


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
        pixels = getattr(config, name)
        if pixels and pixels >= min(dataset.image_shape[:2]):
            images = f"images of {shape_text(dataset.image_shape)}"
            raise UserError(f"--{name}={pixels} pixels leave nothing of {images}")
    steps, spec = steps_per_epoch(config, dataset), of_data(dataset)
    state = make_state(config, spec, steps, dataset.standardizer, replicas)
    return loop_of(config, state, dataset, replicas, **options)


def loop_of(
    config: Config, state: TrainState, dataset: Dataset, replicas: Any = None, **options: Any
) -> Loop:
    """The loop that `config` describes, around a state that is there already.

    Arguments as those of `make_loop`.
    """
    settings: dict[str, Any] = {
        "batch_size": config.batch_size,
        "evaluation_batch_size": config.evaluation_batch_size,
        "pipeline": config.pipeline,
        "steps_per_call": config.steps_per_call,
        "jit_compile": config.jit_compile,
        "eager": config.eager,
        "fast": config.fast,
        "shards": config.shards,
        "accumulate": config.accumulate,
        "time_input": not config.deterministic,
        "check_numerics": config.check_numerics,
        "replicas": replicas,
    }
    loop = Loop(state, dataset, **{**settings, **options})
    loop.evaluate_every = criterion.every(config.evaluate_every)
    loop.criterion = criterion.parse(config.choose_by) if config.choose_by else None
    loop.single = config.profile_steps
    loop.stop_every = int(config.checkpoint_every) if config.checkpoint_every.isdecimal() else 0
    return loop
