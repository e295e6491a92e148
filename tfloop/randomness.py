"""Randomness as a pure function of the position in the data.

There is no generator, so there is nothing to save. TensorFlow and XLA give the same bits, those of
Philox, and make other floats of them; so floats are made here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf


class Key(NamedTuple):
    """The seed of one step's randomness, and the part of the batch that it is for.

    What is drawn for a part of a batch is that part of what is drawn for the whole. So it does not
    matter into how many parts, on however many devices, a batch is cut.
    """

    seed: tf.Tensor  # int64 [2]
    part: tf.Tensor | int = 0
    parts: int = 1
    numbers: tuple = ()  # folded into the seed when something is drawn: most steps draw nothing

    def fold_in(self, *numbers: tf.Tensor | int) -> "Key":
        """A new key from this one and some whole numbers."""
        return self._replace(numbers=(*self.numbers, *numbers))

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> tf.Tensor:
        """float32, uniform in [low, high), for the rows of this part.

        Args:
          shape: static; begins with the number of rows.
          low, high: the interval.
        """
        rows, *rest = shape
        all_rows = self.parts * rows
        seed = fold_in(self.seed, *self.numbers)
        bits = tf.random.stateless_uniform(
            [all_rows, *rest], seed, None, None, tf.int32, alg="philox"
        )
        mantissa = tf.bitwise.bitwise_and(bits, 0x7FFFFF)
        one_to_two = tf.bitcast(tf.bitwise.bitwise_or(mantissa, 0x3F800000), tf.float32)
        whole = (one_to_two - 1.0) * (high - low) + low
        if self.parts == 1:
            return whole
        return tf.slice(whole, [self.part * rows] + [0] * len(rest), shape)


def seed_of(number: tf.Tensor | int, use: int) -> tf.Tensor:
    """An int64 [2] seed from a whole number and what it is used for."""
    return tf.stack([_bits32(number), tf.constant(use, tf.int64)])


def fold_in(seed: tf.Tensor, *numbers: tf.Tensor | int) -> tf.Tensor:
    """A new int64 [2] seed from a seed and some whole numbers, which count by their last 32 bits.

    As tf.random.experimental.stateless_fold_in; but its int32 numbers are kept in the host's
    memory, beside a GPU.
    """
    for number in numbers:
        drawn = tf.random.stateless_uniform([], seed, None, None, tf.int32, alg="philox")
        seed = tf.stack([tf.cast(drawn, tf.int64), _bits32(number)])
    return seed


def _bits32(number: tf.Tensor | int) -> tf.Tensor:
    return tf.cast(tf.cast(number, tf.int32), tf.int64)
