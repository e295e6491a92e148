"""How batches reach the step. Three ways, one order: a pure function of (seed, epoch, index).

A pipeline has `begin(seed, epoch, first)`, which returns a source for the rest of that epoch, and
`take(source, index)`, which the compiled step calls for the batch with this index. Images travel as
they lie in the data set (uint8); they become float32 in the step.
"""

import math
import os
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfloop.data import shards
from tfloop.data.dataset import Split
from tfloop.data.tf_data import UNTUNED
from tfloop.errors import UserError
from tfloop.randomness import fold_in, seed_of

PIPELINES = ("host", "prefetch", "resident")
SHARE_OF_MEMORY = 0.1  # images that take less than this of the memory are kept resident
GPU_BYTES = 4 << 30  # and on a GPU, less than this


class Batch(NamedTuple):
    """One batch of static size. The last one of an epoch is filled up with rows of weight 0."""

    images: tf.Tensor  # [batch, height, width, channels], uint8 or float32
    labels: tf.Tensor  # [batch] int64
    sample_weight: tf.Tensor  # [batch] float32, 1 or 0


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
      batch_size: rows of a batch, of all workers together.
      error: why a record could not be read; None while all went well.
    """

    name: str

    def __init__(self, split: Split, batch_size: int, worker: int, workers: int) -> None:
        self.size, self.batch_size = len(split), batch_size
        self.steps = math.ceil(self.size / batch_size)
        self.error: UserError | None = None
        self._rows = batch_size // workers  # of each batch, this worker's
        self._first = worker * self._rows


class Resident(_Pipeline):
    """The images stay in device memory; permuting and gathering happen there."""

    name = "resident"

    def __init__(self, split: Split, batch_size: int, worker: int = 0, workers: int = 1) -> None:
        super().__init__(split, batch_size, worker, workers)
        self._images, self._labels = split.tensors
        places = self.steps * batch_size
        self._order = tf.Variable(tf.zeros([places], tf.int64), trainable=False)
        self._sample_weight = _sample_weight(0, places, self.size)

    def begin(self, seed: tf.Tensor, epoch: tf.Tensor, first: int) -> tuple:
        rows = order(seed, epoch, self.size)
        filling = rows[: self._order.shape[0] - self.size]
        self._order.assign(tf.concat([rows, filling], axis=0))
        return ()

    def take(self, source: tuple, index: tf.Tensor) -> Batch:
        start = [index * self.batch_size + self._first]
        rows = tf.slice(self._order, start, [self._rows])
        sample_weight = tf.slice(self._sample_weight, start, [self._rows])
        images, labels = tf.gather(self._images, rows), tf.gather(self._labels, rows)
        return Batch(images, labels, sample_weight)


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
    ) -> None:
        """Make one.

        Args:
          split: the examples.
          batch_size: of all workers together.
          to_device: copy the batches ahead to a GPU, too.
          worker: which part of every batch it gives.
          workers: of how many.
        """
        super().__init__(split, batch_size, worker, workers)
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
        places = self.steps * self.batch_size
        with tf.device("CPU"):
            rows = order(seed, epoch, self.size)
            rows = tf.concat([rows, rows[: places - self.size]], axis=0)
        by_batch = tf.reshape(rows, [self.steps, self.batch_size])
        own = by_batch[:, self._first : self._first + self._rows]
        indices = tf.data.Dataset.range(self.steps)
        places_read = tf.data.Dataset.zip(indices, tf.data.Dataset.from_tensor_slices(own))
        at_once = min(os.cpu_count() or 1, 16)
        batches = places_read.skip(first).map(
            self._batch, num_parallel_calls=at_once, deterministic=True
        )
        batches = batches.with_options(UNTUNED)
        if self.name == "prefetch" and "GPU" in self._device:
            return batches.apply(tf.data.experimental.prefetch_to_device(self._device, 2))
        return batches.prefetch(2)

    def _batch(self, index: tf.Tensor, rows: tf.Tensor) -> Batch:
        first = index * self.batch_size + self._first
        sample_weight = _sample_weight(first, self._rows, self.size)
        if self._is_on_disk:
            images, whole = self._read(rows)
            sample_weight *= whole
        else:
            images = tf.gather(self._images, rows)
        labels = tf.gather(self._labels, rows)
        return Batch(
            tf.ensure_shape(images, [self._rows, *self._images.shape[1:]]),
            tf.ensure_shape(labels, [self._rows]),
            sample_weight,
        )

    def _read(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(images, 1 or 0 for each: 0 where its record is damaged and left out)"""

        def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            try:
                return self._images.read(rows)
            except UserError as error:
                self.error = error
                raise

        found = tf.numpy_function(read, [rows], [tf.string, tf.bool, tf.float32])
        examples, raw, whole = (tf.ensure_shape(part, [self._rows]) for part in found)
        return shards.decode(examples, raw, self._images.shape[1:]), whole

    def take(self, source: Any, index: tf.Tensor) -> Batch:
        return next(source)


def batch_at(
    split: Split, batch_size: int, seed: tf.Tensor | int, epoch: tf.Tensor | int, index: int
) -> Batch:
    """The batch that every pipeline gives at this place, made on its own."""
    first, size = index * batch_size, len(split)
    rows = np.resize(order(seed, epoch, size).numpy(), first + batch_size)[first:]
    labels = tf.constant(split.labels[rows], tf.int64)
    sample_weight = _sample_weight(first, batch_size, size)
    if isinstance(split.images, np.ndarray):
        return Batch(tf.constant(split.images[rows]), labels, sample_weight)
    examples, raw, whole = split.images.read(rows)
    serialized = tf.constant(examples.tolist())
    images = shards.decode(serialized, tf.constant(raw), split.images.shape[1:])
    return Batch(images, labels, sample_weight * whole)


def make(
    name: str, split: Split, batch_size: int, worker: int = 0, workers: int = 1
) -> Resident | Streamed:
    """A pipeline by name; "auto" is resident where the images fit comfortably, else prefetch.

    It gives one part of every batch, of as many equal parts as there are workers.
    """
    if name == "auto":
        in_memory = isinstance(split.images, np.ndarray)
        fits = in_memory and split.images.nbytes < comfortable_bytes()
        name = "resident" if fits else "prefetch"
    if name not in PIPELINES:
        raise UserError(f"--pipeline={name} is unknown; choose from auto, {', '.join(PIPELINES)}")
    if name == "resident":
        return Resident(split, batch_size, worker, workers)
    return Streamed(split, batch_size, name == "prefetch", worker, workers)


def comfortable_bytes() -> int:
    """How much image data "auto" keeps on the device."""
    if tf.config.list_physical_devices("GPU"):
        return GPU_BYTES
    return int(SHARE_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _sample_weight(first: tf.Tensor | int, rows: int, size: int) -> tf.Tensor:
    """[rows] float32: 1 for places below `size`, 0 for those that only fill up a batch."""
    places = tf.cast(first, tf.int64) + tf.range(rows, dtype=tf.int64)
    return tf.cast(places < size, tf.float32)
