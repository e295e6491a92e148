"""Every setting of a run: its name, default, range and help text, in one frozen dataclass, and the presets.

The command line makes its flags from these fields, `config.json` is this object, and a value is checked in one
place, `Config.make`, whether it came from a flag, a file or Python.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tfloop.errors import UserError

UNIT = (0.0, 1.0)  # closed interval
SHARE = (0.0, 0.9999999)
COUNT = (1, 2**31 - 1)
POSITIVE = (1e-30, math.inf)
NOT_NEGATIVE = (0.0, math.inf)


def option(default, help: str, choices: tuple[str, ...] = (), within: tuple[float, float] | None = None):
    """A field of Config with its help text and the values it accepts."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "within": within})


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run. Make one with `Config.make`, which checks every value and every combination.

    The default is the preset `article2`: conv 32-64-64, dense 70, RMSprop at rate 0.001, batch 64, 5 epochs.
    """

    preset: str = option("article2", "start from these settings; any flag overrides them")

    # --- data
    dataset: str = option("mnist", "mnist, digits, or a path: a folder of IDX files or TFRecord shards, or an .npz file")
    on_bad_record: str = option("stop", "where a record of a shard is damaged: stop, or leave it out and count it", choices=("stop", "skip"))
    cache: str = option("", "with shards: a folder to keep their decoded images in, read from there from then on")
    split: str = option("standard", "the set's own test images, or all images joined, shuffled and cut again",
                        choices=("standard", "shuffled"))
    validation_size: int = option(0, "training images held out, stratified by class, for choosing anything",
                                  within=(0, 2**31 - 1))
    split_seed: int = option(0, "of the shuffled split and of the choice of validation images", within=(0, 2**31 - 1))
    standardize: bool = option(True, "scale every pixel to mean 0 and variance 1 over the training images; not together with shifts")

    # --- augmentation
    augment_shift: int = option(0, "shift each training image by up to so many pixels", within=(0, 2**15))
    augment_rotate: float = option(0.0, "turn each training image by up to so many degrees", within=(0.0, 180.0))
    augment_scale: float = option(0.0, "make each training image larger or smaller by up to this share", within=(0.0, 0.99))
    augment_elastic: float = option(0.0, "bend each training image: the points of a coarse grid are pulled by up to so many pixels", within=(0.0, 2.0**15))
    augment_cutout: int = option(0, "blank a square of so many pixels a side in each training image", within=(0, 2**15))

    # --- model
    conv: tuple[int, ...] = option((32, 64, 64), "filters of each convolution", within=COUNT)
    kernel: tuple[int, ...] = option((3,), "kernel size of each convolution, or one size for all", within=COUNT)
    pool: tuple[int, ...] = option((2, 2), "max-pool size after each convolution; 1, or none given, is no pooling",
                                   within=COUNT)
    padding: str = option("valid", "padding of the convolutions", choices=("valid", "same"))
    dense: tuple[int, ...] = option((70,), "units of each hidden dense layer", within=COUNT)
    conv_activation: str = option("relu", "after each convolution", choices=("relu", "sigmoid", "elu", "tanh"))
    dense_activation: str = option("relu", "after each hidden dense layer", choices=("relu", "sigmoid", "elu", "tanh"))
    output: str = option("softmax", "softmax with cross-entropy, or sigmoid with binary cross-entropy",
                         choices=("softmax", "sigmoid"))
    batch_norm: bool = option(False, "batch normalisation between each convolution and its activation")
    pool_first: bool = option(False, "pool before batch normalisation and activation, not after")
    dropout: float = option(0.0, "share of units dropped after each hidden dense layer", within=(0.0, 0.999))

    # --- loss
    l1: float = option(0.0, "coefficient of the sum of |w|", within=NOT_NEGATIVE)
    l2: float = option(0.0, "coefficient of the sum of w²", within=NOT_NEGATIVE)
    penalize: str = option("dense", "whose kernels the penalties count; biases never",
                           choices=("dense", "conv", "all", "none"))
    label_smoothing: float = option(0.0, "share of each label spread over all classes", within=SHARE)

    # --- optimizer; None is the rule's own default
    optimizer: str = option("rmsprop", "update rule",
                            choices=("sgd", "rmsprop", "adam", "adamw", "nadam", "adamax"))
    learning_rate: float = option(0.001, "rate at the start of the schedule (the peak, for one_cycle)",
                                  within=NOT_NEGATIVE)
    momentum: float | None = option(None, "sgd, rmsprop", within=UNIT)
    nesterov: bool = option(False, "sgd: Nesterov's momentum")
    rho: float | None = option(None, "rmsprop: decay of the mean square", within=UNIT)
    centered: bool = option(False, "rmsprop: divide by the variance, not by the mean square")
    beta_1: float | None = option(None, "adam, adamw, nadam, adamax", within=SHARE)
    beta_2: float | None = option(None, "adam, adamw, nadam, adamax", within=SHARE)
    epsilon: float | None = option(None, "all but sgd: added to the divisor", within=NOT_NEGATIVE)
    weight_decay: float | None = option(None, "adamw: decoupled decay, times the rate", within=NOT_NEGATIVE)
    clip_value: float | None = option(None, "limit of each entry of the gradient", within=POSITIVE)
    clip_norm: float | None = option(None, "limit of the norm of each weight's gradient", within=POSITIVE)
    clip_global_norm: float | None = option(None, "limit of the norm of the whole gradient", within=POSITIVE)
    ema: float | None = option(None, "decay of a moving average of the weights, which then is what is evaluated", within=SHARE)

    average_shifts: int = option(0, "evaluate the mean prediction over each image and it shifted by so many pixels in 4 directions",
                                 within=(0, 2**15))

    # --- schedule
    schedule: str = option("constant", "rate as a function of the step",
                           choices=("constant", "inverse_time", "exponential", "polynomial", "piecewise", "cosine",
                                    "one_cycle"))
    schedule_unit: str = option("step", "what decay_steps, warmup_steps and boundaries count", choices=("step", "epoch"))
    decay_steps: float | None = option(None, "length of the schedule's step; unset, inverse_time and exponential "
                                             "take 1, the others the whole run", within=POSITIVE)
    decay_rate: float | None = option(None, "inverse_time, exponential", within=NOT_NEGATIVE)
    staircase: bool = option(False, "inverse_time, exponential: whole steps only")
    end_rate: float | None = option(None, "polynomial, cosine, one_cycle: last rate", within=NOT_NEGATIVE)
    power: float | None = option(None, "polynomial: exponent", within=POSITIVE)
    restarts: bool = option(False, "cosine: start again at each end")
    t_mul: float | None = option(None, "cosine: each restart's length over the last one's", within=(1.0, math.inf))
    m_mul: float | None = option(None, "cosine: each restart's rate over the last one's", within=NOT_NEGATIVE)
    start_rate: float | None = option(None, "one_cycle: first rate", within=NOT_NEGATIVE)
    peak_at: float | None = option(None, "one_cycle: where the peak lies, as a share of decay_steps",
                                   within=(1e-6, 0.999999))
    boundaries: tuple[float, ...] = option((), "piecewise: where the rate changes", within=NOT_NEGATIVE)
    rates: tuple[float, ...] = option((), "piecewise: the rate after each boundary", within=NOT_NEGATIVE)
    warmup_steps: float = option(0.0, "linear warm-up in front of any schedule", within=NOT_NEGATIVE)

    # --- run
    on_nan: str = option("stop", "where a value is not finite: stop, or go back to the last checkpoint and halve the rate",
                         choices=("stop", "rewind"))
    early_stopping: int = option(0, "stop after so many epochs without a better validation accuracy; 0: never",
                                 within=(0, 2**31 - 1))
    epochs: int = option(5, "passes over the training images", within=COUNT)
    batch_size: int = option(64, "images per step", within=COUNT)
    accumulate: int = option(1, "compute each batch in so many parts, one after the other, to save memory", within=COUNT)
    precision: str = option("float32", "of multiplications; tf32: factors of 10 bits, on a GPU; mixed: layers in 16 bits",
                            choices=("float32", "tf32", "mixed_float16", "mixed_bfloat16"))
    seed: int = option(0, "of weights, data order, augmentation and dropout", within=(0, 2**31 - 1))
    seeds: tuple[int, ...] = option((), "train once for each of these, in one process", within=(0, 2**31 - 1))
    runs: int = option(1, "train this often with the same seed, in one process", within=COUNT)

    ensemble: int = option(1, "train so many models side by side, with seeds from --seed on, or those of --seeds", within=(1, 64))

    # --- where and how it runs: the result does not depend on these, but for the order of float operations
    pipeline: str = option("auto", "host: tf.data; prefetch: tf.data, copied ahead to the device; resident: the "
                                   "images stay on the device", choices=("auto", "host", "prefetch", "resident"))
    steps_per_call: int = option(0, "steps in one compiled call; 0 chooses", within=(0, 2**31 - 1))
    deterministic: bool = option(False, "only operations that repeat bit for bit, on a GPU too")
    jit_compile: bool = option(False, "compile the step with XLA; on a GPU with resident images, all steps of a call")
    fast: bool = option(True, "rearrange the forward pass: the same values, in another order of additions")
    shards: int = option(0, "with --fast, parts of a batch computed side by side; 0 chooses", within=(0, 4096))
    strategy: str = option("none", "one device; a replica on each GPU (or of the CPU); several processes, by TF_CONFIG or Slurm",
                           choices=("none", "mirrored", "multi_worker"))
    replicas: int = option(0, "with --strategy, replicas in this process; 0: one on each GPU, or one on the CPU", within=(0, 64))
    worker_timeout: float = option(60.0, "seconds to wait for the other workers at the start", within=(1.0, 86400.0))
    onednn: str = option("auto", "oneDNN's operations on the CPU; auto is on", choices=("auto", "on", "off"))
    eager: bool = option(False, "run the step uncompiled, op by op")
    device: str = option("auto", "auto, cpu, gpu or gpu:1")
    intra_op_threads: int = option(0, "threads inside one operation; 0: TensorFlow decides", within=(0, 4096))
    inter_op_threads: int = option(0, "operations side by side; 0: TensorFlow decides", within=(0, 4096))
    memory_growth: bool = option(True, "GPU memory is taken as needed, not all at once")
    memory_limit: int = option(0, "GPU memory at most, in MiB; 0: no limit", within=(0, 2**31 - 1))
    log_device_placement: bool = option(False, "print the device of every operation")
    tensorflow_log: bool = option(False, "show TensorFlow's own start-up messages")

    # --- looking inside
    summaries: str = option("default", "what TensorBoard gets: curves; histograms and pictures; these after every epoch",
                            choices=("none", "scalars", "default", "full"))
    live_plot: bool = option(False, "keep curves.png in the run's folder up to date, epoch by epoch")
    profile: str = option("", "record a profile of these steps, 100:120 say, one step to a call")
    check_numerics: bool = option(False, "name the operation that gives the first NaN or infinity; costs time")
    debugger_dump: str = option("", "a folder for what TensorBoard's Debugger V2 reads; costs much time")

    # --- what is written
    logdir: str = option("runs", "the folder that each run gets a folder of its own in")
    name: str = option("", "first part of the run folder's name; unset: the preset")
    checkpoint_every: str = option("epoch", "epoch, a number of steps, or of seconds: 30s")
    keep: int = option(2, "checkpoints to keep, the newest; the best by validation is kept beside them", within=COUNT)
    quiet: bool = option(False, "print nothing but errors")

    @classmethod
    def make(cls, preset: str = "article2", **values: Any) -> "Config":
        """The preset's settings with `values` in place of its own, checked.

        Values may be of the field's type or text, as flags and files give them.

        Raises:
          UserError: an unknown name, a value of the wrong type or out of range, or an impossible combination.
        """
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UserError(f"--preset={preset} is unknown; choose from {', '.join(PRESETS)}")
        for name in values:
            if name not in FIELDS:
                raise UserError(f"there is no setting '{name}'")
        merged = {"preset": preset, **_without_replaced(PRESETS[preset], values), **values}
        config = cls(**{name: checked(name, value) for name, value in merged.items()})
        _check_combinations(config)
        return config

    def replace(self, **values: Any) -> "Config":
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
        """The settings in a JSON file, unchecked: a `config.json`, any part of one, or a folder that holds one."""
        path = Path(path, "config.json") if Path(path).is_dir() else Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{named}{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{named}{path}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{named}{path}: expected one JSON object of settings, found {type(values).__name__}")
        return values


FAST = dict(kernel=(5, 3, 3), pool=(2, 2), batch_norm=True, pool_first=True, standardize=False, augment_shift=1, label_smoothing=0.05,
            optimizer="adam", beta_2=0.99, schedule="one_cycle", learning_rate=0.01, average_shifts=1)
PRESETS: dict[str, dict[str, Any]] = {
    "article2": {},
    "article3": dict(conv=(64, 64, 128), dense=(120,), l2=0.0008, schedule="inverse_time", learning_rate=0.001,
                     decay_steps=1, decay_rate=0.001, momentum=0.8, epochs=80),
    "article3_32": dict(conv=(32, 64, 128), dense=(120,), l2=0.001, schedule="inverse_time", learning_rate=0.001,
                        decay_steps=1, decay_rate=0.001, momentum=0.9, epochs=80),
    # Chosen on 10000 validation images, after training on 50000; the test images had no part in it.
    "speedrun": dict(FAST, conv=(16, 32, 64), dense=(96,), batch_size=64, learning_rate=0.02, epochs=1),
    "accurate": dict(FAST, conv=(16, 48, 64), dense=(96,), batch_size=64, epochs=8, augment_rotate=8.0, augment_scale=0.08),
    "best": dict(FAST, conv=(32, 64, 96), dense=(128,), batch_size=128, epochs=20, augment_rotate=10.0, augment_scale=0.1,
                 augment_elastic=1.75, ensemble=6),
    "digits": dict(dataset="digits", conv=(16, 32), pool=(2,), dense=(32,), batch_size=32, epochs=20),
}

HYPER = {  # the settings that belong to the optimizer and to the schedule that are chosen
    "optimizer": ("momentum", "nesterov", "rho", "centered", "beta_1", "beta_2", "epsilon", "weight_decay"),
    "schedule": ("decay_steps", "decay_rate", "staircase", "end_rate", "power", "restarts", "t_mul", "m_mul",
                 "start_rate", "peak_at", "boundaries", "rates"),
}
_HINTS = get_type_hints(Config)
FIELDS: dict[str, dataclasses.Field] = {field.name: field for field in dataclasses.fields(Config)}
_FIRST = {"preset": "start from", "dataset": "data", "augment_shift": "augmentation", "conv": "model", "l1": "loss", "optimizer": "optimizer",
          "schedule": "schedule", "on_nan": "run", "pipeline": "where and how it runs", "summaries": "looking inside",
          "logdir": "what is written"}
GROUPS: dict[str, list[str]] = {}  # heading → fields, for help texts
for _name in FIELDS:
    if _name in _FIRST:
        _names = GROUPS[_FIRST[_name]] = []
    _names.append(_name)


def kind(name: str) -> tuple[type, bool, bool]:
    """(element type, is it a list, may it be unset) of a field."""
    hint, arguments = _HINTS[name], get_args(_HINTS[name])
    if not arguments:
        return hint, False, False
    return arguments[0], Ellipsis in arguments, type(None) in arguments


def checked(name: str, value: Any) -> Any:
    """`value` as the type of the setting `name`, or a UserError that names the flag."""
    element, is_list, may_be_unset = kind(name)
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's
    if may_be_unset and value in (None, ""):
        return None
    if not is_list:
        return _coerce_one(name, element, value)
    if isinstance(value, str):
        value = value.split(",") if value.strip() else []
    elif not isinstance(value, (list, tuple)):
        value = [value]
    return tuple(_coerce_one(name, element, part) for part in value)


def _coerce_one(name: str, element: type, value: Any) -> Any:
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[element]
    wrong = UserError(f"--{name}: expected {expected}, found {value!r}")
    try:
        if element is bool:
            value = {True: True, False: False, "true": True, "false": False}[value]
        elif element is str:
            if not isinstance(value, str):
                raise wrong
        else:
            if isinstance(value, bool) or (element is int and isinstance(value, float) and value != int(value)):
                raise wrong
            value = element(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise wrong from None
    choices, bounds = FIELDS[name].metadata["choices"], FIELDS[name].metadata["within"]
    if choices and value not in choices:
        raise UserError(f"--{name}={value} is unknown; choose from {', '.join(choices)}")
    if element is float and not math.isfinite(value):
        raise UserError(f"--{name}={value} is not a finite number")
    if bounds and not bounds[0] <= value <= bounds[1]:
        low, high = (f"{bound:g}" for bound in bounds)
        raise UserError(f"--{name}={value} is out of range: " + (
            "it must be positive" if bounds == POSITIVE else "it must be at least 0 and less than 1" if bounds == SHARE else
            f"it must be at least {low}" if bounds[1] >= 2**31 - 1 and value < bounds[0] else f"it must lie between {low} and {high}"))
    return value


def _without_replaced(preset: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The preset, less the numbers of an optimizer or schedule that `values` replace by another."""
    current = {kind: preset.get(kind, getattr(Config, kind)) for kind in HYPER}
    dropped = {name for kind, names in HYPER.items() if values.get(kind, current[kind]) != current[kind] for name in names}
    return {name: value for name, value in preset.items() if name not in dropped}


