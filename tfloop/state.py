"""The whole state of a training run in one object that can be reset, saved, compared and hashed.

Everything that changes while training, and every number that a step reads, is a variable of
`TrainState`. The compiled step closes over these variables, so resetting or changing one never
makes TensorFlow trace again.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfloop import models
from tfloop.config import check_setting
from tfloop.data.augmentation import Augmentation, mixed, shifted
from tfloop.data.dataset import Standardizer, is_scaled
from tfloop.data.pipelines import LEFT_OUT, Batch
from tfloop.data.targets import Target
from tfloop.errors import UserError, WithoutGradient
from tfloop.keras_optimizers import KerasOptimizer
from tfloop.metrics import SUMS
from tfloop.nests import is_leaf, map_leaves, named_leaves
from tfloop.objective import Objective, check_outputs
from tfloop.optimizers import Optimizer, f32
from tfloop.own_functions import check_loss
from tfloop.randomness import Key, Part, seed_of
from tfloop.schedules import Schedule
from tfloop.vectors import count_elements, flatten
from tfloop.wording import names_text

# Where the loss scale begins, and steps until it is doubled: as in Keras's LossScaleOptimizer.
LOSS_SCALE, GOOD_STEPS = 2.0**15, 2000


class TrainState(tf.Module):
    """Weights, slots, counters, hyperparameters, seed, position in the data, the epoch's metrics.

    Three counters, each with one meaning:
      global_step: steps ever made; never goes back; the axis of the summaries.
      schedule_step: drives the learning-rate schedule; `reset(schedule=True)` sets it to 0.
      optimizer.count: drives the optimizer's bias correction; reset with its slots.

    Attributes:
      model: the model.
      weights: the variables that are trained, by name, "conv1/kernel".
      non_trainable: its other variables by name: moving averages and the like, frozen weights, and
        those without a gradient.
      without_gradient: the names of trainable variables that the loss does not depend on.
      changes: what was changed of the weights that are trained; a trace from before is too old.
      optimizer, schedule: their slots, count and numbers.
      hyper: name → variable, every number that a step reads: l1, l2, label_smoothing, ema, and
        those of the optimizer, the schedule and the augmentation.
      kernels: the weights that penalties count, by name.
      ema_weights: the moving average of all weights, one vector [n] over `weights` and
        `non_trainable`; None without `ema`.
      loss_scale: what the loss is multiplied by on its way back; None without `scale_loss`.
      good_steps: steps since the loss scale last changed; None without `scale_loss`.
      seed, epoch, batch_index: the position in the data; with them the order of examples and all
        dropout is determined.
      initial_hyper: what `hyper` held at first, and `reset(hyper=True)` sets back.
      totals: [SUMS + more] float64, sums of the epoch's metrics so far.
      average_shifts: pixels by which `predict` shifts images, to take the mean; 0: not at all.
      objective: the loss and the metrics, by output; a Loop makes it fit its data.
      diverged: true once a loss or gradient was not finite; from then on no step changes anything.
    """

    def __init__(
        self,
        model: keras.Model | tf.Module,
        optimizer: Optimizer | keras.optimizers.Optimizer | str = "rmsprop",
        schedule: Schedule | Callable | float | None = None,
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        penalize: "models.Penalize" = "all",
        penalties: Sequence[Callable] = (),
        label_smoothing: float = 0.0,
        loss: Any = None,
        metrics: Mapping[str, Callable] | Sequence | None = None,
        standardizer: Standardizer | None = None,
        augmentation: Augmentation | None = None,
        ema: float | None = None,
        average_shifts: int = 0,
        scale_loss: bool = False,
        seed: int = 0,
        initial_weights: Callable[[int], dict[str, np.ndarray]] | None = None,
    ) -> None:
        """Make one.

        Args:
          model: a keras.Model, or a tf.Module that is callable and has trainable variables. Which
            of them are trained is read before each compiled call.
          optimizer: an Optimizer, the name of one, or a keras.optimizers.Optimizer.
          schedule: a Schedule, a function step → rate, or a constant rate, a number or a float32
            tf.Variable; None: the rate of a Keras optimizer, else 0.001.
          l1: coefficient of Σ|w| over the penalised kernels.
          l2: coefficient of Σw² over the penalised kernels.
          penalize: "all": every kernel, which is a trained weight of two or more axes that a
            layer multiplies by; "dense" or "conv": those of such layers; "none"; the variables or
            layers themselves; or a function that is true for the variables to penalise.
          penalties: functions kernel → scalar, each added to the loss for every penalised kernel
            as it is.
          label_smoothing: share of each label spread over all classes.
          loss: a function (targets, outputs) → [batch], a keras.losses.Loss or the name of one; or
            a dict of those by output, or of (loss, weight). `outputs` are what the model gives when
            it is called, a last softmax included. None: it follows from the targets of the data
            (`objective.text` names it): class numbers and shares: cross-entropy; 0 and 1 in several
            columns: binary cross-entropy; others: squared error. The first two take logits.
          metrics: name → function (targets, outputs), or a list of them. One that gives a value
            for each example of a batch of tensors is summed up in every step. Any other is asked
            after each evaluation, with all targets and outputs as NumPy arrays, so that
            scikit-learn's work as they are; or a keras.metrics.Metric. `outputs` are what the model
            gives.
          standardizer: of the inputs; belongs to the trained model.
          augmentation: of images, in training alone.
          ema: decay of the moving average of the weights, which is then what is evaluated; None
            keeps none.
          average_shifts: where not 0, `predict` takes the mean over each image and its four
            neighbours shifted by N pixels.
          scale_loss: keep small gradients from becoming 0 in float16. They are computed from
            loss_scale times the loss; where they overflow, the step makes no update and the scale
            is halved; after 2000 steps it is doubled.
          seed: of the data order and dropout, and of the weights where `initial_weights` is given.
          initial_weights: seed → value of each of the model's variables by name. Without it, the
            initial values are the present ones, whatever the seed.

        Raises:
          UserError: a name that is unknown, a number out of range, or a model that cannot be
            trained like that.
        """
        super().__init__(name="state")
        checked: dict[str, Any] = {
            "l1": l1,
            "l2": l2,
            "label_smoothing": label_smoothing,
            "ema": ema,
            "average_shifts": average_shifts,
            "seed": seed,
        }
        _check_kind("standardizer", standardizer, Standardizer)
        _check_kind("augmentation", augmentation, Augmentation)
        if isinstance(penalize, str):
            checked["penalize"] = penalize
        for name, value in checked.items():
            check_setting(name, value)
        _check_model(model)
        _check_loss(loss, label_smoothing)
        models.check_training(model)
        self.model, self.loss, self.metrics = model, loss, metrics
        self.objective = Objective(model, loss if not isinstance(loss, Mapping) else None, metrics)
        self.without_gradient: tuple[str, ...] = ()
        self.changes: tuple[str, ...] = ()
        self._looks = False
        self.weights: dict[str, tf.Variable] = {}
        self.non_trainable: dict[str, tf.Variable] = {}
        self._divide()
        if not self.weights:
            raise UserError(
                "the model has no trainable variables: build it (call it once) before it is trained"
            )
        self.schedule, self.optimizer = _make_rate(schedule, optimizer, model)
        self.optimizer.build(self.weights, self.stable(self.weights))
        self._penalize = penalize
        self.kernels = models.penalized(model, penalize, self.weights)
        self.penalties = _check_penalties(penalties, self.kernels, penalize)
        self.augmentation, self.average_shifts = augmentation or Augmentation(), average_shifts
        self._make_numbers(l1, l2, label_smoothing, ema)
        self._make_counters(seed)
        self.loss_scale = _number(LOSS_SCALE, "loss_scale") if scale_loss else None
        self.good_steps = _counter("good_steps") if scale_loss else None
        if standardizer is None:
            standardizer = Standardizer(np.zeros([], np.float32), np.ones([], np.float32))
        self.mean = map_leaves(_scaling("mean"), standardizer.mean)
        self.scale = map_leaves(_scaling("scale"), standardizer.scale)
        present = {name: variable.numpy() for name, variable in self._model_variables().items()}
        self._initial = initial_weights or (lambda seed: present)
        self.initial_hyper = {name: variable.numpy() for name, variable in self.hyper.items()}
        self._tracked = self.named()  # so that tf.train.Checkpoint(state=state) keeps all of it

    def _divide(self) -> None:
        """Sort the model's variables into those that are trained and the others.

        Raises:
          UserError: nothing is left to train, or the model got other variables; nothing is changed.
        """
        trainable, other = models.named_variables(self.model)
        for name in self.without_gradient:
            if name in trainable:
                other[name] = trainable.pop(name)
        before = {id(variable) for variable in self._model_variables().values()}
        if before and before != {id(variable) for variable in (trainable | other).values()}:
            raise UserError(
                "the model got or lost layers since its state was made; make a new TrainState"
            )
        if before and not trainable:
            named = names_text(self.weights)
            if not self.without_gradient:
                raise UserError(f"no weight is trainable any more: {named}; unfreeze a layer")
            raise UserError(
                f"no weight has a gradient: the loss does not depend on {named}; look for "
                "tf.stop_gradient, argmax, rounding or NumPy between the weights and the loss"
            )
        self.weights, self.non_trainable = trainable, other
        self._stable = models.stable_names(self.model)
        self._trained = models.trained_state(self.model)

    def follow_model(self) -> None:
        """Take over what the model's layers say of `trainable` now.

        Weights that are trained further keep their slots and averages. What changed is the last of
        `changes`.

        Raises:
          UserError: nothing is left to train.
        """
        if models.trained_state(self.model) == self._trained:
            return
        before = self.weights
        self._divide_again()
        frozen = [name for name in before if name not in self.weights]
        freed = [name for name in self.weights if name not in before]
        told = [f"{', '.join(frozen)} no longer trained"] if frozen else []
        told += [f"{', '.join(freed)} now trained"] if freed else []
        self.changes += ("; ".join(told) or "a layer without weights was frozen or unfrozen",)

    def leave_out(self, names: Iterable[str]) -> None:
        """Note weights as without a gradient: they are not trained, decayed, penalised or counted.

        Raises:
          UserError: nothing is left to train.
        """
        names, before = tuple(names), self.without_gradient
        self.without_gradient += names
        try:
            self._divide_again()
        except UserError:
            self.without_gradient = before
            raise
        self.changes += (f"the loss does not depend on {', '.join(names)}",)

    def _divide_again(self) -> None:
        before, averaged = self.weights, self._averaged_variables()
        means = None if self.ema_weights is None else tf.identity(self.ema_weights)
        self._divide()
        self.kernels = models.penalized(self.model, self._penalize, self.weights)
        self.optimizer.rebuild(before, self.weights, self.stable(self.weights))
        if self.ema_weights is not None and means is not None:
            sizes = [count_elements([variable]) for variable in averaged]
            parts = dict(zip(map(id, averaged), tf.split(means, sizes), strict=True))
            moved = [parts[id(variable)] for variable in self._averaged_variables()]
            self.ema_weights.assign(tf.concat(moved, axis=0))
        self._tracked = self.named()

    def connected(self, gradients: Mapping[str, tf.Tensor | None]) -> dict[str, tf.Tensor]:
        """The gradients, with zeros for those that do not exist.

        Raises:
          WithoutGradient: once, in a loop's first step, where some do not exist.
        """
        missing = [name for name, gradient in gradients.items() if gradient is None]
        if missing and self._looks:
            raise WithoutGradient(self, missing)
        return {
            name: tf.zeros_like(self.weights[name]) if gradient is None else gradient
            for name, gradient in gradients.items()
        }

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """In this block a weight without a gradient is an error, `WithoutGradient`."""
        self._looks = True
        try:
            yield
        finally:
            self._looks = False

    def _make_numbers(
        self, l1: float, l2: float, label_smoothing: float, ema: float | None
    ) -> None:
        self._own_hyper = {
            "l1": _number(l1, "l1"),
            "l2": _number(l2, "l2"),
            "label_smoothing": _number(label_smoothing, "label_smoothing"),
        }
        self.ema_weights = None
        if ema is not None:
            decay = tf.Variable(ema, dtype=tf.float64, trainable=False, name="ema")
            self._own_hyper["ema"] = decay
            self.ema_weights = tf.Variable(self._flat(), trainable=False, name="ema_weights")

    def _make_counters(self, seed: int) -> None:
        self.global_step, self.schedule_step = _counter("global_step"), _counter("schedule_step")
        self.epoch, self.batch_index = _counter("epoch"), _counter("batch_index")
        self.seed = tf.Variable(seed, dtype=tf.int64, trainable=False, name="seed")
        self.totals = self._no_totals()
        self.diverged = tf.Variable(False, trainable=False, name="diverged")

    @property
    def has_one_scale(self) -> bool:
        """Does one number standardise all inputs, as without a standardiser?"""
        return is_leaf(self.mean) and self.mean is not None and not self.mean.shape.rank

    def _no_totals(self) -> tf.Variable:
        size = SUMS + len(self.objective.extra)
        return tf.Variable(tf.zeros([size], tf.float64), trainable=False, name="totals")

    def settle(self, kinds: Mapping[str, Target], targets: Any, outputs: Any) -> None:
        """Make the objective fit the targets of the data and what the model gives for them.

        Args:
          kinds: what the targets are, by name.
          targets, outputs: nests of tensors or of their specs.

        Raises:
          UserError: they do not belong together.
        """
        self.objective = Objective(self.model, self.loss, self.metrics, kinds, outputs, targets)
        if float(self.hyper["label_smoothing"]) and not self.objective.smooths:
            raise UserError(
                f"label_smoothing={float(self.hyper['label_smoothing']):g} belongs to the "
                f"cross-entropy; the loss is {self.objective.text}"
            )
        check_outputs(self.objective, outputs)
        if self.totals.shape != [SUMS + len(self.objective.extra)]:
            self.totals = self._no_totals()
            self._tracked = self.named()

    @property
    def hyper(self) -> Mapping[str, tf.Variable]:
        parts = (self.schedule, self.optimizer, self.augmentation)
        numbers = {name: variable for part in parts for name, variable in part.hyper.items()}
        return MappingProxyType({**numbers, **self._own_hyper})

    def standardize(self, inputs: Any) -> Any:
        """(x - mean) / scale, float32, of what is scaled; other inputs as they are."""

        def scaled(x: Any, mean: Any, scale: Any) -> Any:
            if mean is None or not is_scaled(x):
                return x
            return (tf.cast(x, tf.float32) - mean) / scale

        if is_leaf(self.mean):  # one for all
            return map_leaves(lambda x: scaled(x, self.mean, self.scale), inputs)
        return map_leaves(scaled, inputs, self.mean, self.scale)

    def mixed(self, batch: Batch) -> Batch:
        """The batch with its examples mixed in pairs, where the augmentation does that."""
        if not self.augmentation.mixes:
            return batch
        images, share = self.augmentation.mix(batch.inputs, self.key().fold_in(-3))
        targets = self.objective.mixed(batch.targets, share)
        weight = mixed(batch.sample_weight, share)
        is_whole = tf.minimum(batch.counts, tf.reverse(batch.counts, axis=[0])) > 0
        return Batch(images, targets, tf.where(is_whole, weight, LEFT_OUT))

    def prepared(self, inputs: Any, key: Key) -> Any:
        """What the model is trained on: inputs standardised, of images augmented before."""
        if self.augmentation.changes_images:
            with tf.name_scope("augmentation/"):
                inputs = self.augmentation(tf.cast(inputs, tf.float32), key.fold_in(-1))
        return self.standardize(inputs)

    def forward(
        self,
        inputs: Any,
        forward: Callable = models.outputs,
        training: bool = False,
        key: Key | None = None,
    ) -> Any:
        """[batch, …] of standardised inputs: what the loss is handed, logits or outputs."""
        outputs = forward(self.model, inputs, training, key, as_logits=self.objective.as_logits)
        return map_leaves(_as_float32, outputs) if self.objective.is_default else outputs

    def predict(self, inputs: Any, forward: Callable = models.outputs) -> Any:
        """[batch, …] of inputs as they lie in the data: what the loss is handed, as by `forward`.

        With `average_shifts` they are the mean of five predictions, of their probabilities where
        they are logits: of the image, and of it shifted up, down, left and right.
        """
        key = Key(seed_of(self.seed, 2))  # for what draws in evaluation, too
        if not self.average_shifts:
            return self.forward(self.standardize(inputs), forward, key=key)
        predictions = [
            self.probabilities(self.forward(self.standardize(view), forward, key=key))
            for view in shifted(tf.cast(inputs, tf.float32), self.average_shifts)
        ]
        mean = map_leaves(lambda *views: tf.add_n(views) / len(views), *predictions)
        return self.objective.unsquash(mean)

    def probabilities(self, outputs: Any) -> Any:
        """What `predict` gives, with probabilities in the place of logits."""
        return self.objective.squash(outputs)

    def key(self, part: Part | None = None) -> Key:
        """The key of this step's randomness, for one part of its batch; None for all of it.

        A pure function of (seed, epoch, batch_index).
        """
        key = Key(seed_of(self.seed, 1), part)
        return key.fold_in(tf.identity(self.epoch), tf.identity(self.batch_index))

    def overflowed(self, loss: tf.Tensor, finite: tf.Tensor) -> tf.Tensor:
        """Is a step not finite because the loss scale was too high? Then the scale is halved."""
        if self.loss_scale is None or self.good_steps is None:
            return tf.constant(False)
        is_scaled = self.loss_scale > 1.0
        overflowed = ~finite & tf.math.is_finite(loss) & is_scaled & ~self.diverged
        made = finite & ~self.diverged
        good = (self.good_steps + tf.cast(made, tf.int64)) * tf.cast(~overflowed, tf.int64)
        grows = made & (good >= GOOD_STEPS)
        factor = tf.where(overflowed, 0.5, tf.where(grows, 2.0, 1.0))
        self.loss_scale.assign(self.loss_scale * factor)
        self.good_steps.assign(good * tf.cast(~grows, tf.int64))
        return overflowed

    def advance(self, valid: tf.Tensor, overflowed: tf.Tensor) -> None:
        """One step on.

        A step that was not valid stays here, diverged; one that overflowed leaves its batch out.
        """
        self.global_step.assign_add(tf.cast(valid | overflowed, tf.int64))
        self.batch_index.assign_add(tf.cast(valid | overflowed, tf.int64))
        self.schedule_step.assign_add(tf.cast(valid, tf.int64))
        self.diverged.assign(~(valid | overflowed))

    def update_ema(self, valid: tf.Tensor) -> None:
        """Take the weights into their moving average, where one is kept.

        ema · average + (1 - ema) · weights; after the first update the weights themselves, as with
        Keras's use_ema. Nothing changes where `valid`, a boolean scalar, is false.
        """
        if self.ema_weights is not None:
            share = tf.where(self.optimizer.count > 1, 1.0 - self.hyper["ema"], 1.0)
            share = f32(share * tf.cast(valid, tf.float64))
            self.ema_weights.assign_add((self._flat() - self.ema_weights) * share)

    @contextlib.contextmanager
    def using_ema(self) -> Iterator[None]:
        """In this block the moving average is in the weights' place, where one is kept."""
        if self.ema_weights is None:
            yield
            return
        variables = self._averaged_variables()
        raw = [tf.identity(variable) for variable in variables]
        self._assign(self.ema_weights)
        try:
            yield
        finally:
            for variable, value in zip(variables, raw, strict=True):
                variable.assign(value)

    def adopt_ema(self) -> None:
        """The moving average becomes the weights, where one is kept."""
        if self.ema_weights is not None:
            self._assign(self.ema_weights)

    def restart_ema(self) -> None:
        """The present weights become their moving average, where one is kept."""
        if self.ema_weights is not None:
            self.ema_weights.assign(self._flat())

    def _model_variables(self) -> dict[str, tf.Variable]:
        return {**self.weights, **self.non_trainable}

    def _averaged_variables(self) -> list[tf.Variable]:
        variables = self._model_variables().values()
        return [variable for variable in variables if variable.dtype.is_floating]

    def _flat(self) -> tf.Tensor:
        return flatten(self._averaged_variables())

    def _assign(self, flat: tf.Tensor) -> None:
        variables = self._averaged_variables()
        parts = tf.split(flat, [count_elements([variable]) for variable in variables])
        for variable, part in zip(variables, parts, strict=True):
            variable.assign(tf.cast(tf.reshape(part, variable.shape), variable.dtype))

    def reset(
        self,
        weights: bool = True,
        slots: bool = True,
        schedule: bool = True,
        data: bool = True,
        hyper: bool = False,
        seed: int | None = None,
    ) -> None:
        """Set any part back to its start, in place; nothing is traced again.

        global_step never goes back.

        Args:
          weights: initial weights and moving averages, those of `seed`.
          slots: the optimizer's slots and count, and the loss scale.
          schedule: schedule_step, and what the schedule keeps; alone, this is a warm restart.
          data: epoch, batch_index and the metrics so far.
          hyper: every hyperparameter, where it was changed since the state was made.
          seed: a new seed, from here on; None keeps the present one.
        """
        if seed is not None:
            check_setting("seed", seed)
            self.seed.assign(seed)
        if weights:
            values = self._initial(int(self.seed))
            for name, variable in self._model_variables().items():
                variable.assign(values[name])
            self.restart_ema()
        if slots:
            self.optimizer.reset()
            if self.loss_scale is not None and self.good_steps is not None:
                self.loss_scale.assign(LOSS_SCALE)
                self.good_steps.assign(0)
        if schedule:
            self.schedule_step.assign(0)
            self.schedule.reset()
        if hyper:
            for name, value in self.initial_hyper.items():
                self.hyper[name].assign(value)
        if data:
            self.epoch.assign(0)
            self.batch_index.assign(0)
            self.totals.assign(tf.zeros_like(self.totals))
        self.diverged.assign(False)

    def begin(self, seed: int) -> None:
        """The state that a fresh process has with this seed: all reset, global_step included."""
        self.reset(hyper=True, seed=seed)
        self.global_step.assign(0)

    def named(self) -> dict[str, tf.Variable]:
        """Every variable of the state by name: "weights/conv1/kernel", "slots/momentum", …

        These are the names in checkpoints and digests. They stay what they are when an attribute
        gets another name, so that older checkpoints can be read.
        """
        groups = {
            "weights": self._by_stable_name(self.weights),
            "moving": self._by_stable_name(self.non_trainable),
            "slots": self.optimizer.slots,
            "hyper": self.hyper,
            "schedule": self.schedule.slots,
        }
        single = {
            "global_step": self.global_step,
            "schedule_step": self.schedule_step,
            "count": self.optimizer.count,
            "seed": self.seed,
            "epoch": self.epoch,
            "batch": self.batch_index,
            "totals": self.totals,
            "diverged": self.diverged,
            **_named_scaling("mean", self.mean),
            **_named_scaling("scale", self.scale),
            "averages": self.ema_weights,
            "loss_scale": self.loss_scale,
            "good_steps": self.good_steps,
        }
        grouped = {
            f"{group}/{name}": variable
            for group, variables in groups.items()
            for name, variable in variables.items()
        }
        present = {name: variable for name, variable in single.items() if variable is not None}
        return grouped | present

    def stable(self, names: Iterable[str]) -> list[str]:
        """The names of variables as checkpoints and digests have them."""
        return [self._stable[name] for name in names]

    def _by_stable_name(self, variables: Mapping[str, tf.Variable]) -> dict[str, tf.Variable]:
        return {self._stable[name]: variable for name, variable in variables.items()}

    def digest(self, *groups: str) -> str:
        """SHA-256 over names, types, shapes and bytes of the variables.

        Args:
          *groups: of `named`, such as "weights"; none given, all count.
        """
        sha = hashlib.sha256()
        for name, variable in sorted(self.named().items()):
            if not groups or name.split("/")[0] in groups:
                value = np.asarray(variable)
                sha.update(f"{name} {value.dtype} {value.shape}\n".encode() + value.tobytes())
        return sha.hexdigest()


