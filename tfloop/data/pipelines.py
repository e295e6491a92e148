"""How batches reach the step. Three ways, one order: a pure function of (seed, epoch, index).

A pipeline has `begin(seed, epoch, first)`, which returns a source for the rest of that epoch, and
`take(source, index, rows)`, which the compiled step calls for the batch with this index. It has
`rows` rows, of which a worker gets its part; shapes are static. Images travel as they lie in the
data set (uint8); they become float32 in the step.
"""

import functools
import math
import os
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfloop.data import shards
from tfloop.data.dataset import Split
from tfloop.data.tf_data import UNTUNED
from tfloop.errors import UserError
from tfloop.randomness import Part, fold_in, part_of, seed_of

PIPELINES = ("host", "prefetch", "resident")
SHARE_OF_MEMORY = 0.1  # images that take less than this of the memory are kept resident
GPU_BYTES = 4 << 30  # and on a GPU, less than this


class Batch(NamedTuple):
    """One batch. The last one of an epoch has the rows that are left."""

    images: tf.Tensor  # [batch, height, width, channels], uint8 or float32
    labels: tf.Tensor  # [batch] int64
    sample_weight: tf.Tensor  # [batch] float32: 1, or 0 for a damaged record that is left out


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

    def __init__(
        self, split: Split, batch_size: int, worker: int, workers: int, replicas: int
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
    """The images stay in device memory; permuting and gathering happen there."""

    name = "resident"

    def __init__(
        self, split: Split, batch_size: int, worker: int = 0, workers: int = 1, replicas: int = 1
    ) -> None:
        super().__init__(split, batch_size, worker, workers, replicas)
        self._images, self._labels = split.tensors
        self._order = tf.Variable(tf.zeros([self.size], tf.int64), trainable=False)

    def begin(self, seed: tf.Tensor, epoch: tf.Tensor, first: int) -> tuple:
        self._order.assign(order(seed, epoch, self.size))
        return ()

    def take(self, source: tuple, index: tf.Tensor, rows: int) -> Batch:
        first, own = self._own(rows)
        places = tf.slice(self._order, [index * self.batch_size + first], [own])
        images, labels = tf.gather(self._images, places), tf.gather(self._labels, places)
        return Batch(images, labels, tf.ones([own]))


class Streamed(_Pipeline):
    """tf.data makes the batches on the CPU, ahead of the step.

    Images in memory are gathered; those on disk (`shards.Records`) are read and decoded, several
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
        self._is_on_disk = not isinstance(split.images, np.ndarray)
        with tf.device("CPU"):
            self._images = split.images if self._is_on_disk else tf.constant(split.images)
            self._labels = tf.constant(split.labels, tf.int64)

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
        if self._is_on_disk:
            images, whole = self._read(rows)
        else:
            images, whole = tf.gather(self._images, rows), tf.ones([own])
        return Batch(images, tf.gather(self._labels, rows), whole)

    def _read(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(images, 1 or 0 for each: 0 where its record is damaged and left out)"""

        def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            try:
                return self._images.read(rows)
            except UserError as error:
                self.error = error
                raise

        found = tf.numpy_function(read, [rows], [tf.string, tf.bool, tf.float32])
        examples, raw, whole = (tf.ensure_shape(part, [None]) for part in found)
        return shards.decode(examples, raw, self._images.shape[1:]), whole

    def take(self, source: Any, index: tf.Tensor, rows: int) -> Batch:
        batch, own = next(source), self._own(rows)[1]
        return Batch(*(tf.ensure_shape(part, [own, *part.shape[1:]]) for part in batch))


def batch_at(
    split: Split, batch_size: int, seed: tf.Tensor | int, epoch: tf.Tensor | int, index: int
) -> Batch:
    """The batch that every pipeline gives at this place, made on its own."""
    first = index * batch_size
    rows = order(seed, epoch, len(split)).numpy()[first : first + batch_size]
    labels = tf.constant(split.labels[rows], tf.int64)
    if isinstance(split.images, np.ndarray):
        return Batch(tf.constant(split.images[rows]), labels, tf.ones([len(rows)]))
    examples, raw, whole = split.images.read(rows)
    serialized = tf.constant(examples.tolist())
    images = shards.decode(serialized, tf.constant(raw), split.images.shape[1:])
    return Batch(images, labels, tf.constant(whole))


def make(
    name: str,
    split: Split,
    batch_size: int,
    worker: int = 0,
    workers: int = 1,
    replicas: int = 1,
) -> Resident | Streamed:
    """A pipeline by name; "auto" is resident where the images fit comfortably, else prefetch.

    It gives one part of every batch, of as many parts as there are workers; of a batch with fewer
    rows than replicas, all.
    """
    if name == "auto":
        in_memory = isinstance(split.images, np.ndarray)
        fits = in_memory and split.images.nbytes < comfortable_bytes()
        name = "resident" if fits else "prefetch"
    if name not in PIPELINES:
        raise UserError(f"--pipeline={name} is unknown; choose from auto, {', '.join(PIPELINES)}")
    if name == "resident":
        return Resident(split, batch_size, worker, workers, replicas)
    return Streamed(split, batch_size, name == "prefetch", worker, workers, replicas)


def comfortable_bytes() -> int:
    """How much image data "auto" keeps on the device."""
    if tf.config.list_physical_devices("GPU"):
        return GPU_BYTES
    return int(SHARE_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
