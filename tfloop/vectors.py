"""All trainable weights, gradients or updates as one vector, which also reads by name.

One vector in place of a tensor per weight makes every update rule a handful of operations, however
many layers there are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from tfloop.lazy import tf


class Vector(Mapping):
    """A vector [n] over all trainable weights: gradients["conv1/kernel"], gradients.norm."""

    def __init__(self, flat: tf.Tensor, like: Mapping[str, tf.Variable]) -> None:
        """Make one.

        Args:
          flat: the vector.
          like: the weights whose names and shapes its parts have, in order.
        """
        self.flat, self._like = flat, like

    @classmethod
    def of(cls, tensors: Mapping[str, tf.Tensor]) -> Vector:
        """All tensors' elements, in order."""
        return cls(flatten(tensors.values()), tensors)

    @functools.cached_property
    def norm(self) -> tf.Tensor:
        """√Σx²"""
        return tf.sqrt(2.0 * tf.nn.l2_loss(self.flat))

    def parts(self) -> dict[str, tf.Tensor]:
        """The parts by name, each with its shape."""
        parts = tf.split(self.flat, self._sizes())
        return {
            name: tf.reshape(part, like.shape)
            for part, (name, like) in zip(parts, self._like.items(), strict=True)
        }

    def norms(self) -> dict[str, float]:
        """The norm of each part, in NumPy."""
        starts = np.cumsum([0, *self._sizes()[:-1]])
        squares = np.add.reduceat(np.square(self.flat.numpy()), starts)
        return dict(zip(self._like, np.sqrt(squares).tolist(), strict=True))

    def _sizes(self) -> list[int]:
        return [like.shape.num_elements() for like in self._like.values()]

    def __getitem__(self, name: str) -> tf.Tensor:
        if name not in self._like:
            raise KeyError(f"{name}; there are {', '.join(self._like)}")
        return self.parts()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)

    def __repr__(self) -> str:
        names = ", ".join(self)
        return f"Vector of {len(self)} weights, norm {float(self.norm):.6g}: {names}"


def flatten(tensors: Iterable) -> tf.Tensor:
    """One vector [n] float32 of all tensors' elements, in order."""
    return tf.concat([tf.cast(tf.reshape(tensor, [-1]), tf.float32) for tensor in tensors], axis=0)


def count_elements(tensors: Iterable) -> int:
    """n: how many elements all tensors have together."""
    return sum(tensor.shape.num_elements() for tensor in tensors)


def select(condition: tf.Tensor, yes: tf.Tensor, no: tf.Tensor) -> tf.Tensor:
    """`yes` or `no`, whole, by one boolean.

    A copy, where tf.where would broadcast the condition (5 times slower).
    """
    yes, no = tf.convert_to_tensor(yes), tf.convert_to_tensor(no)
    return tf.raw_ops.Select(condition=condition, x=yes, y=no)
