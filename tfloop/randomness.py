"""Randomness as a pure function of the position in the data.

There is no generator, so there is nothing to save. TensorFlow and XLA give the same bits, those of
Philox, and make other floats of them; so floats are made here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf


class Part(NamedTuple):
    """Which rows of a step's batch something is computed for."""

    first: tf.Tensor | int  # the first of them
    rows: int  # how many
    total: int  # of how many in all


def part_of(rows: int, index: int, parts: int) -> tuple[int, int]:
    """(the first row, how many) of part `index` of `rows` rows; sizes differ by one at most.

    As numpy.array_split: the first rows % parts of them have one more. A part may have none.
    """
    size, longer = divmod(rows, parts)
    return index * size + min(index, longer), size + (index < longer)


class Key(NamedTuple):
    """The seed of one step's randomness, and the part of the batch that it is for.

    What is drawn for a part of a batch is that part of what is drawn for the whole. So it does not
    matter into how many parts, on however many devices, a batch is cut.
    """

    seed: tf.Tensor  # int64 [2]
    part: Part | None = None  # None: the whole batch
    numbers: tuple = ()  # folded into the seed when something is drawn: most steps draw nothing

    def fold_in(self, *numbers: tf.Tensor | int) -> "Key":
        """A new key from this one and some whole numbers."""
        return self._replace(numbers=(*self.numbers, *numbers))

    def bits(self, use: int) -> tf.Tensor:
        """An int64 [2] seed for another generator, below 2**31, the same for all parts."""
        seed = fold_in(self.seed, *self.numbers, use)
        drawn = tf.random.stateless_uniform([2], seed, None, None, tf.int32, alg="philox")
        return tf.cast(tf.bitwise.bitwise_and(drawn, 0x7FFFFFFF), tf.int64)

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> tf.Tensor:
        """float32, uniform in [low, high), for the rows of this part.

        Args:
          shape: static; begins with the number of rows, or a multiple of it.
          low, high: the interval.
        """
        rows, *rest = shape
        part = self.part or Part(0, rows, rows)
        is_whole = part.rows == part.total
        each = 1 if is_whole else rows // part.rows
        all_rows = rows if is_whole else part.total * each
        seed = fold_in(self.seed, *self.numbers)
        bits = tf.random.stateless_uniform(
            [all_rows, *rest], seed, None, None, tf.int32, alg="philox"
        )
        mantissa = tf.bitwise.bitwise_and(bits, 0x7FFFFF)
        one_to_two = tf.bitcast(tf.bitwise.bitwise_or(mantissa, 0x3F800000), tf.float32)
        whole = (one_to_two - 1.0) * (high - low) + low
        if is_whole:
            return whole
        return tf.slice(whole, [part.first * each] + [0] * len(rest), shape)


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
