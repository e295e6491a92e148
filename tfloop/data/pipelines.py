"""How batches reach the step. Three ways, one order: a pure function of (seed, epoch, index).

A pipeline has `begin(seed, epoch, first)`, which returns a source for the rest of that epoch, and
`take(source, index, rows)`, which the compiled step calls for the batch with this index. It has
`rows` rows, of which a worker gets its part; shapes are static. Inputs and targets travel as they
lie in the data set (images: uint8); what is scaled becomes float32 in the step.
"""

import functools
import math
import os
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfloop.data import shards
from tfloop.data.dataset import Split
from tfloop.data.stream import Stream
from tfloop.data.tf_data import UNTUNED
from tfloop.errors import UserError
from tfloop.nests import map_leaves
from tfloop.randomness import Part, fold_in, part_of, seed_of

PIPELINES = ("host", "prefetch", "resident")
SHARE_OF_MEMORY = 0.1  # inputs that take less than this of the memory are kept resident
GPU_BYTES = 4 << 30  # and on a GPU, less than this


LEFT_OUT = -1.0  # the weight of a damaged record, which counts for nothing at all


class Batch(NamedTuple):
    """One batch. The last one of an epoch has the rows that are left."""

    inputs: Any  # a nest of tensors [batch, …] in the types of the data: images, tables, tokens
    targets: Any  # a nest of tensors [batch, …]: class numbers int64, or what else the data have
    sample_weight: tf.Tensor  # [batch] float32: how much each loss counts; 1 where nothing is said

    @property
    def rows(self) -> int:
        """How many examples it has."""
        return self.sample_weight.shape[0]

    @property
    def counts(self) -> tf.Tensor:
        """[batch] float32: 1 for each example, 0 for a damaged record that is left out."""
        return tf.cast(self.sample_weight >= 0.0, tf.float32)


def order(seed: tf.Tensor | int, epoch: tf.Tensor | int, size: int) -> tf.Tensor:
    """The order of `size` examples in an epoch: a permutation, int64 [size].

    The same on every device. The rows are sorted by 64 random bits each (Philox, keyed by seed and
    epoch).
    """
    key = fold_in(seed_of(seed, 0), epoch)
    bits = tf.random.stateless_uniform([size], key, None, None, tf.int64, alg="philox")
    return tf.cast(tf.argsort(bits, stable=True), tf.int64)


class _Pipeline:
    """What all pipelines have.

    Attributes:
      name: one of PIPELINES.
      size: examples in an epoch.
      steps: batches in an epoch.
      full: those of them that are full; the one after them, if any, has `rest` rows.
      batch_size: rows of a batch, of all workers together.
      error: why a record could not be read; None while all went well.
    """

    name: str
    goes_on = False  # does what `begin` gave go on with the next epoch?

    def __init__(
        self, split: Split | Stream, batch_size: int, worker: int, workers: int, replicas: int
    ) -> None:
        self.size, self.batch_size = len(split), batch_size
        self.steps = math.ceil(self.size / batch_size)
        self.full, self.rest = divmod(self.size, batch_size)
        self.error: UserError | None = None
        self._worker, self._workers, self._replicas = worker, workers, max(replicas, workers)

    def part(self, rows: int) -> Part | None:
        """Which rows of a batch of so many are this worker's; None where all are."""
        return Part(*self._own(rows), rows) if self._workers > 1 else None

    def _own(self, rows: int) -> tuple[int, int]:
        """(the first row, how many) of a batch of so many rows that are this worker's.

        All are, where there are too few for each replica.
        """
        if rows < self._replicas:
            return 0, rows
        return part_of(rows, self._worker, self._workers)


class Resident(_Pipeline):
    """The data stay in device memory; permuting and gathering happen there."""

    name = "resident"

    def __init__(
        self, split: Split, batch_size: int, worker: int = 0, workers: int = 1, replicas: int = 1
    ) -> None:
        super().__init__(split, batch_size, worker, workers, replicas)
        self._inputs, self._targets, self._weight = split.tensors
        self._order = tf.Variable(tf.zeros([self.size], tf.int64), trainable=False)

    def begin(self, seed: tf.Tensor, epoch: tf.Tensor, first: int) -> tuple:
        self._order.assign(order(seed, epoch, self.size))
        return ()

    def take(self, source: tuple, index: tf.Tensor, rows: int) -> Batch:
        first, own = self._own(rows)
        places = tf.slice(self._order, [index * self.batch_size + first], [own])

        def of_batch(variable: tf.Variable) -> tf.Tensor:
            return tf.gather(variable, places)

        inputs, targets = (map_leaves(of_batch, part) for part in (self._inputs, self._targets))
        weight = tf.ones([own]) if self._weight is None else of_batch(self._weight)
        return Batch(inputs, targets, weight)


