"""What the forward passes must know of each kind of layer. Any other layer is called as Keras does.

To add a kind, register a `LayerRule` for it here. A layer that is derived from a known one is
another kind: its own `call` may do anything.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import keras
import tensorflow as tf

from tfloop.models.normalization import batch_norm
from tfloop.randomness import Key

Size = tuple[int, int]  # (height, width)


class LayerRule(NamedTuple):
    """How a kind of layer is computed.

    Attributes:
      by_example: does each row of the batch go through on its own, so that parts of the batch can
        be computed apart? In evaluation alone, say, where in training it looks at the whole batch.
      over_parts: (layer, parts, mask, activation) → parts; stands in for the layer in training,
        and a ReLU behind it, over all parts of the batch.
      draw: (layer, x, key) → x; stands in for the layer in training, with random numbers that
        depend on the position in the data alone.
      stands_in: layer → do `by_example`, `over_parts` and `draw` count for it?
      used: (layer, size of its output that is used) → size of its input that is used; None where
        all of it is.
    """

    by_example: Literal["always", "evaluation", "never"] = "never"
    over_parts: Callable | None = None
    draw: Callable | None = None
    stands_in: Callable[[keras.layers.Layer], bool] = lambda layer: True
    used: Callable[[keras.layers.Layer, Size], Size | None] | None = None


LAYER_RULES: dict[type, LayerRule] = {}
# Layers that may be the activation of another, element by element.
BY_ELEMENT = (keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.ELU)


def register(kind: type, rule: LayerRule) -> None:
    """Let the forward passes treat layers of exactly this class by `rule`."""
    LAYER_RULES[kind] = rule


def rule_of(layer: Any) -> LayerRule:
    return LAYER_RULES.get(type(layer), LayerRule())


def is_by_example(layer: Any, training: bool) -> bool:
    """Does each row of the batch go through the layer on its own?

    Not where the layer has a loss of its own, which is that of the whole batch.
    """
    if not goes_by_pixel(layer):
        return False
    rule = rule_of(layer)
    is_here = rule.by_example == "always" and rule.stands_in(layer)
    return is_here or (rule.by_example == "evaluation" and not training)


def goes_by_pixel(layer: Any) -> bool:
    """Is each place computed from its own channels alone, after the layer's own operation?

    Not where the layer has a loss of its own, or an activation that is not known to be such.
    """
    activation = getattr(layer, "activation", None)
    is_known = activation is None or type(activation) in BY_ELEMENT
    if not is_known and inspect.isfunction(activation):
        is_known = activation.__module__.startswith("keras.")
    return is_known and getattr(layer, "activity_regularizer", None) is None


def draw_of(layer: Any) -> Callable | None:
    """The function that draws in place of the layer, where there is one."""
    rule = rule_of(layer)
    return rule.draw if rule.draw and rule.stands_in(layer) else None


def over_parts_of(layer: Any) -> Callable | None:
    """The function of all parts of the batch that stands in for the layer, where there is one."""
    rule = rule_of(layer)
    return rule.over_parts if rule.over_parts and rule.stands_in(layer) else None


def is_plain_convolution(layer: Any) -> bool:
    """Is it a convolution without strides, dilation or groups, over channels that come last?"""
    return (
        type(layer) is keras.layers.Conv2D
        and layer.strides == (1, 1)
        and layer.dilation_rate == (1, 1)
        and layer.groups == 1
        and layer.data_format == "channels_last"
    )


def _drop(layer: keras.layers.Dropout, x: tf.Tensor, key: Key) -> tf.Tensor:
    """x / (1 - rate), or 0 for the share `rate` of all units."""
    kept = key.uniform(x.shape) >= layer.rate
    return tf.where(kept, x / tf.cast(1.0 - layer.rate, x.dtype), tf.zeros_like(x))


def _used_by_convolution(layer: keras.layers.Conv2D, used: Size) -> Size | None:
    if not is_plain_convolution(layer) or layer.padding != "valid":
        return None
    height, width = layer.kernel_size
    return used[0] + height - 1, used[1] + width - 1


def _used_by_pool(layer: keras.layers.MaxPooling2D, used: Size) -> Size | None:
    if layer.padding != "valid" or layer.strides != layer.pool_size:
        return None
    height, width = layer.pool_size
    return used[0] * height, used[1] * width


def _is_not_over_rows(layer: Any) -> bool:
    """Are all axes that it looks along, or puts side by side, others than that of the rows?"""
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    return all(axis == -1 or axis > 0 for axis in axes)


def _draws_nothing(layer: keras.layers.MultiHeadAttention) -> bool:
    return not layer.dropout and layer._activity_regularizer is None


_layers, _numpy, _nn = keras.layers, keras.src.ops.numpy, keras.src.ops.nn
for _kind in (
    _layers.Dense,
    _layers.Flatten,
    _layers.Reshape,
    _layers.Permute,
    _layers.RepeatVector,
    _layers.Identity,
    _layers.Rescaling,
    _layers.Embedding,
    _layers.ReLU,
    _layers.LeakyReLU,
    _layers.ELU,
    _layers.PReLU,
    _layers.Conv1D,
    _layers.Conv3D,
    _layers.Conv1DTranspose,
    _layers.Conv2DTranspose,
    _layers.Conv3DTranspose,
    _layers.DepthwiseConv1D,
    _layers.DepthwiseConv2D,
    _layers.SeparableConv1D,
    _layers.SeparableConv2D,
    _layers.MaxPooling1D,
    _layers.MaxPooling3D,
    _layers.AveragePooling1D,
    _layers.AveragePooling2D,
    _layers.AveragePooling3D,
    _layers.GlobalMaxPooling1D,
    _layers.GlobalMaxPooling2D,
    _layers.GlobalMaxPooling3D,
    _layers.GlobalAveragePooling1D,
    _layers.GlobalAveragePooling2D,
    _layers.GlobalAveragePooling3D,
    _layers.ZeroPadding1D,
    _layers.ZeroPadding2D,
    _layers.ZeroPadding3D,
    _layers.Cropping1D,
    _layers.Cropping2D,
    _layers.Cropping3D,
    _layers.UpSampling1D,
    _layers.UpSampling2D,
    _layers.UpSampling3D,
    _layers.GroupNormalization,
    _layers.Add,
    _layers.Subtract,
    _layers.Multiply,
    _layers.Average,
    _layers.Maximum,
    _layers.Minimum,
    # Python's operators and keras.ops, in a functional model.
    _numpy.Add,
    _numpy.Subtract,
    _numpy.Multiply,
    _numpy.Divide,
    _numpy.TrueDivide,
    _numpy.Maximum,
    _numpy.Minimum,
    _numpy.Negative,
    _numpy.Absolute,
    _numpy.Square,
    _numpy.Sqrt,
    _numpy.Exp,
    _numpy.Log,
    _numpy.Tanh,
    _nn.Relu,
    _nn.Relu6,
    _nn.LeakyRelu,
    _nn.Elu,
    _nn.Gelu,
    _nn.Silu,
    _nn.Sigmoid,
):
    register(_kind, LayerRule("always"))
for _kind in (
    _layers.Concatenate,
    _layers.Softmax,
    _layers.LayerNormalization,
    _layers.RMSNormalization,
    _layers.UnitNormalization,
):
    register(_kind, LayerRule("always", stands_in=_is_not_over_rows))
# Recurrent layers stay whole: each is a loop, and one costs less than one for each part.
register(_layers.MultiHeadAttention, LayerRule("always", stands_in=_draws_nothing))
register(_layers.Activation, LayerRule("always", used=lambda layer, used: used))
register(_layers.Conv2D, LayerRule("always", used=_used_by_convolution))
register(_layers.MaxPooling2D, LayerRule("always", used=_used_by_pool))
register(
    _layers.Dropout,
    LayerRule(
        "evaluation",
        draw=_drop,
        stands_in=lambda layer: layer.noise_shape is None and layer.rate < 1,
    ),
)
register(  # one that is frozen goes by its averages
    _layers.BatchNormalization,
    LayerRule(
        "evaluation",
        over_parts=batch_norm,
        stands_in=lambda layer: layer.trainable and not layer.renorm,
    ),
)