def _number(value: float, name: str) -> tf.Variable:
    return tf.Variable(value, dtype=tf.float32, trainable=False, name=name)


def _counter(name: str) -> tf.Variable:
    return tf.Variable(0, dtype=tf.int64, trainable=False, name=name)


def _scaling(name: str) -> Callable:
    """A variable of one array of the standardiser; None of what is not scaled."""

    def variable(values: Any) -> tf.Variable | None:
        return None if values is None else tf.Variable(values, trainable=False, name=name)

    return variable


def _named_scaling(name: str, nest: Any) -> dict[str, tf.Variable]:
    return {
        f"{name}/{leaf}" if leaf else name: variable
        for leaf, variable in named_leaves(nest)
        if variable is not None
    }


def _as_float32(x: Any) -> Any:
    return tf.cast(x, tf.float32) if tf.is_tensor(x) and x.dtype.is_floating else x


def _check_model(model: Any) -> None:
    if isinstance(model, (keras.Model, tf.Module)) and callable(model):
        return
    is_class = isinstance(model, type)
    found = f"the class {model.__name__}" if is_class else type(model).__name__
    raise UserError(
        f"the model must be a keras.Model, or a tf.Module that can be called; found {found}"
    )


def _check_loss(loss: Any, label_smoothing: float) -> None:
    if loss is None:
        return
    check_loss(loss)
    if label_smoothing and not isinstance(loss, Mapping):
        raise UserError(
            f"label_smoothing={label_smoothing} belongs to the cross-entropy; a loss of your "
            "own has to do it itself"
        )