class Streamed(_Pipeline):
    """tf.data makes the batches on the CPU, ahead of the step.

    What is in memory is gathered; those on disk (`shards.Records`) are read and decoded, several
    batches at once.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        to_device: bool,
        worker: int = 0,
        workers: int = 1,
        replicas: int = 1,
    ) -> None:
        """Make one.

        Args:
          split: the examples.
          batch_size: of all workers together.
          to_device: copy the batches ahead to a GPU, too.
          worker: which part of every batch it gives.
          workers: of how many.
          replicas: of all workers together.
        """
        super().__init__(split, batch_size, worker, workers, replicas)
        self.name = "prefetch" if to_device else "host"
        gpus = tf.config.list_logical_devices("GPU")
        self._device = (gpus or tf.config.list_logical_devices("CPU"))[0].name
        self._is_on_disk, inputs = not split.is_in_memory, split.inputs
        with tf.device("CPU"):
            self._inputs = inputs if self._is_on_disk else map_leaves(tf.constant, inputs)
            self._targets = map_leaves(tf.constant, split.targets)
            weight = split.sample_weight
            self._weight = None if weight is None else tf.constant(weight)

    def begin(self, seed: tf.Tensor, epoch: tf.Tensor, first: int) -> Any:
        return iter(self.batches(seed, epoch, first))

    def batches(self, seed: tf.Tensor, epoch: tf.Tensor, first: int) -> tf.data.Dataset:
        """The batches of an epoch from the one with index `first` on."""
        with tf.device("CPU"):
            places = order(seed, epoch, self.size)
        indices = tf.data.Dataset.range(first, self.steps)
        at_once = min(os.cpu_count() or 1, 16)
        batches = indices.map(
            functools.partial(self._batch, places), num_parallel_calls=at_once, deterministic=True
        )
        batches = batches.with_options(UNTUNED)
        if self.name == "prefetch" and "GPU" in self._device:
            return batches.apply(tf.data.experimental.prefetch_to_device(self._device, 2))
        return batches.prefetch(2)

    def _batch(self, places: tf.Tensor, index: tf.Tensor) -> Batch:
        full, rest = self._own(self.batch_size), self._own(self.rest)
        first, own = full
        if rest != full and self.rest:
            is_full = index < self.full
            first, own = (tf.where(is_full, *pair) for pair in zip(full, rest, strict=True))
        start = index * self.batch_size + tf.cast(first, tf.int64)
        rows = places[start : start + tf.cast(own, tf.int64)]

        def of_batch(tensor: tf.Tensor) -> tf.Tensor:
            return tf.gather(tensor, rows)

        weight = tf.ones([own]) if self._weight is None else of_batch(self._weight)
        if self._is_on_disk:
            inputs, whole = self._read(rows)
            weight = tf.where(whole > 0, weight, LEFT_OUT)
        else:
            inputs = map_leaves(of_batch, self._inputs)
        return Batch(inputs, map_leaves(of_batch, self._targets), weight)

    def _read(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(images, 1 or 0 for each: 0 where its record is damaged and left out)"""

        def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            try:
                return self._inputs.read(rows)
            except UserError as error:
                self.error = error
                raise

        found = tf.numpy_function(read, [rows], [tf.string, tf.bool, tf.float32])
        examples, raw, whole = (tf.ensure_shape(part, [None]) for part in found)
        return shards.decode(examples, raw, self._inputs.shape[1:]), whole

    def take(self, source: Any, index: tf.Tensor, rows: int) -> Batch:
        own = self._own(rows)[1]

        def of_rows(tensor: tf.Tensor) -> tf.Tensor:
            return tf.ensure_shape(tensor, [own, *tensor.shape[1:]])

        return map_leaves(of_rows, next(source))


