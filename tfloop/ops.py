"""The fast forward pass: the same values as `models.logits`, its plain twin, from the same layers, in another order.

Four rearrangements, each exact but for the order in which floats are added (the figures: `benchmarks/ops.py`):

- Pixels that no output depends on are cut off first. A 2×2 pool over 11×11 never looks at the last row and column;
  for the article's network that leaves 26×26 of the image, and 17 % less work in the second convolution.
- A max-pool goes before the bias and the activation, which are monotone: max(f(a + b)) = f(max(a) + b). They then run
  over a quarter of the values, forward and backward. Ties between equal convolution outputs go to the first maximum in
  either order; only values that the bias itself rounds to a tie may go to another one of the tied places.
- ReLU and its bias cost nothing as part of a convolution. There the forward pass keeps its order, and only the gradients
  change places: ReLU lets one through at a pool's output just where it would at the place that the maximum came from.
- On a CPU the batch is cut into shards that are computed side by side, one core each, which loses less to waiting than
  every operation spread over all cores. Batch normalisation adds up the shards' sums; other layers that look at the whole
  batch see it whole.

TensorFlow derives the gradients, but for that pool's and those of batch normalisation over shards (`normalization`).
"""

import keras
import tensorflow as tf

from tfloop import models
from tfloop.normalization import batch_norm, normalizes

MONOTONE = (keras.activations.relu, keras.activations.sigmoid, keras.activations.tanh, keras.activations.elu, keras.activations.linear)


def logits(model, images: tf.Tensor, weights=None, training: bool = False, key=None, shards: int = 1) -> tf.Tensor:
    """As `models.logits`, which it falls back on where the model is no stack of layers."""
    if not isinstance(model, keras.Sequential):
        return models.logits(model, images, weights, training, key)
    if used := used_pixels(model):
        images = images[:, :used[0], :used[1]]
    shards = min(shards, images.shape[0] or 1)
    sizes = [(images.shape[0] or 1) // shards] * (shards - 1)
    split = lambda x: tf.split(x, [*sizes, -1]) if shards > 1 else [x]
    join = lambda parts: tf.concat(parts, axis=0) if shards > 1 else parts[0]
    parts, pooled = split(images), False
    for index, layer in enumerate(model.layers):
        with tf.name_scope(layer.name):
            if pooled:
                pooled = False
            elif index + 1 < len(model.layers) and _may_pool_first(layer, model.layers[index + 1]):
                parts, pooled = [_pool_first(layer, model.layers[index + 1], x) for x in parts], True
            elif normalizes(layer, weights, training):
                parts = batch_norm(layer, parts, weights)
            elif _is_by_example(layer, training):
                parts = [models.apply_layer(model, index, x, weights, training, key) for x in parts]
            else:
                parts = split(models.apply_layer(model, index, join(parts), weights, training, key))
    return join(parts)


def used_pixels(model: keras.Sequential) -> tuple[int, int] | None:
    """(height, width) of the part of the image, from its first row and column, that the outputs depend on.

    None where the first layer takes no images, or images of any size.
    """
    if len(model.input_shape) != 4 or None in model.input_shape[1:]:
        return None
    used = None
    for layer in reversed(model.layers):
        full = layer.input.shape[1:3] if len(layer.input.shape) == 4 else None
        if full is None:
            used = None
        elif type(layer) is keras.layers.MaxPooling2D and layer.padding == "valid" and layer.strides == layer.pool_size:
            used = [used_out * pool for used_out, pool in zip(used or layer.output.shape[1:3], layer.pool_size)]
        elif _is_plain_convolution(layer) and layer.padding == "valid":
            used = [used_out + kernel - 1 for used_out, kernel in zip(used or layer.output.shape[1:3], layer.kernel_size)]
        elif type(layer) is not keras.layers.Activation or used is None:
            used = full
    return tuple(used)


def _is_plain_convolution(layer) -> bool:
    return (type(layer) is keras.layers.Conv2D and layer.strides == (1, 1) and layer.dilation_rate == (1, 1)
            and layer.groups == 1 and layer.data_format == "channels_last")


def _may_pool_first(layer, following) -> bool:
    """Is `layer` a convolution or activation, and `following` a max-pool that may run before its monotone part?"""
    if type(following) is not keras.layers.MaxPooling2D or following.data_format != "channels_last":
        return False
    known = _is_plain_convolution(layer) or type(layer) is keras.layers.Activation
    return known and layer.activation in MONOTONE and layer.activity_regularizer is None


def _pool_first(layer, pool, x: tf.Tensor) -> tf.Tensor:
    if isinstance(layer, keras.layers.Conv2D):
        x = tf.nn.conv2d(models.cast(x, layer), models.cast(layer.kernel, layer), 1, layer.padding.upper())
        if layer.bias is not None and layer.activation is keras.activations.relu:
            return _bias_relu_pool(x, models.cast(layer.bias, layer), pool)
        x = pool(x)
        x = x if layer.bias is None else tf.nn.bias_add(x, models.cast(layer.bias, layer))
    else:
        x = pool(x)
    return layer.activation(x)


def _bias_relu_pool(x: tf.Tensor, bias: tf.Tensor, pool) -> tf.Tensor:
    """max-pool(relu(x + bias)), whose gradient goes through ReLU and bias before it is spread over the pool's windows."""
    window = {"ksize": [1, *pool.pool_size, 1], "strides": [1, *pool.strides, 1], "padding": pool.padding.upper()}

    @tf.custom_gradient
    def pooled(x, bias):
        active = tf.nn.relu(tf.nn.bias_add(x, bias))
        largest = tf.raw_ops.MaxPool(input=active, **window)

        def gradient(upstream):
            upstream = tf.raw_ops.ReluGrad(gradients=upstream, features=largest)
            placed = tf.raw_ops.MaxPoolGrad(orig_input=active, orig_output=largest, grad=upstream, **window)
            return placed, tf.raw_ops.BiasAddGrad(out_backprop=upstream)

        return largest, gradient

    return pooled(x, bias)


def _is_by_example(layer, training: bool) -> bool:
    """Does each row of the batch go through the layer on its own? In training, random layers and those not known here do not,
    nor one that has a loss of its own."""
    known = (keras.layers.Conv2D, keras.layers.Dense, keras.layers.Flatten, keras.layers.MaxPooling2D,
             keras.layers.AveragePooling2D, keras.layers.GlobalAveragePooling2D, keras.layers.Activation,
             keras.layers.Softmax, keras.layers.Reshape, keras.layers.ReLU)
    if layer.activity_regularizer is not None:
        return False
    return type(layer) in known or not training and type(layer) in (keras.layers.BatchNormalization, keras.layers.Dropout)
