"""Randomness as a pure function of the position in the data: there is no generator, so there is nothing to save.

TensorFlow and XLA give the same bits, those of Philox, and make other floats of them; so floats are made here.
"""

from typing import NamedTuple

import tensorflow as tf


class Key(NamedTuple):
    """The seed of one step's randomness, and the part of the batch that it is for.

    What is drawn for a part of a batch is that part of what is drawn for the whole, so it does not matter into how many
    parts, on however many devices, a batch is cut.
    """

    seed: tf.Tensor  # int64 [2]
    part: tf.Tensor | int = 0
    parts: int = 1
    numbers: tuple = ()  # folded into the seed when something is drawn: most steps draw nothing

    def fold_in(self, *numbers) -> "Key":
        """A new key from this one and some whole numbers."""
        return self._replace(numbers=(*self.numbers, *numbers))

    def uniform(self, shape, low=0.0, high=1.0) -> tf.Tensor:
        """float32, uniform in [low, high), for the rows of this part: `shape` is static and begins with their number."""
        rows, *rest = shape
        seed = fold_in(self.seed, *self.numbers)
        bits = tf.random.stateless_uniform([self.parts * rows, *rest], seed, None, None, tf.int32, alg="philox")
        mantissa = tf.bitwise.bitwise_and(bits, 0x7FFFFF)
        unit = tf.bitcast(tf.bitwise.bitwise_or(mantissa, 0x3F800000), tf.float32) - 1.0  # 1.mantissa in binary, less 1
        whole = unit * (high - low) + low
        return tf.slice(whole, [self.part * rows] + [0] * len(rest), shape) if self.parts > 1 else whole


def seed_of(number, use: int) -> tf.Tensor:
    """An int64 [2] seed from a whole number and what it is used for."""
    return tf.stack([_bits32(number), tf.constant(use, tf.int64)])


def fold_in(seed, *numbers) -> tf.Tensor:
    """A new int64 [2] seed from a seed and some whole numbers, all of which count by their last 32 bits.

    As tf.random.experimental.stateless_fold_in; but its int32 numbers are kept in the host's memory, beside a GPU.
    """
    for number in numbers:
        drawn = tf.random.stateless_uniform([], seed, None, None, tf.int32, alg="philox")
        seed = tf.stack([tf.cast(drawn, tf.int64), _bits32(number)])
    return seed


def _bits32(number) -> tf.Tensor:
    return tf.cast(tf.cast(number, tf.int32), tf.int64)
