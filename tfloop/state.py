"""The whole state of a training run in one object that can be reset, saved, compared and hashed.

Everything that changes while training, and every number that a step reads, is a variable of `TrainState`. The
compiled step closes over these variables, so resetting or changing one never makes TensorFlow trace again.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import keras
import numpy as np
import tensorflow as tf

from tfloop import models
from tfloop.augmentation import Augmentation, shifted
from tfloop.config import checked
from tfloop.data import Standardizer
from tfloop.errors import UserError
from tfloop.optimizers import KerasOptimizer, Optimizer, f32, flatten
from tfloop.randomness import Key, seed_of
from tfloop.schedules import Schedule

LOSS_SCALE, GOOD_STEPS = 2.0**15, 2000  # where it begins, and steps until it is doubled: those of Keras's LossScaleOptimizer


class TrainState(tf.Module):
    """Weights, slots, counters, hyperparameters, seed, position in the data and the epoch's metrics so far.

    Three counters, each with one meaning:
      global_step: steps ever made; never goes back; the axis of the summaries.
      schedule_step: drives the learning-rate schedule; `reset(schedule=True)` sets it to 0.
      optimizer.count: drives the optimizer's bias correction; reset with its slots.

    Attributes:
      model: the model; weights, moving: its trainable and its other variables by name, "conv1/kernel".
      optimizer, schedule: their slots, count and numbers.
      hyper: name → variable, every number a step reads: l1, l2, label_smoothing, ema, the optimizer's, the schedule's and
        the augmentation's.
      averages: the moving average of all weights, one vector [n] over `weights` and `moving`; None without `ema`.
      loss_scale, good_steps: what the loss is multiplied by on its way back, and steps since it last changed; None
        without `scale_loss`.
      seed, epoch, batch: the position in the data; with them the order of examples and all dropout is determined.
      initial_hyper: what `hyper` held at first, and `reset(hyper=True)` sets back.
      totals: float64 sums of the epoch's metrics so far.
      diverged: true once a loss or gradient was not finite; from then on no step changes anything.
    """

    def __init__(self, model, optimizer="rmsprop", schedule: Schedule | Callable | float | None = None, *, l1: float = 0.0,
                 l2: float = 0.0, penalize: str | Sequence[tf.Variable] = "all",
                 penalties: Sequence[Callable] = (), label_smoothing: float = 0.0, loss: Callable | None = None,
                 standardizer: Standardizer | None = None, augmentation: Augmentation | None = None,
                 ema: float | None = None, average_shifts: int = 0, scale_loss: bool = False, seed: int = 0,
                 initial_weights: Callable[[int], dict[str, np.ndarray]] | None = None):
        """Args:
          model: a keras.Model, or a tf.Module that is callable and has trainable variables.
          optimizer: an Optimizer, the name of one, or a keras.optimizers.Optimizer.
          schedule: a Schedule, a function step → rate, or a constant rate; None: the rate of a Keras optimizer, else 0.001.
          l1, l2: coefficients of Σ|w| and Σw² over the penalised kernels.
          penalize: "dense", "conv", "all", "none", or the kernels themselves. Those of frozen layers do not count.
          penalties: functions kernel → scalar, each added to the loss for every penalised kernel as it is.
          label_smoothing: share of each label spread over all classes.
          loss: function (labels [batch] int64, outputs) → [batch], in place of cross-entropy from logits. `outputs` are what
            the model gives, but of a keras.Sequential that ends in softmax or sigmoid the logits before it.
          standardizer: of the pixels; belongs to the trained model.
          augmentation: of the images, in training alone.
          ema: decay of the moving average of the weights, which is then what is evaluated; None keeps none.
          average_shifts: where not 0, `predict` takes the mean over each image and it shifted by so many pixels.
          scale_loss: keep small gradients from becoming 0 in float16: they are computed from loss_scale times the loss.
            Where they overflow, the step makes no update and the scale is halved; after 2000 steps it is doubled.
          seed: of the data order and dropout, and of the weights where `initial_weights` is given.
          initial_weights: seed → value of each of the model's variables by name. Without it, the initial values are
            those found now, whatever the seed.

        Raises:
          UserError: a name that is unknown, a number out of range, or a model that cannot be trained like that.
        """
        super().__init__(name="state")
        for name, value in (("l1", l1), ("l2", l2), ("label_smoothing", label_smoothing), ("ema", ema), ("average_shifts", average_shifts),
                            *([("penalize", penalize)] if isinstance(penalize, str) else [])):
            checked(name, value)
        if not isinstance(model, (keras.Model, tf.Module)) or not callable(model):
            found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
            raise UserError(f"the model must be a keras.Model, or a tf.Module that can be called; found {found}")
        self.model = model
        self.weights, self.moving = models.named_variables(model)
        if not self.weights:
            raise UserError("the model has no trainable variables: build it (call it once) before it is trained")
        if loss is None or average_shifts:
            models.check_outputs(model)
        if loss is not None and label_smoothing:
            raise UserError(f"label_smoothing={label_smoothing} belongs to the cross-entropy; a loss of your own has to do it itself")
        if schedule is None:
            schedule = float(optimizer.learning_rate) if isinstance(optimizer, keras.optimizers.Optimizer) else 0.001
        if not isinstance(schedule, Schedule):
            schedule = Schedule(schedule) if callable(schedule) else Schedule("constant", learning_rate=schedule)
        self.schedule, self.optimizer = schedule, _make_optimizer(optimizer, model)
        self.optimizer.build(self.weights)
        self.kernels = models.kernels(model, penalize) if isinstance(penalize, str) else list(penalize)
        if callable(penalties) or not all(map(callable, penalties)):
            raise UserError("penalties: expected a list of functions, each of which takes a kernel")
        if penalties and not self.kernels:
            raise UserError("penalties: the model has no kernels that they could count" + f", with penalize={penalize}" * isinstance(penalize, str))
        self.penalties, self.loss = tuple(penalties), loss
        number = lambda value, name: tf.Variable(value, dtype=tf.float32, trainable=False, name=name)
        self._own_hyper = {"l1": number(l1, "l1"), "l2": number(l2, "l2"),
                           "label_smoothing": number(label_smoothing, "label_smoothing")}
        if ema is not None:
            self._own_hyper["ema"] = tf.Variable(ema, dtype=tf.float64, trainable=False, name="ema")
        counter = lambda name: tf.Variable(0, dtype=tf.int64, trainable=False, name=name)
        self.global_step, self.schedule_step = counter("global_step"), counter("schedule_step")
        self.epoch, self.batch = counter("epoch"), counter("batch")
        self.seed = tf.Variable(seed, dtype=tf.int64, trainable=False, name="seed")
        self.totals = tf.Variable(tf.zeros([10], tf.float64), trainable=False, name="totals")
        self.diverged = tf.Variable(False, trainable=False, name="diverged")
        self.augmentation, self._average_shifts = augmentation or Augmentation(), average_shifts
        self.averages = tf.Variable(self._flat(), trainable=False, name="averages") if ema is not None else None
        self.loss_scale = number(LOSS_SCALE, "loss_scale") if scale_loss else None
        self.good_steps = counter("good_steps") if scale_loss else None
        if standardizer is None:
            standardizer = Standardizer(np.zeros([], np.float32), np.ones([], np.float32))
        self.mean = tf.Variable(standardizer.mean, trainable=False, name="mean")
        self.scale = tf.Variable(standardizer.scale, trainable=False, name="scale")
        found = {name: variable.numpy() for name, variable in {**self.weights, **self.moving}.items()}
        self._initial = initial_weights or (lambda seed: found)
        self.initial_hyper = {name: variable.numpy() for name, variable in self.hyper.items()}

    @property
    def hyper(self) -> Mapping[str, tf.Variable]:
        return MappingProxyType({**self.schedule.hyper, **self.optimizer.hyper, **self.augmentation.hyper, **self._own_hyper})

    def standardize(self, images: tf.Tensor) -> tf.Tensor:
        """(x - mean) / scale, float32."""
        return (tf.cast(images, tf.float32) - self.mean) / self.scale

    def inputs(self, images: tf.Tensor, key: Key) -> tf.Tensor:
        """What the model is trained on: images augmented and standardised, float32."""
        return self.standardize(self.augmentation(tf.cast(images, tf.float32), key.fold_in(-1)))

    def predict(self, images: tf.Tensor, forward: Callable = models.logits) -> tf.Tensor:
        """[batch, outputs] logits of images as they lie in the data.

        With `average_shifts` they are the logarithm of the mean of five predictions' probabilities: of the image, and of it
        shifted up, down, left and right.
        """
        if not self._average_shifts:
            return forward(self.model, self.standardize(images))
        views = shifted(tf.cast(images, tf.float32), self._average_shifts)
        found = [models.probabilities(self.model, forward(self.model, self.standardize(view))) for view in views]
        mean = tf.clip_by_value(tf.add_n(found) / len(found), 1e-30, 1.0 - 2.0**-24)
        return tf.math.log(mean) - tf.math.log1p(-mean) if models.output_activation(self.model) == "sigmoid" else tf.math.log(mean)

    def key(self, part: tf.Tensor | int = 0, parts: int = 1) -> Key:
        """The key of this step's randomness, for one part of its batch: a pure function of (seed, epoch, batch)."""
        return Key(seed_of(self.seed, 1), part, parts).fold_in(tf.identity(self.epoch), tf.identity(self.batch))

    def overflowed(self, loss: tf.Tensor, finite: tf.Tensor) -> tf.Tensor:
        """Is a step that is not finite so because the loss scale was too high? Then the scale is halved."""
        if self.loss_scale is None:
            return tf.constant(False)
        overflowed = ~finite & tf.math.is_finite(loss) & (self.loss_scale > 1.0) & ~self.diverged
        made = finite & ~self.diverged
        good = (self.good_steps + tf.cast(made, tf.int64)) * tf.cast(~overflowed, tf.int64)
        grows = made & (good >= GOOD_STEPS)
        self.loss_scale.assign(self.loss_scale * tf.where(overflowed, 0.5, tf.where(grows, 2.0, 1.0)))
        self.good_steps.assign(good * tf.cast(~grows, tf.int64))
        return overflowed

    def advance(self, valid: tf.Tensor, overflowed: tf.Tensor) -> None:
        """One step on. Where it was not valid, stay here, diverged; where it overflowed, leave this batch out."""
        self.global_step.assign_add(tf.cast(valid | overflowed, tf.int64))
        self.batch.assign_add(tf.cast(valid | overflowed, tf.int64))
        self.schedule_step.assign_add(tf.cast(valid, tf.int64))
        self.diverged.assign(~(valid | overflowed))

    def keep_average(self, valid: tf.Tensor) -> None:
        """Take the weights into their moving average, where one is kept: ema · average + (1 - ema) · weights, and the
        weights themselves after the first update, as with Keras's use_ema."""
        if self.averages is not None:
            share = tf.where(self.optimizer.count > 1, 1.0 - self.hyper["ema"], 1.0) * tf.cast(valid, tf.float64)
            self.averages.assign_add((self._flat() - self.averages) * f32(share))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in the weights' place, in this block; the weights themselves where none is kept."""
        if self.averages is None:
            yield
            return
        kept = self._flat()
        self._assign(self.averages)
        try:
            yield
        finally:
            self._assign(kept)

    def take_averages(self) -> None:
        """The moving average becomes the weights, where one is kept."""
        if self.averages is not None:
            self._assign(self.averages)

    def restart_averages(self) -> None:
        """The weights as they are become their moving average, where one is kept."""
        if self.averages is not None:
            self.averages.assign(self._flat())

    def _averaged_variables(self) -> list[tf.Variable]:
        return [variable for variable in (*self.weights.values(), *self.moving.values()) if variable.dtype == tf.float32]

    def _flat(self) -> tf.Tensor:
        return flatten(self._averaged_variables())

    def _assign(self, flat: tf.Tensor) -> None:
        variables = self._averaged_variables()
        for variable, part in zip(variables, tf.split(flat, [variable.shape.num_elements() for variable in variables])):
            variable.assign(tf.reshape(part, variable.shape))

    def reset(self, weights: bool = True, slots: bool = True, schedule: bool = True, data: bool = True,
              hyper: bool = False, seed: int | None = None) -> None:
        """Set any part back to its start, in place; nothing is traced again. global_step never goes back.

        Args:
          weights: initial weights and moving averages, those of `seed`.
          slots: the optimizer's slots and count, and the loss scale.
          schedule: schedule_step; alone, this is a warm restart.
          data: epoch, batch and the metrics so far.
          hyper: every hyperparameter, where it was changed since the state was made.
          seed: a new seed, from here on; None keeps the one there is.
        """
        if seed is not None:
            self.seed.assign(seed)
        if weights:
            values = self._initial(int(self.seed))
            for name, variable in {**self.weights, **self.moving}.items():
                variable.assign(values[name])
            self.restart_averages()
        if slots:
            self.optimizer.reset()
            if self.loss_scale is not None:
                self.loss_scale.assign(LOSS_SCALE)
                self.good_steps.assign(0)
        if schedule:
            self.schedule_step.assign(0)
        if hyper:
            for name, value in self.initial_hyper.items():
                self.hyper[name].assign(value)
        if data:
            self.epoch.assign(0)
            self.batch.assign(0)
            self.totals.assign(tf.zeros_like(self.totals))
        self.diverged.assign(False)

    def begin(self, seed: int) -> None:
        """The state that a fresh process has with this seed: everything reset, and global_step 0, for a new run."""
        self.reset(hyper=True, seed=seed)
        self.global_step.assign(0)

    def named(self) -> dict[str, tf.Variable]:
        """Every variable of the state by name: "weights/conv1/kernel", "slots/momentum", "global_step" …"""
        groups = {"weights": self.weights, "moving": self.moving, "slots": self.optimizer.slots, "hyper": self.hyper}
        single = {"global_step": self.global_step, "schedule_step": self.schedule_step, "count": self.optimizer.count,
                  "seed": self.seed, "epoch": self.epoch, "batch": self.batch, "totals": self.totals,
                  "diverged": self.diverged, "mean": self.mean, "scale": self.scale, "averages": self.averages,
                  "loss_scale": self.loss_scale, "good_steps": self.good_steps}
        single = {name: variable for name, variable in single.items() if variable is not None}
        return {f"{group}/{name}": v for group, named in groups.items() for name, v in named.items()} | single

    def digest(self, *groups: str) -> str:
        """SHA-256 over names, types, shapes and bytes of the variables, or of those in groups such as "weights"."""
        sha = hashlib.sha256()
        for name, variable in sorted(self.named().items()):
            if not groups or name.split("/")[0] in groups:
                value = np.asarray(variable)
                sha.update(f"{name} {value.dtype} {value.shape}\n".encode() + value.tobytes())
        return sha.hexdigest()


def _make_optimizer(optimizer, model) -> Optimizer | KerasOptimizer:
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return KerasOptimizer(optimizer, model.trainable_variables)
    if constrained := [variable for variable in model.trainable_variables if getattr(variable, "constraint", None) is not None]:
        raise UserError(f"{getattr(constrained[0], 'path', constrained[0].name)} has a constraint, which Keras's optimizers alone "
                        f"apply; hand one in, such as keras.optimizers.SGD()")
    return Optimizer(optimizer) if isinstance(optimizer, str) else optimizer
