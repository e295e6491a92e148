"""The forward pass, layer by layer as Keras has it.

A model here is a keras.Model, or a tf.Module that is callable and has trainable variables. A plain
stack of layers (`keras.Sequential`) is run layer by layer, so that each activation can be seen and
the last softmax or sigmoid is folded into the loss. Any other model is called as it is and must
return logits, or what a loss of its own takes.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tfloop.models.layer_rules import draws_by_position, over_parts, rule_of
from tfloop.models.outputs import output_activation
from tfloop.models.variables import Model
from tfloop.randomness import Key


def activations(
    model: Model,
    images: tf.Tensor,
    sample_weight: tf.Tensor | None = None,
    training: bool = False,
    key: Key | None = None,
) -> Iterator[tuple[str, tf.Tensor]]:
    """Yields (layer name, activation) from the first layer to the logits.

    Args:
      model: a keras.Sequential is run layer by layer; any other model yields once, what it returns.
      images: [batch, height, width, channels] float32.
      sample_weight: [batch] float32, 0 for the rows that only fill up the batch: batch
        normalisation leaves them out.
      training: as Keras's argument.
      key: the seed of this step's dropout; needed in training where the model has a Dropout layer.
    """
    if not isinstance(model, keras.Sequential):
        outputs = call_layer(model, images, training)
        if tf.is_tensor(outputs):
            outputs = tf.cast(outputs, tf.float32)
        yield getattr(model, "name", "model"), outputs
        return
    x = images
    for index, layer in enumerate(model.layers):
        with tf.name_scope(layer.name):
            x = apply_layer(model, index, x, sample_weight, training, key)
        yield layer.name, x


def logits(
    model: Model,
    images: tf.Tensor,
    sample_weight: tf.Tensor | None = None,
    training: bool = False,
    key: Key | None = None,
) -> tf.Tensor:
    """The last of what `activations` yields."""
    for _, outputs in activations(model, images, sample_weight, training, key):
        last = outputs  # what came before it may go
    return last


def apply_layer(
    model: keras.Sequential,
    index: int,
    x: tf.Tensor,
    sample_weight: tf.Tensor | None,
    training: bool,
    key: Key | None,
) -> tf.Tensor:
    """The activation of layer `index`, from the one before; arguments as in `activations`."""
    layer = model.layers[index]
    if draws_by_position(layer):
        if not training:
            return x
        draw = rule_of(layer).draw
        assert draw and key is not None, "a model with dropout needs a key in training"
        return draw(layer, x, key.fold_in(index))
    over = over_parts(layer, training)
    if over and sample_weight is not None:
        return over(layer, [x], sample_weight)[0]
    if index == len(model.layers) - 1 and output_activation(model):
        return _without_activation(layer, x)
    return call_layer(layer, x, training)


def call_layer(layer: Any, x: tf.Tensor, training: bool) -> tf.Tensor:
    """The layer or model, told whether it is trained where it takes that."""
    is_layer = isinstance(layer, keras.layers.Layer)
    takes_it = is_layer or "training" in inspect.signature(layer.__call__).parameters
    return layer(x, training=training) if takes_it else layer(x)


def _without_activation(layer: keras.layers.Layer, x: tf.Tensor) -> tf.Tensor:
    if type(layer) is not keras.layers.Dense:
        return x  # an Activation or Softmax layer of its own
    x = tf.matmul(cast(x, layer), cast(layer.kernel, layer))
    return x if layer.bias is None else tf.nn.bias_add(x, cast(layer.bias, layer))


def cast(x: Any, layer: keras.layers.Layer) -> tf.Tensor:
    """In the type that the layer computes in: with mixed precision not that of its weights."""
    return tf.cast(tf.convert_to_tensor(x), layer.compute_dtype)
