"""What a loop says of the steps it made: a call, an evaluation within an epoch, an epoch."""

import dataclasses
from typing import Any, TypeAlias

from tfloop.metrics import Metrics
from tfloop.vectors import Vector


@dataclasses.dataclass(frozen=True)
class Call:
    """What one compiled call did."""

    epoch: int  # counted from 1
    step: int  # global_step after it
    batch_index: int  # of the epoch's next batch, so: steps of the epoch done
    steps: int
    train: Metrics
    worst: float  # the largest loss of its steps
    learning_rate: float  # of its last step
    seconds: float
    input_seconds: float  # of these, spent waiting for batches
    gradients: Vector = dataclasses.field(compare=False, repr=False)  # of its last step
    updates: Vector = dataclasses.field(compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What one epoch reached."""

    epoch: int
    step: int
    train: Metrics
    test: Metrics | None  # None where the data have no test images
    validation: Metrics | None
    learning_rate: float
    seconds: float  # of training alone, for `steps` steps
    steps: int  # fewer than the epoch has where the state came from a checkpoint inside it
    # A nest of [test examples, …]: what the loss is given, such as logits [examples, classes].
    outputs: Any = dataclasses.field(compare=False, repr=False)
    digest: str = ""  # SHA-256 of the weights and moving averages, as TrainState.digest


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation within an epoch found."""

    epoch: int  # counted from 1
    step: int
    batch_index: int  # of the epoch's next batch
    train: Metrics  # of the epoch so far
    test: Metrics | None
    validation: Metrics | None
    # As of Epoch.
    outputs: Any = dataclasses.field(compare=False, repr=False)
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class CallPart:
    """What a run that was stopped within a call, or before the evaluation behind it, goes on from.

    Attributes:
      steps: of the call that are made.
      sums: of these; empty where the call was made.
      worst: the largest loss of one of them.
      seconds: that they took.
      waited: seconds, of these, that batches were waited for.
      learning_rate: of the last step.
    """

    steps: int = 0
    sums: tuple[float, ...] = ()
    worst: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    learning_rate: float | None = None


Record: TypeAlias = Call | Evaluation | Epoch
