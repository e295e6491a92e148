"""The losses that follow from the targets: pure functions of targets and outputs, by example."""

import tensorflow as tf


def cross_entropy(
    labels: tf.Tensor, logits: tf.Tensor, smoothing: tf.Tensor | float, sigmoid: bool = False
) -> tf.Tensor:
    """[batch]: the cross-entropy of each example; of several places the mean over them.

    Softmax: -Σ_k t_k · log p_k. Sigmoid: the mean over k of the binary cross-entropy, as Keras has
    it. The target t is one-hot, smoothed to (1 - s) · t + s / classes, or with sigmoid to
    (1 - s) · t + s / 2.

    Args:
      labels: class numbers [batch, …] int64, or shares [batch, …, classes] of any float type.
      logits: [batch, …, classes].
      smoothing: s, the share of each label spread over all classes.
      sigmoid: one sigmoid for each class, in place of a softmax over all.
    """
    classes = logits.shape[-1]
    if len(labels.shape) == len(logits.shape):
        shares = tf.cast(labels, logits.dtype)
    else:
        shares = tf.one_hot(labels, classes, dtype=logits.dtype)
    targets = shares * (1.0 - smoothing)
    if sigmoid:
        targets = targets + smoothing / 2.0
        binary = tf.nn.sigmoid_cross_entropy_with_logits(targets, logits)
        return over_places(tf.reduce_mean(binary, axis=-1))
    smoothed = targets + smoothing / classes
    return over_places(tf.nn.softmax_cross_entropy_with_logits(smoothed, logits))


def binary_cross_entropy(
    labels: tf.Tensor, logits: tf.Tensor, smoothing: tf.Tensor | float
) -> tf.Tensor:
    """[batch]: the mean over the columns of -t · log p - (1 - t) · log(1 - p), t smoothed as above.

    Args:
      labels: 0 and 1, of the shape of the logits, or without their last axis of 1.
      logits: [batch, …].
      smoothing: s.
    """
    targets = tf.cast(tf.reshape(labels, tf.shape(logits)), logits.dtype)
    smoothed = targets * (1.0 - smoothing) + smoothing / 2.0
    return over_places(tf.nn.sigmoid_cross_entropy_with_logits(smoothed, logits))


def squared_error(targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """[batch]: the mean over the columns of (t - y)².

    Args:
      targets: of the shape of the outputs, or one of them with a last axis of 1 more.
      outputs: [batch, …].
    """
    wanted = tf.cast(tf.reshape(targets, tf.shape(outputs)), outputs.dtype)
    return over_places(tf.square(wanted - outputs))


def over_places(values: tf.Tensor) -> tf.Tensor:
    """[batch]: the mean of [batch, …] over all axes but the first."""
    axes = range(1, len(values.shape))
    return tf.reduce_mean(values, axis=list(axes)) if axes else values
