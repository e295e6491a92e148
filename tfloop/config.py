"""Every setting of a run in one frozen dataclass, and the presets.

The settings are declared in groups, each beside what it is for: those of the schedules in
`schedules`, those of the optimizers in `optimizers`, the others here. The command line makes its
flags from them, and `config.json` is this object. Needs no TensorFlow.
"""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

from tfloop import criterion, plain_files
from tfloop.errors import UserError
from tfloop.optimizers import OPTIMIZERS, OptimizerSettings, check_pattern, parsed_rates
from tfloop.registry import Registry, parameters
from tfloop.schedules import SCHEDULES, ScheduleSettings
from tfloop.settings import COUNT, NOT_NEGATIVE, SHARE, WHOLE, Field, fields_of, option, whole
from tfloop.user_code import is_reference
from tfloop.wording import counted, listed

ACTIVATIONS = ("relu", "sigmoid", "elu", "tanh")


@dataclasses.dataclass(frozen=True)
class PresetSettings:
    HEADING: ClassVar[str] = "start from"

    preset: str = option("article2", "start from these settings; any flag overrides them")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    HEADING: ClassVar[str] = "data"

    dataset: str = option(
        "mnist",
        "mnist, digits, a folder of IDX files or shards, an .npz file, or FILE.py:function",
    )
    data_options: tuple[str, ...] = option(
        (), "with --dataset=FILE.py:function, arguments of the function: name=value,name=value"
    )
    on_bad_record: str = option(
        "stop",
        "where a record of a shard is damaged: stop, or leave it out and count it",
        choices=("stop", "skip"),
    )
    cache: str = option(
        "", "with shards: a folder that keeps their decoded images, read from there afterwards"
    )
    split: str = option(
        "standard",
        "the set's own test images, or all images joined, shuffled and cut again",
        choices=("standard", "shuffled"),
    )
    validation_size: int = option(
        0, "training images held out, stratified by class, for choosing anything", within=WHOLE
    )
    split_seed: int = option(
        0, "seed of the shuffled split and of the validation images", within=WHOLE
    )
    standardize: bool = option(
        True,
        "scale every pixel to mean 0 and variance 1 over the training images; turn it off with "
        "--augment_shift",
    )


@dataclasses.dataclass(frozen=True)
class AugmentationSettings:
    HEADING: ClassVar[str] = "augmentation"

    augment_shift: int = option(
        0, "shift each training image by up to N pixels", within=(0, 2**15), retrace="nonzero"
    )
    augment_rotate: float = option(
        0.0, "turn each training image by up to N degrees", within=(0.0, 180.0), retrace="nonzero"
    )
    augment_scale: float = option(
        0.0,
        "make each training image larger or smaller by up to this share",
        within=(0.0, 0.99),
        retrace="nonzero",
    )
    augment_elastic: float = option(
        0.0,
        "bend each training image: pull the points of a coarse grid by up to N pixels",
        within=(0.0, 2.0**15),
        retrace="nonzero",
    )
    augment_cutout: int = option(
        0,
        "blank a square of N × N pixels in each training image",
        within=(0, 2**15),
        retrace="nonzero",
    )
    augment_flip: bool = option(
        False, "change left and right of half of the training images", retrace="value"
    )
    mixup: float = option(
        0.0,
        "mix training images and targets in pairs, by shares from Beta(N, N)",
        within=(0.0, 100.0),
        retrace="value",
    )
    cutmix: float = option(
        0.0,
        "put a box of another training image in each, of a share from Beta(N, N)",
        within=(0.0, 100.0),
        retrace="value",
    )
    average_shifts: int = option(
        0,
        "evaluate the mean prediction over each image and its four neighbours shifted by N pixels",
        within=(0, 2**15),
        retrace="value",
    )


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    HEADING: ClassVar[str] = "model"

    model: str = option(
        "",
        "FILE.py:function that gives a Keras model or tf.Module, in place of the CNN that follows",
    )
    model_options: tuple[str, ...] = option(
        (), "with --model, arguments of the function: name=value,name=value"
    )
    conv: tuple[int, ...] = option((32, 64, 64), "filters of each convolution", within=COUNT)
    kernel: tuple[int, ...] = option(
        (3,), "kernel size of each convolution, or one for all", within=COUNT
    )
    pool: tuple[int, ...] = option(
        (2, 2),
        "max-pool size after each convolution; 1, or none given, is no pooling",
        within=COUNT,
    )
    padding: str = option("valid", "padding of the convolutions", choices=("valid", "same"))
    dense: tuple[int, ...] = option((70,), "units of each hidden dense layer", within=COUNT)
    conv_activation: str = option("relu", "after each convolution", choices=ACTIVATIONS)
    dense_activation: str = option("relu", "after each hidden dense layer", choices=ACTIVATIONS)
    output: str = option(
        "softmax",
        "softmax with cross-entropy, or sigmoid with binary cross-entropy",
        choices=("softmax", "sigmoid"),
    )
    batch_norm: bool = option(
        False,
        "batch normalisation between each convolution and its activation",
    )
    pool_first: bool = option(False, "pool before batch normalisation and activation, not after")
    dropout: float = option(
        0.0,
        "share of units dropped after each hidden dense layer",
        within=(0.0, 0.999),
    )


