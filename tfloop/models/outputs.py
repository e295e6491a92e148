"""What a model's outputs are: logits, or probabilities that it ends in."""

from typing import Any

import keras
import tensorflow as tf

from tfloop.errors import UserError
from tfloop.models.variables import Model

LEFT_OUT = ("softmax", "sigmoid")


def output_activation(model: Model) -> str:
    """The activation that the forward pass leaves out of a stack of layers: "softmax", "sigmoid".

    "" where the forward pass gives what the model does.
    """
    if not isinstance(model, keras.Sequential) or not model.layers:
        return ""
    last = model.layers[-1]
    known = (keras.layers.Dense, keras.layers.Activation, keras.layers.Softmax)
    is_known = type(last) in known and last.activity_regularizer is None
    return _activation_name(last) if is_known else ""


def last_activation(model: Model) -> str:
    """The activation that a stack or graph of layers ends in: "softmax", "sigmoid" or ""."""
    return _activation_name(_last_operation(model))


def check_outputs(model: Model) -> None:
    """Raises UserError for a model whose outputs would be taken for logits and are none."""
    activation = last_activation(model)
    if activation and not output_activation(model):
        name = _last_operation(model).name
        raise UserError(
            f"the model ends in {activation} ({name}); hand in one that returns logits, or a "
            "keras.Sequential whose last layer is a Dense, Activation or Softmax, of which the "
            "activation is left out"
        )


def probabilities(model: Model, outputs: tf.Tensor) -> tf.Tensor:
    """The model's output activation over its logits; softmax where it has none.

    Probabilities that the model ends in are left as they are.
    """
    if last_activation(model) and not output_activation(model):
        return outputs
    if output_activation(model) == "sigmoid":
        return tf.sigmoid(outputs)
    return tf.nn.softmax(outputs)


def _last_operation(model: Model) -> Any:
    """That of a stack or graph of layers, or of the one that it ends in.

    None of any other model, whose layers have no order.
    """
    last = None
    while isinstance(model, keras.Model):
        attribute = "layers" if isinstance(model, keras.Sequential) else "operations"
        operations = getattr(model, attribute, None)
        if not operations:
            break
        last = model = operations[-1]
    return last


def _activation_name(layer: keras.layers.Layer) -> str:
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    name = getattr(getattr(layer, "activation", None), "__name__", "")
    return name if name in LEFT_OUT else ""
