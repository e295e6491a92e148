"""Penalties on kernels. A penalty is any function `kernel → scalar`; these are the usual two.

The loss is written out in the step: total = data + l1 · Σ|w| + l2 · Σw², in the convention of
Keras's regularizers (no factor ½). `l1` and `l2` are variables of the state; biases are never
counted.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf


def l1(kernel: tf.Tensor) -> tf.Tensor:
    """Σ|w|. Its gradient is sign(w), 0 at 0."""
    return _absolute(tf.convert_to_tensor(kernel))


@tf.custom_gradient
def _absolute(w: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        return upstream * tf.sign(w)  # two operations in place of five

    return tf.reduce_sum(tf.abs(w)), gradient


def l2(kernel: tf.Tensor) -> tf.Tensor:
    """Σw². Its gradient is 2w."""
    # One operation, and one for its gradient, where square and sum are five.
    return 2.0 * tf.nn.l2_loss(kernel)


def total(penalty: Callable[[tf.Tensor], tf.Tensor], kernels: Sequence) -> tf.Tensor:
    """The penalty summed over kernels; 0 where there are none."""
    if not kernels:
        return tf.constant(0.0)
    return tf.reduce_sum(tf.stack([tf.cast(penalty(kernel), tf.float32) for kernel in kernels]))