@dataclasses.dataclass(frozen=True)
class LossSettings:
    HEADING: ClassVar[str] = "loss"

    loss: str = option(
        "",
        "the name of a Keras loss, or FILE.py:function (targets, outputs); unset: by the targets",
        retrace="value",
    )
    metrics: tuple[str, ...] = option(
        (),
        "names of scikit-learn's and Keras's metrics, and FILE.py:function (targets, outputs)",
        retrace="value",
    )
    l1: float = option(0.0, "coefficient of the sum of |w|", within=NOT_NEGATIVE)
    l2: float = option(0.0, "coefficient of the sum of w²", within=NOT_NEGATIVE)
    penalize: str = option(
        "dense",
        "whose kernels the penalties count; biases never",
        choices=("dense", "conv", "all", "none"),
        retrace="value",
    )
    label_smoothing: float = option(
        0.0, "share of each label spread over all classes", within=SHARE
    )


@dataclasses.dataclass(frozen=True)
class RunSettings:
    HEADING: ClassVar[str] = "run"

    on_nan: str = option(
        "stop",
        "where a value is not finite: stop, or go back to the last checkpoint and halve the rate",
        choices=("stop", "rewind"),
    )
    early_stopping: int = option(
        0, "stop after N epochs that were no better, by --choose_by; 0: never", within=WHOLE
    )
    choose_by: str = option(
        "",
        'what "better" goes by: "validation accuracy", "min test my_metric"; unset: the validation '
        "accuracy, or loss",
    )
    until: str = option("", 'stop as soon as an evaluation says so: "test accuracy > 0.993"')
    max_time: str = option("", "stop after this time, with a checkpoint: 90s, 10m, 1.5h")
    evaluate_every: str = option("1epoch", "evaluate after so many steps, 500, or epochs, 2epochs")
    freeze: str = option(
        "",
        "a pattern (regular expression) of weights' names: those are not trained",
        retrace="value",
    )
    epochs: int = option(5, "passes over the training images", within=COUNT)
    batch_size: int = option(64, "images per step", within=COUNT, retrace="value")
    evaluation_batch_size: int = option(
        0,
        "images that an evaluation takes at once; 0: as many as a part of a step",
        within=WHOLE,
        retrace="value",
    )
    accumulate: int = option(
        1,
        "compute each batch in N parts, one after the other, to save memory",
        within=COUNT,
        retrace="value",
    )
    precision: str = option(
        "float32",
        "of multiplications; tf32: factors of 10 bits, on a GPU; mixed: layers in 16 bits",
        choices=("float32", "tf32", "mixed_float16", "mixed_bfloat16"),
    )
    seed: int = option(0, "of weights, data order, augmentation and dropout", within=WHOLE)
    seeds: tuple[int, ...] = option(
        (), "train once for each of these, in one process", within=WHOLE
    )
    runs: int = option(1, "train N times with the same seed, in one process", within=(1, 10_000))
    ensemble: int = option(
        1,
        "train N models side by side, with seeds from --seed on, or those of --seeds",
        within=(1, 64),
    )