class FromDataset(_Pipeline):
    """A tf.data.Dataset of the user's own makes the batches, in its own order, whatever the seed.

    One iterator goes on from epoch to epoch, so that a dataset that shuffles anew each time does.
    """

    goes_on = True

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        to_device: bool,
        worker: int = 0,
        workers: int = 1,
        replicas: int = 1,
    ) -> None:
        """Make one; arguments as of `Streamed`."""
        super().__init__(stream, batch_size, worker, workers, replicas)
        self.name = "prefetch" if to_device else "host"
        gpus = tf.config.list_logical_devices("GPU")
        self._stream, self._device = stream, gpus[0].name if gpus else ""

    def begin(self, seed: tf.Tensor, epoch: tf.Tensor, first: int) -> Any:
        batches = self._stream.batches(self.batch_size, int(epoch) * self.steps + int(first))
        if self.name == "prefetch" and self._device:
            return iter(batches.apply(tf.data.experimental.prefetch_to_device(self._device, 2)))
        return iter(batches.prefetch(2))

    def take(self, source: Any, index: tf.Tensor, rows: int) -> Batch:
        first, own = self._own(rows)

        def of_rows(tensor: tf.Tensor) -> tf.Tensor:
            tensor = tf.ensure_shape(tensor, [rows, *tensor.shape[1:]])
            return tensor if own == rows else tensor[first : first + own]

        return Batch(*map_leaves(of_rows, next(source)))


def batch_at(
    split: Split | Stream,
    batch_size: int,
    seed: tf.Tensor | int,
    epoch: tf.Tensor | int,
    index: int,
) -> Batch:
    """The batch that every pipeline gives at this place, made on its own."""
    if isinstance(split, Stream):
        return _batch_of(split, batch_size, int(epoch), index)
    first = index * batch_size
    rows = order(seed, epoch, len(split)).numpy()[first : first + batch_size]
    some = split.take(rows)
    weight = np.ones(len(rows), np.float32) if some.sample_weight is None else some.sample_weight
    targets = map_leaves(tf.constant, some.targets)
    if split.is_in_memory:
        return Batch(map_leaves(tf.constant, some.inputs), targets, tf.constant(weight))
    examples, raw, whole = split.inputs.read(rows)
    serialized = tf.constant(examples.tolist())
    images = shards.decode(serialized, tf.constant(raw), split.inputs.shape[1:])
    return Batch(images, targets, tf.constant(np.where(whole > 0, weight, np.float32(LEFT_OUT))))


def _batch_of(stream: Stream, batch_size: int, epoch: int, index: int) -> Batch:
    """The batch at a place of a stream; of its own batches the first rows."""
    own = stream.batch_size or batch_size
    steps = math.ceil(len(stream) / own)
    batch = next(iter(stream.batches(own, epoch * steps + index)))
    return Batch(*map_leaves(lambda tensor: tensor[:batch_size], batch))


def make(
    name: str,
    split: Split | Stream,
    batch_size: int,
    worker: int = 0,
    workers: int = 1,
    replicas: int = 1,
) -> Resident | Streamed | FromDataset:
    """A pipeline by name; "auto" is resident where the data fit comfortably, else prefetch.

    It gives one part of every batch, of as many parts as there are workers; of a batch with fewer
    rows than replicas, all.
    """
    if isinstance(split, Stream):
        if name == "resident":
            raise UserError("--pipeline=resident: a tf.data.Dataset is read; use host or prefetch")
        return FromDataset(split, batch_size, name != "host", worker, workers, replicas)
    if name == "auto":
        fits = split.is_in_memory and split.nbytes < comfortable_bytes()
        name = "resident" if fits else "prefetch"
    if name not in PIPELINES:
        raise UserError(f"--pipeline={name} is unknown; choose from auto, {', '.join(PIPELINES)}")
    if name == "resident":
        return Resident(split, batch_size, worker, workers, replicas)
    return Streamed(split, batch_size, name == "prefetch", worker, workers, replicas)


def comfortable_bytes() -> int:
    """How much data "auto" keeps on the device."""
    if tf.config.list_physical_devices("GPU"):
        return GPU_BYTES
    return int(SHARE_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
