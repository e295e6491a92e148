"""Batch normalisation in training, over the rows of a batch that count, whether they lie in one part, in several or on replicas."""

import math

import keras
import tensorflow as tf


def normalizes(layer, weights, training: bool) -> bool:
    """Does `batch_norm` stand in for this layer? Not for one that is frozen and goes by its averages, nor for one derived from it."""
    return training and weights is not None and type(layer) is keras.layers.BatchNormalization and layer.trainable


def batch_norm(layer: keras.layers.BatchNormalization, parts: list[tf.Tensor], weights: tf.Tensor) -> list[tf.Tensor]:
    """The layer in training, over the rows with weight 1 of all parts [rows, …, channels] of a batch; moves its averages.

    A full batch goes through TensorFlow's fused operations; one that is filled up, the last of an epoch, through
    weighted moments.
    """
    axes, sizes = list(range(len(parts[0].shape) - 1)), [part.shape[0] for part in parts]
    join = lambda parts: tf.concat(parts, axis=0) if len(parts) > 1 else parts[0]
    split = lambda x: tf.split(x, sizes) if len(sizes) > 1 else [x]
    if layer.axis not in (-1, len(axes)):
        x, mask = join(parts), tf.reshape(weights > 0, [-1] + [1] * (len(axes) - 1))
        x = layer(x, training=True, mask=tf.broadcast_to(mask, tf.shape(x)[:-1]))
        return split(tf.identity(x))  # without the mask, which Keras would hand on to layers that take none
    gamma, beta = (None if number is None else tf.convert_to_tensor(number) for number in (layer.gamma, layer.beta))
    parts, places = [tf.cast(part, layer.compute_dtype) for part in parts], math.prod(parts[0].shape[1:-1])
    here, replicas = tf.reduce_sum(weights), _replicas()
    examples = _over_replicas(here, here)

    def full():
        if len(parts) > 1 and parts[0].dtype == tf.float32:
            return _normalized(parts, gamma, beta, layer.epsilon)
        y, mean, variance = _fused(join(parts), gamma, beta, layer.epsilon)
        return *split(y), mean, variance

    def filled_up():
        x = join(parts)
        w = tf.reshape(weights, [-1] + [1] * len(axes))
        wide = tf.cast(x, w.dtype)
        n = places * tf.maximum(examples, 1.0)
        mean = _over_replicas(tf.reduce_sum(w * wide, axis=axes), here) / n
        variance = _over_replicas(tf.reduce_sum(w * tf.square(wide - mean), axis=axes), here) / n
        y = tf.cast(tf.nn.batch_normalization(wide, mean, variance, beta, gamma, layer.epsilon), x.dtype)
        return *split(y), mean, variance

    # The fused operation knows images alone, no float64, and the examples of one replica.
    fused = len(axes) == 3 and layer.scale and layer.center and parts[0].dtype != tf.float64 and replicas == 1
    *ys, mean, variance = tf.cond(tf.reduce_all(weights > 0), full, filled_up) if fused else filled_up()
    new = (1.0 - layer.momentum) * tf.cast(examples > 0, mean.dtype)  # a part of a batch that is all filling moves nothing
    for average, value in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        average.assign(average * (1.0 - new) + value * new)
    return ys


def _fused(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(x normalised, its mean, its variance), over all axes but the last."""
    y, mean, variance = tf.compat.v1.nn.fused_batch_norm(x, gamma, beta, epsilon=epsilon, is_training=True)
    n = tf.cast(tf.size(x) / x.shape[-1], tf.float32)
    return y, mean, variance * (n - 1.0) / n  # it returns the unbiased one; Keras keeps the biased one


def _normalized(parts: list[tf.Tensor], gamma: tf.Tensor, beta: tf.Tensor, epsilon: float) -> tuple[tf.Tensor, ...]:
    """(*parts normalised by the mean and variance of them all, mean, variance), each part on its own but for the sums.

    With n places in all, of which a part has k and the mean m and variance v: mean = Σ k·m / n, and
    variance = Σ k·(v + (m - mean)²) / n. With x̂ = (x - mean) · s, s = 1 / √(variance + epsilon) and y = gamma · x̂ + beta:
    dx = gamma · s · (dy - (x̂ · dgamma + dbeta) / n), dbeta = Σ dy, dgamma = Σ dy · x̂ (Ioffe and Szegedy, arXiv:1502.03167).
    """
    counts = [math.prod(part.shape[:-1]) for part in parts]
    n = float(sum(counts))

    @tf.custom_gradient
    def normalize(gamma, beta, *parts):
        moments = [_fused(part, gamma, beta, epsilon)[1:] for part in parts]  # the quickest way to them, though it also normalises
        mean = tf.add_n([k / n * m for k, (m, _) in zip(counts, moments)])
        variance = tf.add_n([k / n * (v + tf.square(m - mean)) for k, (m, v) in zip(counts, moments)])
        scaled = lambda part, gamma, beta: tf.compat.v1.nn.fused_batch_norm(part, gamma, beta, mean, variance, epsilon, is_training=False)[0]

        def back(*upstream):
            found = [tf.raw_ops.FusedBatchNormGradV3(  # as if mean and variance were constants
                y_backprop=dy, x=part, scale=gamma, reserve_space_1=mean, reserve_space_2=variance, reserve_space_3=[],
                epsilon=epsilon, is_training=False) for dy, part in zip(upstream, parts)]
            dgamma, dbeta = (tf.add_n([getattr(each, name) for each in found]) for name in ("scale_backprop", "offset_backprop"))
            share = gamma * tf.math.rsqrt(variance + epsilon) / n
            return dgamma, dbeta, *(each.x_backprop - scaled(part, share * dgamma, share * dbeta) for each, part in zip(found, parts))

        return (*(scaled(part, gamma, beta) for part in parts), mean, variance), back

    return normalize(gamma, beta, *parts)


def _replicas() -> int:
    context = tf.distribute.get_replica_context()
    return context.num_replicas_in_sync if context else 1


def _over_replicas(x: tf.Tensor, examples: tf.Tensor) -> tf.Tensor:
    """The sum of x over all replicas. On the way back each replica's gradient counts by its share of the examples, as its
    loss does in the whole."""
    if _replicas() == 1:
        return x

    @tf.custom_gradient
    def add_up(x):
        total = lambda x: tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, x)
        return total(x), lambda dy: tf.math.divide_no_nan(total(dy * examples), examples)

    return add_up(x)