@dataclasses.dataclass(frozen=True)
class ExecutionSettings:
    """The result does not depend on these, but for the order of float operations."""

    HEADING: ClassVar[str] = "where and how it runs"

    pipeline: str = option(
        "auto",
        "host: tf.data; prefetch: tf.data, copied ahead to the device; resident: the images stay "
        "on the device",
        choices=("auto", "host", "prefetch", "resident"),
    )
    steps_per_call: int = option(0, "steps in one compiled call; 0 chooses", within=WHOLE)
    deterministic: bool = option(False, "only operations that repeat bit for bit, on a GPU too")
    jit_compile: bool = option(
        False, "compile the step with XLA; on a GPU with resident images, all steps of a call"
    )
    fast: bool = option(
        True, "rearrange the forward pass: the same values, in another order of additions"
    )
    shards: int = option(
        0, "with --fast, parts of a batch computed side by side; 0 chooses", within=(0, 4096)
    )
    strategy: str = option(
        "none",
        "none: one device; mirrored: a replica on each GPU or of the CPU; multi_worker: by "
        "TF_CONFIG or Slurm",
        choices=("none", "mirrored", "multi_worker"),
    )
    replicas: int = option(
        0,
        "with --strategy, replicas in this process; 0: one on each GPU, or one on the CPU",
        within=(0, 64),
    )
    worker_timeout: float = option(
        60.0, "seconds to wait for the other workers at the start", within=(1.0, 86400.0)
    )
    onednn: str = option(
        "auto", "oneDNN's operations on the CPU; auto is on", choices=("auto", "on", "off")
    )
    eager: bool = option(False, "run the step uncompiled, op by op")
    device: str = option("auto", "auto, cpu, gpu or gpu:1")
    intra_op_threads: int = option(
        0, "threads inside one operation; 0: chosen for the job", within=(0, 4096)
    )
    inter_op_threads: int = option(
        0, "operations side by side; 0: chosen for the job", within=(0, 4096)
    )
    memory_growth: bool = option(True, "GPU memory is taken as needed, not all at once")
    memory_limit: int = option(0, "GPU memory at most, in MiB; 0: no limit", within=WHOLE)
    log_device_placement: bool = option(False, "print the device of every operation")
    tensorflow_log: bool = option(False, "show TensorFlow's own start-up messages")


@dataclasses.dataclass(frozen=True)
class InspectionSettings:
    HEADING: ClassVar[str] = "looking inside"

    summaries: str = option(
        "default",
        "scalars: curves; default: histograms too, pictures at the end; full: all by epoch",
        choices=("none", "scalars", "default", "full"),
    )
    summary_tensors: int = option(
        50,
        "weights, and layers, that get curves and histograms of their own, spread over the model",
        within=COUNT,
    )
    live_plot: bool = option(
        False, "keep curves.png in the run's folder up to date, epoch by epoch"
    )
    profile: str = option(
        "", "record a profile of these steps, such as 100:120, one step to a call"
    )
    check_numerics: bool = option(
        False, "name the operation that gives the first NaN or infinity; costs time"
    )
    debugger_dump: str = option(
        "", "a folder for what TensorBoard's Debugger V2 reads; costs much time"
    )


@dataclasses.dataclass(frozen=True)
class OutputSettings:
    HEADING: ClassVar[str] = "what is written"

    logdir: str = option("runs", "the folder in which each run gets a folder")
    name: str = option("", "first part of the run folder's name; unset: the preset")
    checkpoint_every: str = option("epoch", "epoch, a number of steps, or of seconds: 30s")
    keep: int = option(
        2,
        "checkpoints to keep, the newest; the best by validation is kept beside them",
        within=COUNT,
    )
    quiet: bool = option(False, "print nothing but errors")


