"""What is measured of a batch, a call, an epoch or a test set."""

import math
from typing import NamedTuple

import tensorflow as tf


class Loss(NamedTuple):
    """total = data + l1 + l2 + custom + model, each a float32 scalar."""

    total: tf.Tensor
    data: tf.Tensor  # mean over the batch of the loss of each example
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


SUMS = 2 + len(Metrics._fields)  # elements of a vector of sums: steps, examples, Σ of each metric


def means(sums: tf.Tensor) -> Metrics:
    """The metrics whose sums these are; NaN where there are no examples.

    Args:
      sums: [SUMS] steps, examples, and each metric's sum over the examples.
    """
    _, examples, *totals = sums.numpy().tolist()
    return Metrics(*(total / examples if examples else math.nan for total in totals))
