"""All trainable weights, gradients or updates as one vector, which also reads by name.

It lies in a few blocks: every large weight is one, and all others together are one. So an update
rule is a handful of operations, however many layers there are, and no large weight is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from tfloop.lazy import tf

LARGE = 1 << 16  # elements; to copy fewer costs less than operations of their own

Blocks: TypeAlias = "tuple[tuple[str, ...], ...]"  # the names of the weights in each block


def blocks_of(weights: Mapping[str, tf.Variable]) -> Blocks:
    """Which weights lie in a block together, in order: those that are not large, then each other.

    Args:
      weights: tensors or variables by name.
    """
    small = tuple(name for name, w in weights.items() if w.shape.num_elements() < LARGE)
    large = [(name,) for name, w in weights.items() if w.shape.num_elements() >= LARGE]
    return (small, *large) if small else tuple(large)


class Vector(Mapping):
    """A vector [n] over all trainable weights: gradients["conv1/kernel"], gradients.norm."""

    def __init__(self, flat: tf.Tensor | Sequence[tf.Tensor], like: Mapping) -> None:
        """Make one.

        Args:
          flat: the vector [n]; or the vectors of its blocks, as `blocks_of(like)` says.
          like: the weights whose names and shapes its parts have, in order.
        """
        self._like = like
        if isinstance(flat, (list, tuple)):
            self.blocks = list(flat)
            if len(flat) == 1:
                self.flat = flat[0]
        else:
            self.flat = flat

    @classmethod
    def of(cls, tensors: Mapping[str, tf.Tensor]) -> Vector:
        """All tensors' elements, in order."""
        blocks = blocks_of(tensors)
        return cls([flatten(tensors[name] for name in block) for block in blocks], tensors)

    @functools.cached_property
    def flat(self) -> tf.Tensor:
        """The whole, float32 [n]."""
        return flatten(self.parts().values())

    @functools.cached_property
    def blocks(self) -> list[tf.Tensor]:
        """The vectors of its blocks, as `blocks_of` says."""
        layout = blocks_of(self._like)
        if len(layout) == 1:
            return [self.flat]
        parts = dict(zip(self._like, tf.split(self.flat, self._sizes()), strict=True))
        return [flatten(parts[name] for name in block) for block in layout]

    @functools.cached_property
    def norm(self) -> tf.Tensor:
        """√Σx²"""
        squares = [tf.nn.l2_loss(block) for block in self.blocks]
        return tf.sqrt(2.0 * (tf.add_n(squares) if len(squares) > 1 else squares[0]))

    def map(self, function: Callable[[tf.Tensor], tf.Tensor]) -> Vector:
        """The vector of what the function, which goes element by element, makes of each block."""
        return Vector([function(block) for block in self.blocks], self._like)

    def parts(self) -> dict[str, tf.Tensor]:
        """The parts by name, each with its shape."""
        found: dict[str, tf.Tensor] = {}
        for names, block in zip(blocks_of(self._like), self.blocks, strict=True):
            sizes = [self._like[name].shape.num_elements() for name in names]
            cut = tf.split(block, sizes) if len(sizes) > 1 else [block]
            found.update(zip(names, cut, strict=True))
        return {name: tf.reshape(found[name], like.shape) for name, like in self._like.items()}

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
        head = f"Vector of {sum(self._sizes()):,} numbers"
        if not hasattr(self.blocks[0], "numpy"):  # in a graph
            return f"{head}: {', '.join(self)}"
        width = max(map(len, self))
        lines = [f"{head}, norm {float(self.norm):.6g}"]
        lines += [f"  {name:{width}}  norm {norm:.4g}" for name, norm in self.norms().items()]
        return "\n".join(lines)


def flatten(tensors: Iterable) -> tf.Tensor:
    """One vector [n] float32 of all tensors' elements, in order."""
    vectors = [tf.cast(tf.reshape(tensor, [-1]), tf.float32) for tensor in tensors]
    return vectors[0] if len(vectors) == 1 else tf.concat(vectors, axis=0)


def count_elements(tensors: Iterable) -> int:
    """n: how many elements all tensors have together."""
    return sum(tensor.shape.num_elements() for tensor in tensors)


def select(condition: tf.Tensor, yes: tf.Tensor, no: tf.Tensor) -> tf.Tensor:
    """`yes` or `no`, whole, by one boolean.

    A copy, where tf.where would broadcast the condition (5 times slower).
    """
    yes, no = tf.convert_to_tensor(yes), tf.convert_to_tensor(no)
    return tf.raw_ops.Select(condition=condition, x=yes, y=no)
