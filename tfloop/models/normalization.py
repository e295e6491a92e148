"""Batch normalisation in training, over all rows of a batch.

The rows may lie in one part, in several, or on replicas.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from tfloop.models.variables import as_tf_variable

# What may follow a normalisation at no cost, and its gradient from what it gives.
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "": (tf.identity, lambda dy, y: dy),
    "relu": (tf.nn.relu, lambda dy, y: tf.raw_ops.ReluGrad(gradients=dy, features=y)),
    "relu6": (tf.nn.relu6, lambda dy, y: tf.raw_ops.Relu6Grad(gradients=dy, features=y)),
}


def batch_norm(
    layer: keras.layers.BatchNormalization,
    parts: list[tf.Tensor],
    mask: tf.Tensor | None = None,
    activation: str = "",
) -> list[tf.Tensor]:
    """The layer in training, over all parts of a batch; moves its averages.

    Args:
      layer: Keras's own.
      parts: each [rows, …, channels], or with the channels where `layer.axis` says.
      mask: [rows of all parts, …] bool, as Keras's: the places that count; None for all.
      activation: of ACTIVATIONS, what is done with the result.
    """
    axis = layer.axis % len(parts[0].shape)
    is_last = axis == len(parts[0].shape) - 1
    gamma, beta = _own(layer.gamma), _own(layer.beta)
    parts = [tf.cast(part, layer.compute_dtype) for part in parts]
    # The fused operation knows images alone, no float64, and the rows of one replica.
    is_image = len(parts[0].shape) == 4 and is_last and parts[0].dtype != tf.float64
    if is_image and mask is None and layer.scale and layer.center and _replicas() == 1:
        gamma, beta = tf.cast(gamma, tf.float32), tf.cast(beta, tf.float32)
        ys, mean, variance = _by_fused(parts, gamma, beta, layer.epsilon, activation)
    else:
        ys, mean, variance = _by_moments(layer, parts, mask, axis)
        ys = [ACTIVATIONS[activation][0](y) for y in ys]
    share = 1.0 - layer.momentum
    for average, value in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        average = as_tf_variable(average)
        average.assign(average * (1.0 - share) + tf.cast(value, average.dtype) * share)
    return ys


def _own(variable: keras.Variable | None) -> tf.Tensor | None:
    return None if variable is None else tf.convert_to_tensor(as_tf_variable(variable))


def _join(parts: list[tf.Tensor]) -> tf.Tensor:
    return tf.concat(parts, axis=0) if len(parts) > 1 else parts[0]


def cut(x: tf.Tensor, sizes: list[int]) -> list[tf.Tensor]:
    """The parts of x along its rows."""
    return apart(tf.split(x, sizes))


def apart(parts: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The parts, each the output of an operation of its own.

    TensorFlow's graph optimizer swaps a maximum with the monotone operation before it (the stage
    OptimizeMaxOrMinOfMonotonic), and takes the first output of the operation before both, whichever
    was meant: max-pool(relu(second half)) becomes that of the first half.
    """
    return [tf.ensure_shape(part, part.shape) for part in parts]


def _split(x: tf.Tensor, like: list[tf.Tensor]) -> list[tf.Tensor]:
    return cut(x, [part.shape[0] for part in like]) if len(like) > 1 else [x]


def _by_fused(
    parts: list[tf.Tensor], gamma: tf.Tensor, beta: tf.Tensor, epsilon: float, activation: str
) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
    """(the parts normalised, mean, variance), by TensorFlow's fused operations for images."""
    if len(parts) > 1 and parts[0].dtype == tf.float32:
        *ys, mean, variance = _normalized(parts, gamma, beta, epsilon, activation)
        return apart(ys), mean, variance
    y, mean, variance = _fused(_join(parts), gamma, beta, epsilon)
    return _split(ACTIVATIONS[activation][0](y), parts), mean, variance


