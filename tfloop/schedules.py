"""Learning-rate schedules: pure functions `step → rate`, and the object that keeps their numbers.

Each function takes the step as float32 (or a number) and its hyperparameters by name, and returns
a float32 scalar. The names are those of the command line's flags. Formulas follow
keras.optimizers.schedules where it has the schedule.

To add a schedule, write its function here with `@SCHEDULES.register`, and a field of
`ScheduleSettings` for each hyperparameter that no other schedule has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from tfloop.errors import UserError
from tfloop.lazy import tf
from tfloop.registry import Bound, Registry, parameters
from tfloop.settings import NOT_NEGATIVE, POSITIVE, fields_of, option
from tfloop.user_code import told_in_one_line

SCHEDULES = Registry("schedule")

Number: TypeAlias = "float | tf.Tensor"


@SCHEDULES.register
def constant(step: tf.Tensor, *, learning_rate: Number) -> tf.Tensor:
    """learning_rate, whatever the step."""
    return tf.convert_to_tensor(learning_rate, tf.float32)


@SCHEDULES.register
def inverse_time(
    step: tf.Tensor,
    *,
    learning_rate: Number,
    decay_steps: Number = 1.0,
    decay_rate: Number = 0.001,
    staircase: bool = False,
) -> tf.Tensor:
    """learning_rate / (1 + decay_rate · step / decay_steps).

    Keras's InverseTimeDecay, the "power" schedule.
    """
    return learning_rate / (1.0 + decay_rate * _progress(step, decay_steps, staircase))


@SCHEDULES.register
def exponential(
    step: tf.Tensor,
    *,
    learning_rate: Number,
    decay_steps: Number = 1.0,
    decay_rate: Number = 0.999,
    staircase: bool = False,
) -> tf.Tensor:
    """learning_rate · decay_rate ** (step / decay_steps)."""
    base = tf.cast(decay_rate, tf.float32)
    return learning_rate * tf.pow(base, _progress(step, decay_steps, staircase))


@SCHEDULES.register
def polynomial(
    step: tf.Tensor,
    *,
    learning_rate: Number,
    decay_steps: Number,
    end_rate: Number = 0.0,
    power: Number = 1.0,
) -> tf.Tensor:
    """(learning_rate - end_rate) · (1 - step / decay_steps) ** power + end_rate.

    From decay_steps on it is end_rate.
    """
    share = tf.minimum(_progress(step, decay_steps), 1.0)
    return (learning_rate - end_rate) * tf.pow(1.0 - share, power) + end_rate


@SCHEDULES.register
def piecewise(
    step: tf.Tensor, *, learning_rate: Number, boundaries: tf.Tensor, rates: tf.Tensor
) -> tf.Tensor:
    """learning_rate up to and with boundaries[0], then rates[0] up to and with boundaries[1], …"""
    passed = tf.reduce_sum(tf.cast(tf.cast(step, tf.float32) > boundaries, tf.int64))
    return tf.gather(tf.concat([[learning_rate], rates], axis=0), passed)


@SCHEDULES.register
def cosine(
    step: tf.Tensor,
    *,
    learning_rate: Number,
    decay_steps: Number,
    end_rate: Number = 0.0,
    t_mul: Number = 2.0,
    m_mul: Number = 1.0,
    restarts: bool = False,
) -> tf.Tensor:
    """end_rate + (learning_rate - end_rate) · (1 + cos(π · step / decay_steps)) / 2.

    From decay_steps on it is end_rate. With `restarts` it starts again at each end (Loshchilov and
    Hutter, arXiv:1608.03983): period i lasts decay_steps · t_mul ** i, and learning_rate - end_rate
    is multiplied by m_mul ** i in it, as in Keras's CosineDecayRestarts.
    """
    share = _progress(step, decay_steps)
    height = tf.convert_to_tensor(learning_rate, tf.float32) - end_rate
    if restarts:
        period, share = _period(share, t_mul)
        height *= tf.pow(tf.cast(m_mul, tf.float32), period)
    share = tf.minimum(share, 1.0)
    return end_rate + height * 0.5 * (1.0 + tf.cos(math.pi * share))


def _period(share: tf.Tensor, t_mul: Number) -> tuple[tf.Tensor, tf.Tensor]:
    """(number i of the period that `share` lies in, how much of that period has passed).

    Period 0 has length 1 and each is t_mul times as long as the last. For t_mul = 1 the number of
    periods passed is floor(share), else the greatest i for which (t_mul ** i - 1) / (t_mul - 1) is
    not above share.
    """
    grows = tf.not_equal(t_mul, 1.0)
    t = tf.where(grows, t_mul, 2.0)

    def start(i: tf.Tensor) -> tf.Tensor:
        return tf.where(grows, (tf.pow(t, i) - 1.0) / (t - 1.0), i)

    passed = tf.where(grows, tf.math.log1p(share * (t - 1.0)) / tf.math.log(t), share)
    i = tf.floor(passed)
    # The logarithm may round across a boundary: step back or on where it did.
    i = tf.where(start(i) > share, i - 1.0, i)
    i = tf.where(start(i + 1.0) <= share, i + 1.0, i)
    return i, (share - start(i)) / tf.where(grows, tf.pow(t, i), 1.0)


@SCHEDULES.register
def one_cycle(
    step: tf.Tensor,
    *,
    learning_rate: Number,
    decay_steps: Number,
    peak_at: Number = 0.25,
    start_rate: Number = 0.0,
    end_rate: Number = 0.0,
    anneal_cosine: bool = False,
    three_phase: bool = False,
) -> tf.Tensor:
    """start_rate, up to learning_rate at peak_at · decay_steps, down to end_rate at decay_steps.

    The one-cycle policy (Smith, arXiv:1803.09820, section 4), in straight lines or, with
    `anneal_cosine`, in halves of a cosine: a + (b - a) · (1 - cos(π · share)) / 2. With
    `three_phase` it is back at start_rate at 2 · peak_at · decay_steps and goes to end_rate from
    there. PyTorch's OneCycleLR(max_lr, total_steps=T, pct_start=p, div_factor=d,
    final_div_factor=f) is decay_steps = T - 1, peak_at = (p · T - 1) / (T - 1), start_rate =
    max_lr / d and end_rate = start_rate / f.
    """
    share = tf.minimum(_progress(step, decay_steps), 1.0)

    def between(first: Number, last: Number, passed: tf.Tensor) -> tf.Tensor:
        if anneal_cosine:
            passed = 0.5 * (1.0 - tf.cos(math.pi * passed))
        return first + (last - first) * passed

    rising = between(start_rate, learning_rate, share / peak_at)
    if not three_phase:
        falling = between(end_rate, learning_rate, (1.0 - share) / (1.0 - peak_at))
        return tf.where(share < peak_at, rising, falling)
    falling = between(learning_rate, start_rate, share / peak_at - 1.0)
    last = between(start_rate, end_rate, (share - 2.0 * peak_at) / (1.0 - 2.0 * peak_at))
    return tf.where(share < peak_at, rising, tf.where(share < 2.0 * peak_at, falling, last))


def warm_up(
    step: tf.Tensor, warmup_steps: Number, schedule: Callable[[tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """`schedule`, reached linearly and then shifted by warmup_steps.

    Before warmup_steps the rate is schedule(0) · (step + 1) / warmup_steps. `step` and
    `warmup_steps` count steps, whatever the schedule counts.
    """
    late = schedule(tf.maximum(step - warmup_steps, 0.0))
    return late * tf.minimum((step + 1.0) / tf.maximum(warmup_steps, 1.0), 1.0)


def _progress(step: tf.Tensor, decay_steps: Number, staircase: bool = False) -> tf.Tensor:
    share = tf.cast(step, tf.float32) / decay_steps
    return tf.floor(share) if staircase else share


def needs_length(name: str) -> bool:
    """Has the schedule a length, decay_steps, without a default? Then it is as long as the run."""
    accepted = parameters(SCHEDULES[name])
    return "decay_steps" in accepted and accepted["decay_steps"] is None


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """The schedule that is chosen, and the hyperparameters of all of them."""

    HEADING: ClassVar[str] = "schedule"

    schedule: str = option(
        "constant", "rate as a function of the step", choices=SCHEDULES, retrace="value"
    )
    learning_rate: float = option(
        0.001,
        "rate at the start of the schedule (the peak, for one_cycle)",
        within=NOT_NEGATIVE,
    )
    schedule_unit: str = option(
        "step", "what decay_steps, warmup_steps and boundaries count", choices=("step", "epoch")
    )
    decay_steps: float | None = option(
        None,
        "length in steps; unset, the rule's default, or else that of the run",
        within=POSITIVE,
    )
    decay_rate: float | None = option(
        None,
        "the divisor's growth (inverse_time), or the factor (exponential), per decay_steps",
        within=NOT_NEGATIVE,
    )
    staircase: bool = option(False, "count whole decay_steps only", retrace="value")
    end_rate: float | None = option(None, "last rate", within=NOT_NEGATIVE)
    power: float | None = option(None, "exponent", within=POSITIVE)
    restarts: bool = option(False, "start again at each end", retrace="value")
    t_mul: float | None = option(
        None, "each restart's length over the last one's", within=(1.0, math.inf)
    )
    m_mul: float | None = option(
        None, "each restart's rate over the last one's", within=NOT_NEGATIVE
    )
    start_rate: float | None = option(None, "first rate", within=NOT_NEGATIVE)
    peak_at: float | None = option(
        None,
        "where the peak lies, as a share of decay_steps",
        within=(1e-6, 0.999999),
    )
    anneal_cosine: bool = option(
        False, "up and down in halves of a cosine, not in lines", retrace="value"
    )
    three_phase: bool = option(False, "down to start_rate first, then to end_rate", retrace="value")
    boundaries: tuple[float, ...] = option(
        (), "where the rate changes", within=NOT_NEGATIVE, retrace="length"
    )
    rates: tuple[float, ...] = option(
        (), "the rate after each boundary", within=NOT_NEGATIVE, retrace="length"
    )
    plateau_factor: float | None = option(
        None, "what the rate is multiplied by at each fall", within=(0.0, 1.0)
    )
    plateau_patience: float | None = option(
        None, "evaluations that are no better, by --choose_by, before it falls", within=POSITIVE
    )
    min_rate: float | None = option(None, "the rate falls no further", within=NOT_NEGATIVE)
    warmup_steps: float = option(
        0.0, "linear warm-up in front of any schedule", within=NOT_NEGATIVE
    )


@SCHEDULES.register
def plateau(
    step: tf.Tensor,
    falls: Number = 0.0,
    *,
    learning_rate: Number,
    plateau_factor: Number = 0.1,
    plateau_patience: Number = 10.0,
    min_rate: Number = 0.0,
) -> tf.Tensor:
    """max(learning_rate · plateau_factor ** falls, min_rate).

    `falls` grows by one after plateau_patience evaluations in a row that were no better than the
    best before them, and counting begins anew: Keras's ReduceLROnPlateau with min_delta=0.
    """
    return tf.maximum(learning_rate * tf.pow(plateau_factor, falls), min_rate)


class Schedule:
    """A schedule with its numbers as variables: called with a step it gives the rate.

    Assigning a number never retraces.

    Example:
      >>> schedule = Schedule("inverse_time", learning_rate=0.001, decay_rate=0.001)
      >>> float(schedule(1000))
      0.0005000000237487257
      >>> schedule.hyper["learning_rate"].assign(0.01)

    Attributes:
      name: of the schedule; "schedule" where it is a function of the user's own.
      hyper: name → float32 variable, for every hyperparameter the schedule has.
      slots: name → float64 variable, what it keeps of evaluations: of "plateau" how often the rate
        fell, the best value, and the evaluations since.
    """

    def __init__(
        self,
        name: str | Callable = "constant",
        *,
        warmup_steps: float = 0.0,
        unit_steps: float = 1.0,
        **hyper: Any,
    ) -> None:
        """Make one.

        Args:
          name: one of SCHEDULES; or a function step → rate, such as a
            keras.optimizers.schedules.LearningRateSchedule.
          warmup_steps: length of the linear warm-up in front, in units; 0 is none.
          unit_steps: steps in one unit of the schedule: 1, or an epoch's steps to count epochs.
          **hyper: the schedule's hyperparameters; those left out take its defaults.

        Raises:
          UserError: an unknown schedule; a hyperparameter that it does not have, or that it needs
            and did not get.
        """
        if callable(name):
            if hyper:
                raise UserError(f"--{min(hyper)}: a schedule that is a function takes a step alone")
            self.name, bound = "schedule", Bound(name, {}, {})
        else:
            self.name = name
            bound = SCHEDULES.bind(name, hyper, fields_of(ScheduleSettings))
        self._function, numbers, self._switches = bound
        boundaries, rates = len(numbers.get("boundaries", ())), len(numbers.get("rates", ()))
        if boundaries != rates:
            raise UserError(
                f"--schedule=piecewise needs as many rates as boundaries; found {rates} and "
                f"{boundaries}"
            )
        self._check(numbers, warmup_steps)
        numbers |= {"warmup_steps": warmup_steps, "unit_steps": unit_steps}
        self.hyper = {
            key: tf.Variable(value, dtype=tf.float32, trainable=False, name=key)
            for key, value in numbers.items()
        }
        kept = self._initial if self.name == "plateau" else {}
        self.slots = {
            key: tf.Variable(value, dtype=tf.float64, trainable=False, name=key)
            for key, value in kept.items()
        }

    _initial: ClassVar = {"falls": 0.0, "best": math.nan, "waits": 0.0}

    def note(self, value: float, is_max: bool) -> None:
        """Take an evaluation into account.

        Args:
          value: of what is to become better.
          is_max: is more better?
        """
        best, waits = float(self.slots["best"]), float(self.slots["waits"])
        if math.isnan(best) or (value > best if is_max else value < best):
            self.slots["best"].assign(value)
            self.slots["waits"].assign(0.0)
        elif waits + 1 < float(self.hyper["plateau_patience"]):
            self.slots["waits"].assign(waits + 1)
        else:
            self.slots["waits"].assign(0.0)
            self.slots["falls"].assign_add(1.0)

    def reset(self) -> None:
        """What it keeps of evaluations as at first."""
        for name, slot in self.slots.items():
            slot.assign(self._initial[name])

    def _check(self, numbers: dict[str, Any], warmup_steps: float) -> None:
        if self.name != "one_cycle":
            return
        if warmup_steps and not numbers["start_rate"]:
            raise UserError(
                f"--warmup_steps={warmup_steps:g}: one_cycle begins with a warm-up of its own, up "
                "to peak_at, from start_rate=0; leave warmup_steps out or give a --start_rate"
            )
        if self._switches["three_phase"] and numbers["peak_at"] >= 0.5:
            raise UserError(
                f"--peak_at={numbers['peak_at']}: with three_phase the rate is back at start_rate "
                "after twice that, so it must be below 0.5"
            )

    @classmethod
    def of_variable(cls, rate: tf.Variable) -> Schedule:
        """A constant rate that lies in a variable of one's own, and changes with it.

        Raises:
          UserError: it is no float32 scalar.
        """
        if rate.shape.rank != 0 or rate.dtype != tf.float32:
            raise UserError(
                "a variable as rate must be a float32 scalar; found "
                f"{rate.dtype.name} {tuple(rate.shape)}"
            )
        schedule = cls("constant", learning_rate=0.0)
        schedule.hyper["learning_rate"] = rate
        return schedule

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The rate at `step` (counted from 0), a float32 scalar.

        Raises:
          UserError: a function of one's own that cannot be traced, or gives no number.
        """
        numbers = {key: tf.convert_to_tensor(variable) for key, variable in self.hyper.items()}
        unit, warmup = numbers.pop("unit_steps"), numbers.pop("warmup_steps")

        def schedule(step: tf.Tensor) -> tf.Tensor:
            if self.name == "schedule":
                return self._by_user(step / unit)
            kept = [tf.cast(self.slots["falls"], tf.float32)] if self.slots else []
            rate = self._function(step / unit, *kept, **numbers, **self._switches)
            return tf.cast(rate, tf.float32)

        return warm_up(tf.cast(step, tf.float32), warmup * unit, schedule)

    def _by_user(self, step: tf.Tensor) -> tf.Tensor:
        """The rate that a function of the user's own gives."""
        cure = (
            "it is traced once, so it takes tf.where in place of `if`, and tf.gather(values, "
            "tf.cast(step, tf.int64)) in place of a list"
        )
        with told_in_one_line("schedule: the function fails on the step, a float32 tensor", cure):
            rate = tf.cast(self._function(step), tf.float32)
        if rate.shape.rank != 0:
            raise UserError(
                f"schedule: the function gives {rate.dtype.name} {tuple(rate.shape)} for a step; "
                "expected one number"
            )
        return rate
