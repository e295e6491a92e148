"""The fast forward pass: the values of its plain twin, `forward.logits`, in another order.

Four rearrangements, each exact but for the order in which floats are added (`benchmarks/ops.py`
measures them):

- Pixels that no output depends on are cut off first. A 2×2 pool over 11×11 never looks at the last
  row and column; for the article's network that leaves 26×26 of the image, and 17 % less work in
  the second convolution.
- A max-pool goes before the bias and the activation, which are monotone: max(f(a + b)) =
  f(max(a) + b). They then run over a quarter of the values, forward and backward. Ties between
  equal convolution outputs go to the first maximum in either order; only values that the bias
  itself rounds to a tie may go to another one of the tied places.
- ReLU and its bias cost nothing as part of a convolution. There the forward pass keeps its order,
  and only the gradients change places: ReLU lets one through at a pool's output just where it would
  at the place that the maximum came from.
- On a CPU the batch is cut into shards that are computed side by side, one core each, which loses
  less to waiting than every operation spread over all cores. Batch normalisation adds up the
  shards' sums; other layers that look at the whole batch see it whole.

TensorFlow derives the gradients, but for that pool's and those of batch normalisation over shards
(`normalization`).
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from tfloop.models import forward
from tfloop.models.layer_rules import (
    Size,
    is_by_example,
    is_plain_convolution,
    over_parts,
    rule_of,
)
from tfloop.models.variables import Model
from tfloop.randomness import Key

MONOTONE = (
    keras.activations.relu,
    keras.activations.sigmoid,
    keras.activations.tanh,
    keras.activations.elu,
    keras.activations.linear,
)


def logits(
    model: Model,
    images: tf.Tensor,
    sample_weight: tf.Tensor | None = None,
    training: bool = False,
    key: Key | None = None,
    shards: int = 1,
) -> tf.Tensor:
    """As `forward.logits`, which it falls back on where the model is no stack of layers.

    Args:
      shards: parts of the batch to compute side by side; the others as in `forward.activations`.
    """
    if not isinstance(model, keras.Sequential):
        return forward.logits(model, images, sample_weight, training, key)
    if used := used_pixels(model):
        images = images[:, : used[0], : used[1]]
    split, join = _cutting(images.shape[0] or 1, shards)
    parts, has_pooled = split(images), False
    for index, layer in enumerate(model.layers):

        def apply(x: tf.Tensor, index: int = index) -> tf.Tensor:
            return forward.apply_layer(model, index, x, sample_weight, training, key)

        with tf.name_scope(layer.name):
            following = model.layers[index + 1] if index + 1 < len(model.layers) else None
            if has_pooled:
                has_pooled = False
            elif following and _may_pool_first(layer, following):
                parts = [_pool_first(layer, following, x) for x in parts]
                has_pooled = True
            elif sample_weight is not None and (over := over_parts(layer, training)):
                parts = over(layer, parts, sample_weight)
            elif is_by_example(layer, training):
                parts = [apply(x) for x in parts]
            else:
                parts = split(apply(join(parts)))
    return join(parts)


def _cutting(rows: int, shards: int) -> tuple[Callable, Callable]:
    """(a function that cuts a batch into shards, one that puts them together again)."""
    shards = min(shards, rows)
    sizes = [rows // shards] * (shards - 1)

    def split(x: tf.Tensor) -> list[tf.Tensor]:
        return tf.split(x, [*sizes, -1]) if shards > 1 else [x]

    def join(parts: list[tf.Tensor]) -> tf.Tensor:
        return tf.concat(parts, axis=0) if shards > 1 else parts[0]

    return split, join


def used_pixels(model: keras.Sequential) -> Size | None:
    """(height, width) of the part of the image, from its corner, that the outputs depend on.

    None where the first layer takes no images, or images of any size.
    """
    if len(model.input_shape) != 4 or None in model.input_shape[1:]:
        return None
    used: Size | None = None
    for layer in reversed(model.layers):
        if len(layer.input.shape) != 4:
            used = None
            continue
        if used is None and len(layer.output.shape) == 4:
            used = tuple(layer.output.shape[1:3])
        rule = rule_of(layer)
        needed = rule.used(layer, used) if rule.used and used else None
        used = needed or tuple(layer.input.shape[1:3])
    return used


def _may_pool_first(layer: keras.layers.Layer, following: keras.layers.Layer) -> bool:
    """Is `layer` a convolution or activation, and `following` a max-pool that may run first?"""
    if type(following) is not keras.layers.MaxPooling2D:
        return False
    if following.data_format != "channels_last":
        return False
    is_known = is_plain_convolution(layer) or type(layer) is keras.layers.Activation
    return is_known and layer.activation in MONOTONE and layer.activity_regularizer is None


def _pool_first(
    layer: keras.layers.Layer, pool: keras.layers.MaxPooling2D, x: tf.Tensor
) -> tf.Tensor:
    if not isinstance(layer, keras.layers.Conv2D):
        return layer.activation(pool(x))
    kernel = forward.cast(layer.kernel, layer)
    x = tf.nn.conv2d(forward.cast(x, layer), kernel, 1, layer.padding.upper())
    if layer.bias is None:
        return layer.activation(pool(x))
    bias = forward.cast(layer.bias, layer)
    if layer.activation is keras.activations.relu:
        return _bias_relu_pool(x, bias, pool)
    return layer.activation(tf.nn.bias_add(pool(x), bias))


def _bias_relu_pool(x: tf.Tensor, bias: tf.Tensor, pool: keras.layers.MaxPooling2D) -> tf.Tensor:
    """max-pool(relu(x + bias)).

    Its gradient goes through ReLU and bias before it is spread over the pool's windows.
    """
    window = {
        "ksize": [1, *pool.pool_size, 1],
        "strides": [1, *pool.strides, 1],
        "padding": pool.padding.upper(),
    }

    @tf.custom_gradient
    def pooled(x: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        active = tf.nn.relu(tf.nn.bias_add(x, bias))
        largest = tf.raw_ops.MaxPool(input=active, **window)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            upstream = tf.raw_ops.ReluGrad(gradients=upstream, features=largest)
            placed = tf.raw_ops.MaxPoolGrad(
                orig_input=active, orig_output=largest, grad=upstream, **window
            )
            return placed, tf.raw_ops.BiasAddGrad(out_backprop=upstream)

        return largest, gradient

    return pooled(x, bias)