def _by_moments(
    layer: keras.layers.BatchNormalization,
    parts: list[tf.Tensor],
    mask: tf.Tensor | None,
    axis: int,
) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
    """(the parts normalised, mean, variance), of any shape, over the rows of all replicas.

    Sums over the places that count, divided by their number n; behind a mask by n + epsilon, as
    Keras has it.
    """
    x = _join(parts)
    wide = tf.cast(x, tf.float32) if x.dtype in (tf.float16, tf.bfloat16) else x
    axes = [i for i in range(len(x.shape)) if i != axis]
    rows = tf.cast(tf.shape(x)[0], wide.dtype)

    def total(values: tf.Tensor) -> tf.Tensor:
        return _over_replicas(tf.reduce_sum(values, axis=axes, keepdims=True), rows)

    if mask is None:
        w = tf.ones([], wide.dtype)
        places = tf.size(x, out_type=tf.int64) // x.shape[axis]
        n = _over_replicas(tf.cast(places, wide.dtype), rows)
    else:
        w = tf.cast(tf.expand_dims(mask, -1), wide.dtype)
        n = total(w * tf.ones_like(wide)) + keras.config.epsilon()
    mean = total(w * wide) / n
    variance = total(w * tf.square(wide - mean)) / n
    shape = [-1 if i == axis else 1 for i in range(len(x.shape))]
    gamma, beta = (
        None if v is None else tf.reshape(tf.cast(v, wide.dtype), shape)
        for v in (_own(layer.gamma), _own(layer.beta))
    )
    y = tf.nn.batch_normalization(wide, mean, variance, beta, gamma, layer.epsilon)
    y = _split(tf.cast(y, x.dtype), parts)
    return y, tf.reshape(mean, [-1]), tf.reshape(variance, [-1])


