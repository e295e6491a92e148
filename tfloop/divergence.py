"""A loss that became NaN or infinite: where that began, and the error that says so."""

import tensorflow as tf

from tfloop import models
from tfloop.data.pipelines import Batch
from tfloop.errors import DivergenceError
from tfloop.nests import leaves
from tfloop.state import TrainState
from tfloop.step import forward_and_backward, penalized


def held_out(state: TrainState, operation: str = "") -> DivergenceError:
    """In an evaluation; `operation` says in which of the graph's, where that is known."""
    step = int(state.global_step)
    message = (
        f"step {step}: the loss on the examples held out is NaN or infinite{operation}; try a "
        "lower --learning_rate"
    )
    return DivergenceError(message, step, "loss")


def of_step(state: TrainState, batch: Batch, operation: str = "") -> DivergenceError:
    """In a step, which is done once more, layer by layer, to name the first bad value.

    Args:
      state: as it was before the step.
      batch: of the step, as the pipeline gives it.
      operation: as of `held_out`.
    """
    step = int(state.global_step)
    before = [variable.numpy() for variable in state.non_trainable.values()]
    what, layer = _first_not_finite(state, state.mixed(batch))
    for variable, value in zip(state.non_trainable.values(), before, strict=True):
        variable.assign(value)
    where = f"the {what}" if what == layer else f"the {what} of {layer}"
    if "penalty" in what:
        message = (
            f"step {step}: the {what} by {layer} is NaN or infinite; is it differentiable "
            "there, as √x is not at 0? The weights are those before this step"
        )
        return DivergenceError(message, step, layer)
    rate = float(state.schedule(state.schedule_step))
    message = (
        f"step {step}: {where} became NaN or infinite{operation}, at rate {rate:.4g}; the "
        "weights are those before this step. Try a lower --learning_rate"
    )
    return DivergenceError(message, step, layer)


def _first_not_finite(state: TrainState, batch: Batch) -> tuple[str, str]:
    """(what, layer): the first of the step's values, in their order, that is not finite."""
    key = state.key()
    inputs = state.prepared(batch.inputs, key)
    as_logits = state.objective.as_logits
    activations = list(models.activations(state.model, inputs, True, key, as_logits))
    result = forward_and_backward(state, batch)
    for name, weight in state.weights.items():
        if not _is_finite(weight):
            return "weights", name.split("/")[0]
    for layer, _, activation in activations:
        if not all(map(_is_finite, leaves(activation))):
            return "activations", layer
    if not _is_finite(result.loss.total):
        return "loss", "loss"
    loss = result.loss
    zeros = {name: tf.zeros_like(weight) for name, weight in state.weights.items()}
    for name, gradient in penalized(state, loss.data, loss.model, zeros)[1].items():
        if not _is_finite(gradient):
            return "gradient of a penalty of your own", name.split("/")[0]
    for name, gradient in result.gradients.items():
        if not _is_finite(gradient):
            return "gradients", name.split("/")[0]
    return "update", "update"


def _is_finite(values: tf.Tensor) -> bool:
    return not values.dtype.is_floating or bool(tf.reduce_all(tf.math.is_finite(values)))
