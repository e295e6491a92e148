"""Batch normalisation in training, over the rows of a batch that count.

The rows may lie in one part, in several, or on replicas.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


def batch_norm(
    layer: keras.layers.BatchNormalization, parts: list[tf.Tensor], sample_weight: tf.Tensor
) -> list[tf.Tensor]:
    """The layer in training, over all parts of a batch; moves its averages.

    A full batch goes through TensorFlow's fused operations; one that is filled up, the last of an
    epoch, through weighted moments.

    Args:
      layer: Keras's own.
      parts: each [rows, …, channels].
      sample_weight: [rows of all parts], 1 for the rows that count and 0 for the others.
    """
    axes, sizes = list(range(len(parts[0].shape) - 1)), [part.shape[0] for part in parts]

    def join(parts: list[tf.Tensor]) -> tf.Tensor:
        return tf.concat(parts, axis=0) if len(parts) > 1 else parts[0]

    def split(x: tf.Tensor) -> list[tf.Tensor]:
        return tf.split(x, sizes) if len(sizes) > 1 else [x]

    if layer.axis not in (-1, len(axes)):
        return split(_by_keras(layer, join(parts), sample_weight))
    gamma, beta = _as_tensor(layer.gamma), _as_tensor(layer.beta)
    parts = [tf.cast(part, layer.compute_dtype) for part in parts]
    places = math.prod(parts[0].shape[1:-1])
    examples_here, replicas = tf.reduce_sum(sample_weight), _replicas()
    examples = _over_replicas(examples_here, examples_here)

    def full() -> tuple:
        if len(parts) > 1 and parts[0].dtype == tf.float32:
            return _normalized(parts, gamma, beta, layer.epsilon)
        y, mean, variance = _fused(join(parts), gamma, beta, layer.epsilon)
        return *split(y), mean, variance

    def filled_up() -> tuple:
        x = join(parts)
        w = tf.reshape(sample_weight, [-1] + [1] * len(axes))
        wide = tf.cast(x, w.dtype)
        n = places * tf.maximum(examples, 1.0)
        mean = _over_replicas(tf.reduce_sum(w * wide, axis=axes), examples_here) / n
        squares = w * tf.square(wide - mean)
        variance = _over_replicas(tf.reduce_sum(squares, axis=axes), examples_here) / n
        y = tf.nn.batch_normalization(wide, mean, variance, beta, gamma, layer.epsilon)
        return *split(tf.cast(y, x.dtype)), mean, variance

    # The fused operation knows images alone, no float64, and the examples of one replica.
    is_image = len(axes) == 3 and parts[0].dtype != tf.float64
    if is_image and layer.scale and layer.center and replicas == 1:
        *ys, mean, variance = tf.cond(tf.reduce_all(sample_weight > 0), full, filled_up)
    else:
        *ys, mean, variance = filled_up()
    # A part of a batch that is all filling moves nothing.
    share = (1.0 - layer.momentum) * tf.cast(examples > 0, mean.dtype)
    for average, value in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        average.assign(average * (1.0 - share) + value * share)
    return ys


def _by_keras(
    layer: keras.layers.BatchNormalization, x: tf.Tensor, sample_weight: tf.Tensor
) -> tf.Tensor:
    """Keras's own, over another axis than the last."""
    mask = tf.reshape(sample_weight > 0, [-1] + [1] * (len(x.shape) - 2))
    x = layer(x, training=True, mask=tf.broadcast_to(mask, tf.shape(x)[:-1]))
    # Without the mask, which Keras would hand on to layers that take none.
    return tf.identity(x)


def _as_tensor(variable: Any) -> tf.Tensor | None:
    return None if variable is None else tf.convert_to_tensor(variable)


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
    parts: list[tf.Tensor], gamma: tf.Tensor, beta: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, ...]:
    """(*parts normalised by the mean and variance of them all, mean, variance).

    Each part is computed on its own, but for the sums. With n places in all, of which a part has k
    and the mean m and variance v: mean = Σ k·m / n, and variance = Σ k·(v + (m - mean)²) / n. With
    x̂ = (x - mean) · s, s = 1 / √(variance + epsilon) and y = gamma · x̂ + beta:
    dx = gamma · s · (dy - (x̂ · dgamma + dbeta) / n), dbeta = Σ dy, dgamma = Σ dy · x̂ (Ioffe and
    Szegedy, arXiv:1502.03167).
    """
    counts = [math.prod(part.shape[:-1]) for part in parts]
    n = float(sum(counts))

    @tf.custom_gradient
    def normalize(gamma: tf.Tensor, beta: tf.Tensor, *parts: tf.Tensor) -> tuple[tuple, Callable]:
        # The quickest way to the moments, though it also normalises.
        moments = [_fused(part, gamma, beta, epsilon)[1:] for part in parts]
        counted = list(zip(counts, moments, strict=True))
        mean = tf.add_n([k / n * m for k, (m, _) in counted])
        variance = tf.add_n([k / n * (v + tf.square(m - mean)) for k, (m, v) in counted])

        def scaled(part: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
            return tf.compat.v1.nn.fused_batch_norm(
                part, gamma, beta, mean, variance, epsilon, is_training=False
            )[0]

        def back(*upstream: tf.Tensor) -> tuple:
            # As if mean and variance were constants.
            gradients = [
                tf.raw_ops.FusedBatchNormGradV3(
                    y_backprop=dy,
                    x=part,
                    scale=gamma,
                    reserve_space_1=mean,
                    reserve_space_2=variance,
                    reserve_space_3=[],
                    epsilon=epsilon,
                    is_training=False,
                )
                for dy, part in zip(upstream[: len(parts)], parts, strict=True)
            ]
            dgamma = tf.add_n([gradient.scale_backprop for gradient in gradients])
            dbeta = tf.add_n([gradient.offset_backprop for gradient in gradients])
            share = gamma * tf.math.rsqrt(variance + epsilon) / n
            dx = [
                gradient.x_backprop - scaled(part, share * dgamma, share * dbeta)
                for gradient, part in zip(gradients, parts, strict=True)
            ]
            return dgamma, dbeta, *dx

        return (*(scaled(part, gamma, beta) for part in parts), mean, variance), back

    return normalize(gamma, beta, *parts)


def _replicas() -> int:
    context = tf.distribute.get_replica_context()
    return context.num_replicas_in_sync if context else 1


def _over_replicas(x: tf.Tensor, examples: tf.Tensor) -> tf.Tensor:
    """The sum of x over all replicas.

    On the way back each replica's gradient counts by its share of the examples, as its loss does
    in the whole.
    """
    if _replicas() == 1:
        return x

    @tf.custom_gradient
    def add_up(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        def total(x: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, x)

        return total(x), lambda dy: tf.math.divide_no_nan(total(dy * examples), examples)

    return add_up(x)
