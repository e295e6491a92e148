"""Learning-rate schedules: pure functions `step → rate`, and the object that keeps their numbers as variables.

Each function takes the step as float32 (or a number) and its hyperparameters by name, and returns a float32 scalar.
The names are those of the command line's flags. Formulas follow keras.optimizers.schedules where it has the schedule.
"""

import inspect
import math
from collections.abc import Callable

import tensorflow as tf

from tfloop.config import checked
from tfloop.errors import UserError


def constant(step, *, learning_rate):
    """learning_rate, whatever the step."""
    return tf.convert_to_tensor(learning_rate, tf.float32)


def inverse_time(step, *, learning_rate, decay_steps=1.0, decay_rate=0.001, staircase=False):
    """learning_rate / (1 + decay_rate · step / decay_steps): Keras's InverseTimeDecay, the "power" schedule."""
    return learning_rate / (1.0 + decay_rate * _progress(step, decay_steps, staircase))


def exponential(step, *, learning_rate, decay_steps=1.0, decay_rate=0.999, staircase=False):
    """learning_rate · decay_rate ** (step / decay_steps)."""
    return learning_rate * tf.pow(tf.cast(decay_rate, tf.float32), _progress(step, decay_steps, staircase))


def polynomial(step, *, learning_rate, decay_steps, end_rate=0.0, power=1.0):
    """(learning_rate - end_rate) · (1 - step / decay_steps) ** power + end_rate, and end_rate from decay_steps on."""
    share = tf.minimum(_progress(step, decay_steps), 1.0)
    return (learning_rate - end_rate) * tf.pow(1.0 - share, power) + end_rate


def piecewise(step, *, learning_rate, boundaries, rates):
    """learning_rate up to and with boundaries[0], then rates[0] up to and with boundaries[1], and so on."""
    passed = tf.reduce_sum(tf.cast(tf.cast(step, tf.float32) > boundaries, tf.int64))
    return tf.gather(tf.concat([[learning_rate], rates], axis=0), passed)


def cosine(step, *, learning_rate, decay_steps, end_rate=0.0, t_mul=2.0, m_mul=1.0, restarts=False):
    """end_rate + (learning_rate - end_rate) · (1 + cos(π · step / decay_steps)) / 2, and end_rate from then on.

    With `restarts` it starts again at each end (Loshchilov and Hutter, arXiv:1608.03983): the i-th period lasts
    decay_steps · t_mul ** i and its peak lies at learning_rate · m_mul ** i.
    """
    share = _progress(step, decay_steps)
    peak = tf.convert_to_tensor(learning_rate, tf.float32)
    if restarts:
        # Periods passed: i, for t_mul = 1; else the greatest i with (t_mul**i - 1) / (t_mul - 1) <= share.
        grows = tf.not_equal(t_mul, 1.0)
        t = tf.where(grows, t_mul, 2.0)
        i = tf.floor(tf.where(grows, tf.math.log1p(share * (t - 1.0)) / tf.math.log(t), share))
        # The logarithm may round across a boundary: step back or on where it did.
        start = lambda i: tf.where(grows, (tf.pow(t, i) - 1.0) / (t - 1.0), i)
        i = tf.where(start(i) > share, i - 1.0, i)
        i = tf.where(start(i + 1.0) <= share, i + 1.0, i)
        share = (share - start(i)) / tf.where(grows, tf.pow(t, i), 1.0)
        peak *= tf.pow(tf.cast(m_mul, tf.float32), i)
    share = tf.minimum(share, 1.0)
    return end_rate + (peak - end_rate) * 0.5 * (1.0 + tf.cos(math.pi * share))


def one_cycle(step, *, learning_rate, decay_steps, peak_at=0.25, start_rate=0.0, end_rate=0.0):
    """A triangle: from start_rate up to learning_rate at peak_at · decay_steps, then down to end_rate at decay_steps.

    The one-cycle policy in its linear form (Smith, arXiv:1803.09820, section 4).
    """
    share = tf.minimum(_progress(step, decay_steps), 1.0)
    up, down = share / peak_at, (1.0 - share) / (1.0 - peak_at)
    return tf.where(share < peak_at, start_rate + (learning_rate - start_rate) * up,
                    end_rate + (learning_rate - end_rate) * down)


