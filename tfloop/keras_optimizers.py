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
    """

    def __init__(self, inner: keras.optimizers.Optimizer, variables: list[keras.Variable]) -> None:
        """Make one.

        Args:
          inner: a Keras optimizer that no model was compiled with.
          variables: the Keras variables that it is to train.

        Raises:
          UserError: an optimizer that does what the loop or the state does.
        """
        kind = type(inner).__name__
        self.name = kind.lower()
        if not isinstance(inner.learning_rate, keras.Variable):
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
        self.inner, self._variables = inner, list(variables)
        self.hyper: dict[str, tf.Variable] = {}

    def build(self, weights: dict[str, tf.Variable]) -> None:
        """Make the slots for these weights, which are those of the variables given."""
        self.inner.build(self._variables)
        self.count = self.inner.iterations.value
        # Keras counts models in its variables' names, so these are not names to keep.
        self.slots = {
            str(index): variable.value
            for index, variable in enumerate(self.inner.variables)
            if variable.value is not self.count
        }
        self._initial = [(variable, variable.numpy()) for variable in self.inner.variables]

    def _all(self, weights: dict[str, tf.Variable]) -> list[tf.Variable]:
        return [*weights.values(), *self.slots.values(), self.count]

    def updates(
        self, gradients: Vector, weights: dict[str, tf.Variable], rate: tf.Tensor
    ) -> tuple[Vector, Any]:
        """(the updates to add to the weights, every variable's value after it). Changes nothing."""
        with tf.name_scope(f"{self.name}/"):
            before = [tf.identity(variable) for variable in self._all(weights)]
            self.inner.learning_rate.assign(rate)
            self.inner.apply(list(gradients.parts().values()), self._variables)
            after = [tf.identity(variable) for variable in self._all(weights)]
            for variable, value in zip(self._all(weights), before, strict=True):
                variable.assign(value)
            moved = flatten(after[: len(weights)]) - flatten(before[: len(weights)])
            return Vector(moved, weights), after

    def apply(
        self,
        updates: Vector,
        after: Any,
        weights: dict[str, tf.Variable],
        valid: tf.Tensor,
    ) -> None:
        """Go where `updates` led; nothing changes where `valid`, a boolean scalar, is false."""
        with tf.name_scope(f"{self.name}/"):
            for variable, value in zip(self._all(weights), after, strict=True):
                variable.assign(select(valid, value, variable))

    def reset(self) -> None:
        """Slots, count and rate as they were when built."""
        for variable, value in self._initial:
            variable.assign(value)
