"""What a model's outputs are: logits, or probabilities that it ends in."""

from typing import Any

import numpy as np
import tensorflow as tf

from tfloop.models.program import program_of
from tfloop.models.variables import Model


def output_activation(model: Model) -> str:
    """The activation that `outputs(…, as_logits=True)` leaves out: "softmax", "sigmoid".

    "" where it gives what the model does; of several outputs that of the first.
    """
    return next(iter(output_activations(model)), "")


def output_activations(model: Model) -> list[str]:
    """As `output_activation`, of each output; [] of a model that shows no graph."""
    program = program_of(model)
    return [squashed[1] if squashed else "" for squashed in program.squashed] if program else []


def output_specs(model: Model) -> Any:
    """A nest of tf.TensorSpec, as the model gives its outputs; None where it shows no graph."""
    program = program_of(model)
    if program is None:
        return None
    return program.pack([tf.TensorSpec(program.shapes[value]) for value in program.outputs])


def probabilities(model: Model, logits: tf.Tensor) -> tf.Tensor:
    """The model's output activation over its logits; softmax where it has none."""
    if output_activation(model) == "sigmoid":
        return tf.sigmoid(logits)
    return tf.nn.softmax(logits)


def squashed_values(values: np.ndarray) -> str:
    """What rows of outputs are by their values: "softmax", "sigmoid", or "" for logits.

    Rows that are nowhere negative and add up to 1, to what 16 bits resolve; or numbers that all lie
    between 0 and 1 and are not all the same. Values of inputs of several sizes tell best.
    """
    if values.ndim != 2 or values.shape[1] < 2 or not np.isfinite(values).all():
        return ""
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1.0, atol=0.01):
        return "softmax"
    is_inside = (values >= 0).all() and (values <= 1).all() and np.ptp(values) > 0
    return "sigmoid" if is_inside else ""
