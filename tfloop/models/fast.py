"""The fast forward pass: the values of the plain one in another order.

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

import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfloop.models.layer_rules import Size, goes_by_pixel, is_plain_convolution, rule_of
from tfloop.models.program import Call, Program

MONOTONE = (
    keras.activations.relu,
    keras.activations.sigmoid,
    keras.activations.tanh,
    keras.activations.elu,
    keras.activations.linear,
)


def used_pixels(program: Program) -> Size | None:
    """(height, width) of the part of the image, from its corner, that the outputs depend on.

    None where the model takes no images, or images of any size.
    """
    shapes = program.shapes
    images = [shape for shape in shapes.values() if len(shape) == 4]
    if program.inputs != 1 or len(shapes[0]) != 4 or any(None in shape[1:] for shape in images):
        return None
    needed: dict[int, Size] = {}  # by value
    for output in program.outputs:
        if len(shapes[output]) == 4:
            needed[output] = _size(shapes[output])
    for call in reversed(program.calls):
        rule, output = rule_of(call.operation), call.outputs[0]
        for value in call.inputs:
            if len(shapes[value]) != 4:
                continue
            used = None
            if rule.used and output in needed and goes_by_pixel(call.operation):
                used = rule.used(call.operation, needed[output])
            height, width = used or _size(shapes[value])
            before = needed.get(value, (0, 0))
            needed[value] = max(height, before[0]), max(width, before[1])
    return needed.get(0, _size(shapes[0]))


def _size(shape: tuple) -> Size:
    return shape[1], shape[2]


def pool_behind(program: Program, call: Call) -> Call | None:
    """The max-pool that alone reads what a call gives, where it may as well run first."""
    places = program.readers.get(call.outputs[0], ())
    if len(places) != 1 or places[0] == len(program.calls):
        return None
    following = program.calls[places[0]]
    return following if _may_pool_first(call.operation, following.operation) else None


def _may_pool_first(layer: Any, following: Any) -> bool:
    """Is `layer` a convolution or activation, and `following` a max-pool that may run first?"""
    if type(following) is not keras.layers.MaxPooling2D:
        return False
    if following.data_format != "channels_last":
        return False
    is_known = is_plain_convolution(layer) or type(layer) is keras.layers.Activation
    return is_known and layer.activation in MONOTONE and layer.activity_regularizer is None


def activation_behind(program: Program, call: Call) -> tuple[Call, str] | None:
    """(the ReLU that alone reads what a call gives, its name); None where there is none."""
    places = program.readers.get(call.outputs[0], ())
    if len(places) != 1 or places[0] == len(program.calls):
        return None
    following = program.calls[places[0]]
    name = _relu_name(following.operation)
    return (following, name) if name else None


def _relu_name(layer: Any) -> str:
    if getattr(layer, "activity_regularizer", None) is not None:
        return ""
    if type(layer) is keras.layers.Activation:
        names = {keras.activations.relu: "relu", keras.activations.relu6: "relu6"}
        is_function = inspect.isfunction(layer.activation)
        return names.get(layer.activation, "") if is_function else ""
    if type(layer) is keras.layers.ReLU and not layer.negative_slope and not layer.threshold:
        return {None: "relu", 6: "relu6"}.get(layer.max_value, "")
    return ""


def pool_first(
    layer: keras.layers.Layer, pool: keras.layers.MaxPooling2D, x: tf.Tensor
) -> tf.Tensor:
    """What the pool gives of what the layer gives, pooled before bias and activation."""
    if not isinstance(layer, keras.layers.Conv2D):
        return layer.activation(pool(x))
    kernel = cast(layer.kernel, layer)
    x = tf.nn.conv2d(cast(x, layer), kernel, 1, layer.padding.upper())
    if layer.bias is None:
        return layer.activation(pool(x))
    bias = cast(layer.bias, layer)
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
    scope = "" if tf.executing_eagerly() else tf.compat.v1.get_default_graph().get_name_scope()

    @tf.custom_gradient
    def pooled(x: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        active = tf.nn.relu(tf.nn.bias_add(x, bias))
        largest = tf.raw_ops.MaxPool(input=active, **window)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            with tf.name_scope(f"gradient_tape/{scope}/"):
                upstream = tf.raw_ops.ReluGrad(gradients=upstream, features=largest)
                placed = tf.raw_ops.MaxPoolGrad(
                    orig_input=active, orig_output=largest, grad=upstream, **window
                )
                return placed, tf.raw_ops.BiasAddGrad(out_backprop=upstream)

        return largest, gradient

    return pooled(x, bias)


def cast(x: Any, layer: keras.layers.Layer) -> tf.Tensor:
    """In the type that the layer computes in: with mixed precision not that of its weights."""
    return tf.cast(tf.convert_to_tensor(x), layer.compute_dtype)
