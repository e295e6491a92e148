"""What is measured of a batch, a call, an epoch or a test set."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import tensorflow as tf


class Loss(NamedTuple):
    """total = data + l1 + l2 + custom + model, each a float32 scalar."""

    total: tf.Tensor
    data: tf.Tensor  # Σ w · loss of each example / examples
    l1: tf.Tensor  # l1 · Σ|w| over the penalised kernels
    l2: tf.Tensor  # l2 · Σw²
    custom: tf.Tensor  # the user's own penalties
    model: tf.Tensor  # what the model's own layers add


class Metrics(NamedTuple):
    """Means over the examples of a call, an epoch or a test set."""

    total: float
    data: float
    l1: float
    l2: float
    custom: float
    model: float
    accuracy: float | None  # None where there is no output for each class
    gradient_norm: float | None = None  # of training alone
    # By output where there are several, and the user's own; None where one could not be computed.
    more: Mapping[str, float | None] = MappingProxyType({})

    def by_name(self) -> dict[str, float | None]:
        """All of them, in one dict."""
        named = self._asdict()
        return {**{name: named[name] for name in NAMES}, **named["more"]}

    def find(self, name: str) -> float | None:
        """One of them by name; "loss" is the total. None where there is none."""
        return self.by_name().get("total" if name == "loss" else name)


NAMES = Metrics._fields[:-1]  # of what every run has
SUMS = 2 + len(NAMES)  # elements of a vector of sums: steps, examples, Σ of each metric


def means(sums: tf.Tensor, more: Sequence[str] = ()) -> Metrics:
    """The metrics whose sums these are; NaN where there are no examples.

    Args:
      sums: [SUMS + more] steps, examples, and each metric's sum over the examples.
      more: the names of the metrics behind those that every run has.
    """
    _, examples, *totals = sums.numpy().tolist()
    values = [total / examples if examples else math.nan for total in totals]
    common, own = values[: len(NAMES)], values[len(NAMES) :]
    named = dict(zip(more, own, strict=True))
    return Metrics(**dict(zip(NAMES, common, strict=True)), more=named)