def _check_combinations(config: Config) -> None:
    """Combinations that can be judged without looking at the data."""
    if not config.conv and config.pool not in ((), Config.pool, PRESETS[config.preset].get("pool")):
        raise UserError("--pool: there is no convolution to pool after; set --conv or --pool=")
    if config.dropout and not config.dense:
        raise UserError(f"--dropout={config.dropout} follows hidden dense layers, and there are none; set --dense")
    if not config.restarts and (config.t_mul, config.m_mul) != (None, None):
        raise UserError("--t_mul and --m_mul count with --restarts only")
    if not config.conv and config.batch_norm:
        raise UserError("--batch_norm: there is no convolution to normalise; set --conv")
    if config.conv and len(config.kernel) not in (1, len(config.conv)):
        raise UserError(f"--kernel has {len(config.kernel)} sizes for {len(config.conv)} convolutions: "
                        f"give one, or one for each")
    if config.conv and len(config.pool) > len(config.conv):
        raise UserError(f"--pool has {len(config.pool)} sizes for {len(config.conv)} convolutions: "
                        f"give at most one for each")
    penalty = "l1" if config.l1 else "l2" if config.l2 else ""
    if penalty and config.penalize == "none":
        raise UserError(f"--{penalty}={getattr(config, penalty)} has no kernels to penalise: --penalize=none")
    if penalty and config.penalize == "conv" and not config.conv:
        raise UserError(f"--{penalty}={getattr(config, penalty)} has no kernels to penalise: --penalize=conv, "
                        f"and the model has no convolution")
    if config.schedule == "piecewise" and len(config.rates) != len(config.boundaries) or \
            config.schedule == "piecewise" and not config.boundaries:
        raise UserError(f"--schedule=piecewise needs --boundaries and as many --rates; found "
                        f"{len(config.boundaries)} and {len(config.rates)}")
    if list(config.boundaries) != sorted(set(config.boundaries)):
        raise UserError(f"--boundaries={','.join(f'{b:g}' for b in config.boundaries)} must rise from each to the next")
    first, _, last = config.profile.partition(":")
    if config.profile and not (first.isdecimal() and last.isdecimal() and int(first) < int(last) < 2**31):
        raise UserError(f"--profile={config.profile}: expected FIRST:LAST, two step numbers that rise, such as 100:120")
    every = config.checkpoint_every.removesuffix("s")
    if config.checkpoint_every != "epoch" and not (every.isdecimal() and every.isascii() and int(every)):
        raise UserError(f"--checkpoint_every={config.checkpoint_every}: expected epoch, a number of steps, or of seconds with an "
                        f"s, such as 30s")
    if config.strategy != "none" and (config.eager or config.jit_compile or config.debugger_dump or config.check_numerics):
        other = next(name for name in ("eager", "jit_compile", "debugger_dump", "check_numerics") if getattr(config, name))
        raise UserError(f"--strategy={config.strategy} and --{other} exclude each other: try --{other} on one device")
    if config.strategy == "none" and config.replicas:
        raise UserError(f"--replicas={config.replicas} counts with --strategy=mirrored or multi_worker only")
    if config.debugger_dump and config.jit_compile:
        raise UserError("--debugger_dump and --jit_compile exclude each other: XLA leaves nothing to look into")
    if config.check_numerics and config.precision == "mixed_float16":
        raise UserError("--check_numerics and --precision=mixed_float16 exclude each other: there an overflow is nothing unusual")
    if config.check_numerics and (config.jit_compile or config.debugger_dump):
        other = "jit_compile" if config.jit_compile else "debugger_dump"
        raise UserError(f"--check_numerics and --{other} exclude each other: TensorFlow cannot do both")
    if sum(limit is not None for limit in (config.clip_value, config.clip_norm, config.clip_global_norm)) > 1:
        raise UserError("--clip_value, --clip_norm and --clip_global_norm exclude each other: choose one")
    if config.early_stopping and not config.validation_size:
        raise UserError(f"--early_stopping={config.early_stopping} looks at validation images, and there are none; set --validation_size")
    if config.batch_size % config.accumulate:
        raise UserError(f"--accumulate={config.accumulate} does not divide --batch_size={config.batch_size}")
    if config.ensemble > 1:
        for name in ("runs", "strategy", "eager", "check_numerics", "debugger_dump", "profile"):
            if getattr(config, name) != getattr(Config, name):
                raise UserError(f"--ensemble={config.ensemble} and --{name} exclude each other: try --{name} on one model")
        if config.on_nan == "rewind":
            raise UserError(f"--ensemble={config.ensemble} and --on_nan=rewind exclude each other: a model that diverges ends, the others go on")
    if config.eager and config.jit_compile:
        raise UserError("--eager and --jit_compile exclude each other: one runs op by op, the other compiles")
    if config.seeds and config.seed:
        raise UserError("--seed and --seeds exclude each other: --seeds trains once for each seed")
    if config.seeds and config.runs > 1:
        raise UserError("--seeds and --runs exclude each other: --seeds trains once for each seed")
