"""Any keras.optimizers.Optimizer in the place of one of tfloop's own."""

from typing import Any

import keras
import tensorflow as tf

from tfloop.errors import UserError
from tfloop.vectors import Vector, flatten, select


class KerasOptimizer:
    """A Keras optimizer whose rate the loop drives and whose variables it resets.

    Keras computes and applies in one go. To see its update before it is made, `updates` lets Keras
    make it, notes where that led, and takes it back.

    Attributes: as those of `optimizers.Optimizer`; `inner` is Keras's own.
      rate: Keras's variable for the rate.
      shares_rate: is that variable the state's rate, too? Then Keras's way to change it,
        `optimizer.learning_rate = …`, counts from the next step on.
    """

    def __init__(self, inner: keras.optimizers.Optimizer, model: Any) -> None:
        """Make one.

        Args:
          inner: a Keras optimizer that no model was compiled with.
          model: whose trainable variables it is to train.

        Raises:
          UserError: an optimizer that does what the loop or the state does.
        """
        kind = type(inner).__name__
        self.name = kind.lower()
        if isinstance(inner, keras.optimizers.MultiOptimizer):
            raise UserError(
                f"{kind}: holds optimizers with rates of their own, which the loop could not "
                "drive; hand in one optimizer"
            )
        if not isinstance(getattr(inner, "_learning_rate", None), keras.Variable):
            raise UserError(
                f"{kind}: hand it in with a plain learning rate, and its schedule to the state: "
                "schedule=…"
            )
        if inner.built:
            raise UserError(
                f"this {kind} optimizer belongs to another model or state already; make one for "
                "each"
            )
        if isinstance(inner, keras.optimizers.LossScaleOptimizer) or inner.loss_scale_factor:
            raise UserError(
                f"{kind} expects a loss that it has scaled; hand in one that does not, and "
                "scale_loss=True to the state"
            )
        if inner.gradient_accumulation_steps:
            raise UserError(
                f"{kind}: hand it in without gradient_accumulation_steps, and accumulate=… to the "
                "loop"
            )
        if inner.use_ema:
            raise UserError(
                f"{kind}: hand it in without use_ema, and ema={inner.ema_momentum:g} to the state, "
                "which evaluates with the average"
            )
        self.inner, self._model = inner, model
        self.rate: tf.Variable = inner._learning_rate.value
        self.shares_rate = False
        self.hyper: dict[str, tf.Variable] = {}

    def build(self, weights: dict[str, tf.Variable], names: Any = None) -> None:
        """Make the slots for these weights, which are those of the variables given."""
        self._variables = self._variables_of(weights)
        self.inner.build(self._variables)
        self.count = self.inner.iterations.value
        self._given_rate = float(self.rate)
        self._note()

    def _variables_of(self, weights: dict[str, tf.Variable]) -> list:
        """Keras's variables for these weights, in their order."""
        by_id = {id(_tf(variable)): variable for variable in self._model.variables}
        return [by_id[id(weight)] for weight in weights.values()]

    def _note(self) -> None:
        # Keras counts models in its variables' names, so these are not names to keep.
        self.slots = {
            str(index): variable.value
            for index, variable in enumerate(self.inner.variables)
            if variable.value is not self.count and variable.value is not self.rate
        }
        self._initial = [
            (variable, variable.numpy())
            for variable in self.inner.variables
            if variable.value is not self.rate
        ]
        self.note_rate()

    def rebuild(
        self, before: dict[str, tf.Variable], weights: dict[str, tf.Variable], names: Any = None
    ) -> None:
        """Make the slots anew for other weights of the same model; those that stay keep theirs."""
        inner, old = self.inner, self._by_weight()
        initial = {id(variable): value for variable, value in self._initial}
        scalars = {
            name: v.numpy()
            for name, v in vars(inner).items()
            if isinstance(v, keras.Variable) and not v.shape
        }
        kept = [inner.iterations, inner._learning_rate]
        del inner._variables[:]
        inner._variables.extend(kept)
        inner._trainable_variables_indices.clear()
        inner.built = False
        self._variables = self._variables_of(weights)
        inner.build(self._variables)
        self._note()
        self._initial = [(v, initial.get(id(v), value)) for v, value in self._initial]
        for (attribute, weight), slot in self._by_weight().items():
            if (attribute, weight) in old:
                slot.assign(old[attribute, weight])
        for name, value in scalars.items():
            getattr(inner, name).assign(value)

    def _by_weight(self) -> dict[tuple[str, int], Any]:
        """(attribute of the optimizer, id of the weight) → the slot that it keeps there."""
        slots = {}
        for attribute, value in vars(self.inner).items():
            is_slots = isinstance(value, list) and len(value) == len(self._variables)
            if is_slots and attribute != "_trainable_variables":
                for variable, slot in zip(self._variables, value, strict=True):
                    if isinstance(slot, keras.Variable):
                        slots[attribute, id(_tf(variable))] = slot
        return slots

    def note_rate(self) -> None:
        """Remember the rate that the last step had, to see where somebody sets another."""
        self._driven = float(self.rate)

    def check_rate(self) -> None:
        """Raises UserError where Keras's rate was set, which a schedule of the state's drives."""
        rate = float(self.rate)
        if not self.shares_rate and rate != self._driven:
            self.rate.assign(self._driven)
            raise UserError(
                f"{self.name}.learning_rate was set to {rate:g}, but the state's schedule drives "
                "the rate: set a number of state.hyper, or make the state without a schedule"
            )

    def _all(self, weights: dict[str, tf.Variable]) -> list[tf.Variable]:
        return [*weights.values(), *self.slots.values(), self.count]

    def updates(
        self, gradients: Vector, weights: dict[str, tf.Variable], rate: tf.Tensor
    ) -> tuple[Vector, Any]:
        """(the updates to add to the weights, every variable's value after it). Changes nothing."""
        with tf.name_scope(f"update/{self.name}/"):
            before = [tf.identity(variable) for variable in self._all(weights)]
            own_rate = tf.identity(self.rate)
            self.rate.assign(rate)
            self.inner.apply(list(gradients.parts().values()), self._variables)
            self.rate.assign(own_rate)
            after = [tf.identity(variable) for variable in self._all(weights)]
            for variable, value in zip(self._all(weights), before, strict=True):
                variable.assign(value)
            moved = flatten(after[: len(weights)]) - flatten(before[: len(weights)])
            return Vector(moved, weights), (after, rate)

    def apply(
        self,
        updates: Vector,
        after: Any,
        weights: dict[str, tf.Variable],
        valid: tf.Tensor,
    ) -> None:
        """Go where `updates` led; nothing changes where `valid`, a boolean scalar, is false."""
        values, rate = after
        with tf.name_scope(f"update/{self.name}/"):
            for variable, value in zip(self._all(weights), values, strict=True):
                variable.assign(select(valid, value, variable))
            self.rate.assign(rate)

    def reset(self) -> None:
        """Slots and count as they were when built, and the rate where a schedule drives it."""
        for variable, value in self._initial:
            variable.assign(value)
        if not self.shares_rate:
            self.rate.assign(self._given_rate)
            self.note_rate()


def _tf(variable: Any) -> tf.Variable:
    """TensorFlow's variable behind one of Keras's, or the variable itself."""
    return variable if isinstance(variable, tf.Variable) else variable.value