def warm_up(step, warmup_steps, schedule):
    """`schedule`, reached linearly: schedule(0) · (step + 1) / warmup_steps before warmup_steps, then shifted by it.

    `step` and `warmup_steps` count steps, whatever the schedule counts.
    """
    late = schedule(tf.maximum(step - warmup_steps, 0.0))
    return late * tf.minimum((step + 1.0) / tf.maximum(warmup_steps, 1.0), 1.0)


def _progress(step, decay_steps, staircase=False):
    share = tf.cast(step, tf.float32) / decay_steps
    return tf.floor(share) if staircase else share


SCHEDULES = {function.__name__: function for function in
             (constant, inverse_time, exponential, polynomial, piecewise, cosine, one_cycle)}


class Schedule(tf.Module):
    """A schedule with its numbers as variables: called with a step it gives the rate; assigning a number never retraces.

    Example:
      >>> schedule = Schedule("inverse_time", learning_rate=0.001, decay_rate=0.001)
      >>> float(schedule(1000))
      0.0005000000237487257
      >>> schedule.hyper["learning_rate"].assign(0.01)

    Attributes:
      hyper: name → float32 variable, for every hyperparameter the schedule has.
    """

    def __init__(self, name: str | Callable = "constant", *, warmup_steps: float = 0.0, unit_steps: float = 1.0, **hyper):
        """Args:
          name: one of SCHEDULES; or a function step → rate, such as a keras.optimizers.schedules.LearningRateSchedule.
          warmup_steps: length of the linear warm-up in front, in units; 0 is none.
          unit_steps: steps in one unit of the schedule: 1, or the steps of an epoch to count in epochs.
          **hyper: the schedule's hyperparameters; those left out take its defaults.

        Raises:
          UserError: an unknown schedule, or a hyperparameter that it does not have, or one it needs and did not get.
        """
        super().__init__(name=name if isinstance(name, str) else "schedule")
        self._function, numbers, self._switches = (name, hyper, {}) if callable(name) else bind(SCHEDULES, "schedule", name, hyper)
        if callable(name) and hyper:
            raise UserError(f"--{min(hyper)}: a schedule that is a function takes a step alone")
        if len(numbers.get("boundaries", ())) != len(numbers.get("rates", ())):
            raise UserError(f"--schedule=piecewise needs as many rates as boundaries; found {len(numbers['rates'])} and {len(numbers['boundaries'])}")
        numbers |= {"warmup_steps": warmup_steps, "unit_steps": unit_steps}
        self.hyper = {key: tf.Variable(value, dtype=tf.float32, trainable=False, name=key)
                      for key, value in numbers.items()}

    def __call__(self, step) -> tf.Tensor:
        """The rate at `step` (counted from 0), a float32 scalar."""
        numbers = {key: tf.convert_to_tensor(variable) for key, variable in self.hyper.items()}
        unit, warmup = numbers.pop("unit_steps"), numbers.pop("warmup_steps")
        schedule = lambda step: tf.cast(self._function(step / unit, **numbers, **self._switches), tf.float32)
        return warm_up(tf.cast(step, tf.float32), warmup * unit, schedule)


def bind(table: dict, kind: str, name: str, hyper: dict):
    """(function, its numbers, its switches) for `name` in `table`: defaults from the signature, `hyper` over them.

    A boolean default marks a switch, which shapes the computation and is fixed; everything else is a number.

    Raises:
      UserError: an unknown name, a hyperparameter that the function lacks, one that is out of range, or one it needs and did not get.
    """
    if name not in table:
        raise UserError(f"--{kind}={name} is unknown; choose from {', '.join(table)}")
    accepted = parameters(table[name])
    for key in hyper:
        if key not in accepted:
            raise UserError(f"--{key}: {kind} '{name}' has no {key}; it has {', '.join(accepted)}")
    values = accepted | {key: checked(key, value) for key, value in hyper.items() if value is not None}
    for key, value in values.items():
        if value is None:
            raise UserError(f"--{key}: {kind} '{name}' needs it")
    switches = {key: value for key, value in values.items() if isinstance(value, bool)}
    return table[name], {key: value for key, value in values.items() if key not in switches}, switches


def parameters(function) -> dict:
    """The hyperparameters of a rule or schedule with their defaults; None where it has none."""
    return {key: None if parameter.default is parameter.empty else parameter.default
            for key, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY}