def _fused(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(x normalised, its mean, its variance), over all axes but the last."""
    y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
        x, gamma, beta, epsilon=epsilon, is_training=True
    )
    n = tf.cast(tf.size(x) / x.shape[-1], tf.float32)
    # The operation returns the unbiased variance; Keras keeps the biased one.
    return y, mean, variance * (n - 1.0) / n


def _normalized(
    parts: list[tf.Tensor],
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
    activation: str,
) -> tuple[tf.Tensor, ...]:
    """(*parts normalised by the mean and variance of them all, mean, variance).

    Each part is computed on its own, but for the sums. With n places in all, s = 1 / √(variance +
    epsilon) and x̂ = (x - mean) · s: y = activation(gamma · x̂ + beta), dbeta = Σ dy,
    dgamma = Σ dy · x̂ and dx = gamma · s · (dy - (x̂ · dgamma + dbeta) / n), with dy behind the
    activation (Ioffe and Szegedy, arXiv:1502.03167).

    What multiplies and adds by channel is a depthwise convolution of 1×1 with its bias: it runs in
    half the time of the normalisation with constants, and takes the activation in.
    """
    counts = [math.prod(part.shape[:-1]) for part in parts]
    n = float(sum(counts))
    activate, back_through = ACTIVATIONS[activation]
    scope = "" if tf.executing_eagerly() else tf.compat.v1.get_default_graph().get_name_scope()

    @tf.custom_gradient
    def normalize(gamma: tf.Tensor, beta: tf.Tensor, *parts: tf.Tensor) -> tuple[tuple, Callable]:
        mean, variance = _moments(parts, counts)
        s = tf.math.rsqrt(variance + epsilon)
        ys = [activate(_scaled(part, gamma * s, beta - mean * gamma * s)) for part in parts]

        def back(*upstream: tf.Tensor) -> tuple:
            with tf.name_scope(f"gradient_tape/{scope}/"):
                return gradients_of(*upstream)

        def gradients_of(*upstream: tf.Tensor) -> tuple:
            # As if mean and variance were constants.
            gradients = [
                tf.raw_ops.FusedBatchNormGradV3(
                    y_backprop=back_through(dy, y),
                    x=part,
                    scale=gamma,
                    reserve_space_1=mean,
                    reserve_space_2=variance,
                    reserve_space_3=[],
                    epsilon=epsilon,
                    is_training=False,
                )
                for dy, y, part in zip(upstream[: len(parts)], ys, parts, strict=True)
            ]
            dgamma = tf.add_n([gradient.scale_backprop for gradient in gradients])
            dbeta = tf.add_n([gradient.offset_backprop for gradient in gradients])
            slope = gamma * s / n * dgamma * s
            shift = gamma * s / n * dbeta - slope * mean
            dx = [
                gradient.x_backprop - _scaled(part, slope, shift)
                for gradient, part in zip(gradients, parts, strict=True)
            ]
            return dgamma, dbeta, *dx

        return (*ys, mean, variance), back

    return normalize(gamma, beta, *parts)


def _scaled(x: tf.Tensor, factor: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """factor · x + shift, by channel, of [rows, height, width, channels]."""
    kernel = tf.reshape(factor, [1, 1, -1, 1])
    return tf.nn.bias_add(tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "VALID"), shift)


# A mean of so many standard deviations, squared: with more, Σ x² / n - mean² loses too many digits.
FAR_FROM_ZERO = 25.0


def _moments(parts: Sequence[tf.Tensor], counts: list[int]) -> tuple[tf.Tensor, tf.Tensor]:
    """(mean, variance) of all parts by channel, each of which has so many places.

    variance = Σ x² / n - mean², from one look at each part. Where some channel's mean is far from
    zero, that would leave few digits: then each part's own mean m and variance v are taken in two
    looks, and variance = Σ k · (v + (m - mean)²) / n, with its k places.
    """
    n, channels = float(sum(counts)), parts[0].shape[-1]
    means = []
    for part, k in zip(parts, counts, strict=True):
        ones = tf.fill([1, k], 1.0)
        total = tf.matmul(ones, tf.reshape(part, [k, channels]))
        means.append(tf.reshape(total, [channels]) / k)
    mean = tf.add_n([k / n * m for k, m in zip(counts, means, strict=True)])
    # The gradient of a depthwise convolution of 1×1 by its kernel is Σ x · dy: here dy is x.
    squares = [
        tf.nn.depthwise_conv2d_backprop_filter(part, [1, 1, channels, 1], part, [1] * 4, "VALID")
        for part in parts
    ]
    mean_square = tf.reshape(tf.add_n(squares), [channels]) / n
    quick = mean_square - tf.square(mean)

    def in_two_looks() -> tf.Tensor:
        variances = [
            tf.reduce_mean(tf.math.squared_difference(part, m), axis=[0, 1, 2])
            for part, m in zip(parts, means, strict=True)
        ]
        within = zip(counts, means, variances, strict=True)
        each = [k / n * (v + tf.square(m - mean)) for k, m, v in within]
        # No add_n in a branch: TensorFlow's memory optimizer breaks one that is not taken.
        return tf.reduce_sum(tf.stack(each), axis=0)

    is_near = tf.reduce_all(tf.square(mean) <= FAR_FROM_ZERO * quick)
    return mean, tf.cond(is_near, lambda: quick, in_two_looks)


_here = threading.local()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In this block, and in this thread, a replica looks at its own rows only."""
    _here.alone = True
    try:
        yield
    finally:
        _here.alone = False


@contextlib.contextmanager
def counting(examples: tf.Tensor) -> Iterator[None]:
    """In this block, and in this thread, a replica's rows count as so many examples in the loss."""
    _here.examples = examples
    try:
        yield
    finally:
        _here.examples = None


def _replicas() -> int:
    if getattr(_here, "alone", False):
        return 1
    context = tf.distribute.get_replica_context()
    return context.num_replicas_in_sync if context else 1


def _over_replicas(x: tf.Tensor, examples: tf.Tensor) -> tf.Tensor:
    """The sum of x over all replicas.

    On the way back each replica's gradient counts by its share of the examples, as its loss does
    in the whole.
    """
    if _replicas() == 1:
        return x
    counted = getattr(_here, "examples", None)
    examples = examples if counted is None else tf.cast(counted, examples.dtype)

    @tf.custom_gradient
    def add_up(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        def total(x: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, x)

        return total(x), lambda dy: tf.math.divide_no_nan(total(dy * examples), examples)

    return add_up(x)