def _check_kind(name: str, value: Any, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{name}: expected a tfloop.{kind.__name__}, found {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return (
        repr(value)
        if value is None or isinstance(value, (str, int, float))
        else type(value).__name__
    )


def _check_penalties(penalties: Any, kernels: Mapping, penalize: Any) -> tuple[Callable, ...]:
    is_list = isinstance(penalties, (list, tuple))
    if not is_list or not all(map(callable, penalties)):
        raise UserError("penalties: expected a list of functions, each of which takes a kernel")
    if penalties and not kernels:
        chosen = f", with penalize={penalize}" if isinstance(penalize, str) else ""
        raise UserError(f"penalties: the model has no kernels that they could count{chosen}")
    return tuple(penalties)


def _make_rate(
    schedule: Any, optimizer: Any, model: Any
) -> tuple[Schedule, Optimizer | KerasOptimizer]:
    """The schedule and the optimizer; where the rate is constant, both have one variable for it."""
    made = _make_optimizer(optimizer, model)
    if isinstance(schedule, Schedule):
        return schedule, made
    if isinstance(schedule, (tf.Variable, keras.Variable)):
        return Schedule.of_variable(models.as_tf_variable(schedule)), made
    if callable(schedule):
        return Schedule(schedule), made
    if schedule is not None and not isinstance(schedule, (int, float, np.number)):
        raise UserError(
            "schedule: expected a tfloop.Schedule, a function step → rate, or a constant rate; "
            f"found {_shown(schedule)}"
        )
    if not isinstance(made, KerasOptimizer):
        return Schedule("constant", learning_rate=0.001 if schedule is None else schedule), made
    if schedule is not None:
        made.rate.assign(schedule)
    made.shares_rate = True
    return Schedule.of_variable(made.rate), made


def _make_optimizer(optimizer: Any, model: Any) -> Optimizer | KerasOptimizer:
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return KerasOptimizer(optimizer, model)
    if isinstance(optimizer, str):
        optimizer = Optimizer(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            "optimizer: expected a tfloop.Optimizer, the name of one, or a Keras optimizer such as "
            f"keras.optimizers.Adam(); found {_shown(optimizer)}"
        )
    for variable in model.trainable_variables:
        if getattr(variable, "constraint", None) is not None:
            name = getattr(variable, "path", variable.name)
            raise UserError(
                f"{name} has a constraint, which Keras's optimizers alone apply; hand one in, such "
                "as keras.optimizers.SGD()"
            )
    return optimizer