# A dataclass collects the fields of its bases from the last to the first.
@dataclasses.dataclass(frozen=True)
class Config(
    OutputSettings,
    InspectionSettings,
    ExecutionSettings,
    RunSettings,
    ScheduleSettings,
    OptimizerSettings,
    LossSettings,
    ModelSettings,
    AugmentationSettings,
    DataSettings,
    PresetSettings,
):
    """Settings of one run. Make one with `Config.make`, which checks every value and combination.

    The default is the preset `article2`: conv 32-64-64, dense 70, RMSprop at rate 0.001, batch 64,
    5 epochs.
    """

    @classmethod
    def make(cls, /, preset: str = "article2", **values: Any) -> "Config":
        """The preset's settings with `values` in place of its own, checked.

        Args:
          preset: one of PRESETS.
          **values: settings by name, of the field's type or as text, as flags and files give them.

        Raises:
          UserError: an unknown name, a value of the wrong type or out of range, or an impossible
            combination.
        """
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UserError(f"--preset={preset} is unknown; choose from {', '.join(PRESETS)}")
        for name in values:
            if name not in FIELDS:
                raise UserError(f"there is no setting '{name}'")
        merged = {"preset": preset, **_without_replaced(PRESETS[preset], values), **values}
        config = cls(**{name: FIELDS[name].parse(value) for name, value in merged.items()})
        _check_combinations(config)
        return config

    def replace(self, /, **values: Any) -> "Config":
        """This configuration with other values, checked like new ones."""
        return Config.make(**{**dataclasses.asdict(self), **values})

    def to_json(self) -> str:
        """As written to `config.json`, which `--config` reads back."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seed of each run that these settings ask for."""
        if self.ensemble > 1 and not self.seeds:
            return tuple(range(self.seed, self.seed + self.ensemble))
        return self.seeds or (self.seed,) * self.runs

    def of_one_run(self, seed: int) -> "Config":
        """The settings of one of the runs, that with this seed."""
        return self.replace(seed=seed, seeds=(), runs=1, ensemble=1)

    @property
    def profile_steps(self) -> range:
        """The steps to profile, by global_step before each; empty where none are."""
        first, _, last = self.profile.partition(":")
        return range(int(first), int(last)) if self.profile else range(0)

    @staticmethod
    def read(path: str | Path, named: str = "--config=") -> dict[str, Any]:
        """The settings in a JSON file, unchecked.

        Args:
          path: a `config.json`, any part of one, or a folder that holds one.
          named: what messages put in front of the path.

        Raises:
          UserError: it cannot be read, or is no JSON object.
        """
        path = Path(path, "config.json") if Path(path).is_dir() else Path(path)
        try:
            values = plain_files.read_json(path, pipes=bool(named))
        except OSError as error:
            raise UserError(f"{named}{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{named}{path}: not JSON: {error}") from None
        if not isinstance(values, dict):
            kind = type(values).__name__
            raise UserError(f"{named}{path}: expected one JSON object of settings, found {kind}")
        return values


_SETTINGS: list[Any] = [group for group in Config.__mro__[::-1] if "HEADING" in vars(group)]
FIELDS: dict[str, Field] = fields_of(Config)
GROUPS: dict[str, list[str]] = {
    group.HEADING: list(fields_of(group)) for group in _SETTINGS
}  # heading → names, for help texts and for what a command takes

_FAST = {
    "kernel": (5, 3, 3),
    "pool": (2, 2),
    "batch_norm": True,
    "pool_first": True,
    "standardize": False,
    "augment_shift": 1,
    "label_smoothing": 0.05,
    "optimizer": "adam",
    "beta_2": 0.99,
    "schedule": "one_cycle",
    "learning_rate": 0.01,
    "average_shifts": 1,
}
_ARTICLE3 = {
    "dense": (120,),
    "schedule": "inverse_time",
    "learning_rate": 0.001,
    "decay_steps": 1,
    "decay_rate": 0.001,
    "epochs": 80,
}
PRESETS: dict[str, dict[str, Any]] = {
    "article2": {},
    "article3": {**_ARTICLE3, "conv": (64, 64, 128), "l2": 0.0008, "momentum": 0.8},
    "article3_32": {**_ARTICLE3, "conv": (32, 64, 128), "l2": 0.001, "momentum": 0.9},
    # Chosen on 10000 validation images, after training on 50000; the test images had no part in it.
    "speedrun": {
        **_FAST,
        "conv": (16, 32, 64),
        "dense": (96,),
        "batch_size": 64,
        "learning_rate": 0.02,
        "epochs": 1,
    },
    "accurate": {
        **_FAST,
        "conv": (16, 48, 64),
        "dense": (96,),
        "batch_size": 64,
        "epochs": 8,
        "augment_rotate": 8.0,
        "augment_scale": 0.08,
    },
    "best": {
        **_FAST,
        "conv": (32, 64, 96),
        "dense": (128,),
        "batch_size": 128,
        "epochs": 20,
        "augment_rotate": 10.0,
        "augment_scale": 0.1,
        "augment_elastic": 1.75,
        "ensemble": 6,
    },
    "digits": {
        "dataset": "digits",
        "conv": (16, 32),
        "pool": (2,),
        "dense": (32,),
        "batch_size": 32,
        "epochs": 20,
    },
}

_CHOSEN: dict[str, Registry] = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}


def hyperparameters(kind: str) -> list[str]:
    """The settings that belong to the "optimizer" or "schedule" that is chosen, in their order.

    The rate is not among them: every schedule has it, so another schedule takes it over.
    """
    accepted = {name for function in _CHOSEN[kind].values() for name in parameters(function)}
    return [name for name in FIELDS if name in accepted and name != "learning_rate"]


def users_of(name: str) -> list[str]:
    """The optimizers and schedules that take this setting as a hyperparameter."""
    registered = [pair for registry in _CHOSEN.values() for pair in registry.items()]
    return [user for user, function in registered if name in parameters(function)]


def check_setting(name: str, value: Any) -> Any:
    """`value` as the type of the setting `name`.

    Raises:
      UserError: it is of another type or out of range.
    """
    return FIELDS[name].parse(value)


def _without_replaced(preset: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The preset, less the numbers of an optimizer or schedule that `values` replace by another."""
    dropped: set[str] = set()
    for kind in _CHOSEN:
        current = preset.get(kind, FIELDS[kind].default)
        if values.get(kind, current) != current:
            dropped.update(hyperparameters(kind))
    return {name: value for name, value in preset.items() if name not in dropped}


def _check_combinations(config: Config) -> None:
    """Raises UserError for combinations that can be judged without looking at the data."""
    _check_code(config)
    _check_model(config)
    _check_penalties(config)
    _check_schedule(config)
    _check_formats(config)
    _check_modes(config)
    _check_seeds(config)


CODE = ("model", "dataset", "loss", "metrics")  # the settings that may name functions
OF_THE_CNN = tuple(
    name for name in fields_of(ModelSettings) if name not in ("model", "model_options")
)


def _check_code(config: Config) -> None:
    """Functions of the user's own, and what goes with them alone."""
    if config.model and not is_reference(config.model):
        raise UserError(
            f"--model={config.model}: expected FILE.py:function or package.module:function"
        )
    if config.model_options and not config.model:
        raise UserError("--model_options count with --model only")


def check_given(config: Config, given: Collection[str]) -> None:
    """Raises UserError for settings that were given and that these settings leave unused."""
    if config.model and (unused := [name for name in given if name in OF_THE_CNN]):
        raise UserError(
            f"--{unused[0]} is of the CNN, which --model={config.model} replaces; hand it to your "
            f"function: --model_options={unused[0]}=…"
        )


def _check_model(config: Config) -> None:
    if config.model:
        return
    if not config.conv:
        usual = ((), FIELDS["pool"].default, PRESETS[config.preset].get("pool"))
        if config.pool not in usual:
            raise UserError("--pool: there is no convolution to pool after; set --conv or --pool=")
        if config.batch_norm:
            raise UserError("--batch_norm: there is no convolution to normalise; set --conv")
    if config.dropout and not config.dense:
        raise UserError(
            f"--dropout={config.dropout} follows hidden dense layers, and there are none; set "
            "--dense"
        )
    convolutions, kernels, pools = len(config.conv), len(config.kernel), len(config.pool)
    if config.conv and kernels not in (1, convolutions):
        raise UserError(
            f"--kernel has {kernels} sizes for {counted(convolutions, 'convolution')}: give one, "
            "or one for each"
        )
    if config.conv and pools > convolutions:
        raise UserError(
            f"--pool has {pools} sizes for {counted(convolutions, 'convolution')}: give at most "
            "one for each"
        )


def _check_penalties(config: Config) -> None:
    penalty = next((name for name in ("l1", "l2") if getattr(config, name)), None)
    if penalty is None:
        return
    found = f"--{penalty}={getattr(config, penalty)} has no kernels to penalise"
    if config.penalize == "none":
        raise UserError(f"{found}: --penalize=none")
    if config.penalize == "conv" and not config.conv and not config.model:
        raise UserError(f"{found}: --penalize=conv, and the model has no convolution")


def _check_schedule(config: Config) -> None:
    if not config.restarts and (config.t_mul, config.m_mul) != (None, None):
        raise UserError("--t_mul and --m_mul count with --restarts only")
    boundaries, rates = len(config.boundaries), len(config.rates)
    if config.schedule == "piecewise" and (boundaries != rates or not boundaries):
        raise UserError(
            f"--schedule=piecewise needs --boundaries and as many --rates; found {boundaries} and "
            f"{rates}"
        )
    if list(config.boundaries) != sorted(set(config.boundaries)):
        shown = listed(f"{boundary:g}" for boundary in config.boundaries)
        raise UserError(f"--boundaries={shown} must rise from each to the next")


def _check_formats(config: Config) -> None:
    criterion.every(config.evaluate_every)
    if config.choose_by:
        criterion.parse(config.choose_by)
    if config.until:
        criterion.parse_goal(config.until)
    if config.max_time:
        criterion.seconds(config.max_time)
    for pattern in (config.freeze, config.exclude_from_weight_decay or ""):
        check_pattern(pattern)
    parsed_rates(config.rate_of)
    first, _, last = config.profile.partition(":")
    if config.profile:
        bounds = whole(first), whole(last)
        if None in bounds or bounds[0] >= bounds[1]:  # type: ignore[operator]  # none is None
            raise UserError(
                f"--profile={config.profile}: expected FIRST:LAST, two step numbers that rise, "
                "such as 100:120"
            )
    every = config.checkpoint_every.removesuffix("s")
    if config.checkpoint_every != "epoch" and not whole(every):
        raise UserError(
            f"--checkpoint_every={config.checkpoint_every}: expected epoch, a number of steps, or "
            "of seconds with an s, such as 30s"
        )


def _exclusion(one: str, other: str, reason: str) -> UserError:
    return UserError(f"--{one} and --{other} exclude each other: {reason}")


def _check_modes(config: Config) -> None:
    """Ways to run that exclude each other."""
    alone = ("eager", "jit_compile", "debugger_dump", "check_numerics")
    if config.strategy != "none":
        for name in alone:
            if getattr(config, name):
                raise _exclusion(f"strategy={config.strategy}", name, f"try --{name} on one device")
    elif config.replicas:
        raise UserError(
            f"--replicas={config.replicas} counts with --strategy=mirrored or multi_worker only"
        )
    if config.debugger_dump and config.jit_compile:
        raise _exclusion("debugger_dump", "jit_compile", "XLA leaves nothing to look into")
    if config.check_numerics:
        if config.precision == "mixed_float16":
            raise _exclusion(
                "check_numerics", "precision=mixed_float16", "there an overflow is nothing unusual"
            )
        for name in ("jit_compile", "debugger_dump"):
            if getattr(config, name):
                raise _exclusion("check_numerics", name, "TensorFlow cannot do both")
    if config.eager and config.jit_compile:
        raise _exclusion("eager", "jit_compile", "one runs op by op, the other compiles")
    limits = (config.clip_value, config.clip_norm, config.clip_global_norm)
    if sum(limit is not None for limit in limits) > 1:
        raise UserError(
            "--clip_value, --clip_norm and --clip_global_norm exclude each other: choose one"
        )
    by_validation = not config.choose_by or criterion.parse(config.choose_by).part == "validation"
    is_users = is_reference(config.dataset)  # which may have validation examples of its own
    if config.early_stopping and by_validation and not config.validation_size and not is_users:
        raise UserError(
            f"--early_stopping={config.early_stopping} looks at validation images, and there are "
            "none; set --validation_size"
        )
    if config.batch_size % config.accumulate:
        raise UserError(
            f"--accumulate={config.accumulate} does not divide --batch_size={config.batch_size}"
        )


def _check_seeds(config: Config) -> None:
    """Several runs at once, and what they exclude."""
    ensemble = f"ensemble={config.ensemble}"
    if config.ensemble > 1:
        for name in ("runs", "strategy", "eager", "check_numerics", "debugger_dump", "profile"):
            if getattr(config, name) != FIELDS[name].default:
                raise _exclusion(ensemble, name, f"try --{name} on one model")
        if config.on_nan == "rewind":
            reason = "a model that diverges ends, the others go on"
            raise _exclusion(ensemble, "on_nan=rewind", reason)
    if config.seeds and config.seed:
        raise _exclusion("seed", "seeds", "--seeds trains once for each seed")
    if config.seeds and config.runs > 1:
        raise _exclusion("seeds", "runs", "--seeds trains once for each seed")
