"""How batches reach the step. Three ways, one order: what a batch holds is a pure function of (seed, epoch, index).

A pipeline has `begin(seed, epoch, first)`, which returns a source for the rest of that epoch, and
`take(source, index)`, which the compiled step calls for the batch with this index. Images travel as they lie in the
data set (uint8); they become float32 in the step.
"""

import math
import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tfloop.data import Split
from tfloop.errors import UserError
from tfloop.randomness import fold_in, seed_of

PIPELINES = ("host", "prefetch", "resident")
UNTUNED = tf.data.Options()  # for every iterator: freeing one waits for its autotuner, which may miss the call and sleep on for a minute
UNTUNED.autotune.enabled = False
SHARE_OF_MEMORY = 0.1  # images that take less than this of the memory are kept resident
GPU_BYTES = 4 << 30  # and on a GPU, less than this


class Batch(NamedTuple):
    """One batch of static size. The last one of an epoch is filled up with rows of weight 0."""

    images: tf.Tensor  # [batch, height, width, channels], uint8 or float32
    labels: tf.Tensor  # [batch] int64
    weights: tf.Tensor  # [batch] float32, 1 or 0


def order(seed, epoch, size: int) -> tf.Tensor:
    """The order of `size` examples in an epoch: a permutation, int64 [size], the same on every device.

    The rows are sorted by 64 random bits each (Philox, keyed by seed and epoch).
    """
    bits = tf.random.stateless_uniform([size], fold_in(seed_of(seed, 0), epoch), None, None, tf.int64, alg="philox")
    return tf.cast(tf.argsort(bits, stable=True), tf.int64)


class Resident:
    """The images stay in device memory; permuting and gathering happen there, and an epoch crosses nothing."""

    name = "resident"

    def __init__(self, split: Split, batch_size: int, part: int = 0, parts: int = 1):
        self.size, self.batch_size = len(split), batch_size
        self._rows, self._first = batch_size // parts, part * (batch_size // parts)
        self.steps = math.ceil(self.size / batch_size)
        self._images, self._labels = split.tensors
        self.error = None
        self._order = tf.Variable(tf.zeros([self.steps * batch_size], tf.int64), trainable=False)
        self._weights = _weights(0, self.steps * batch_size, self.size)

    def begin(self, seed, epoch, first: int) -> tuple:
        rows = order(seed, epoch, self.size)
        self._order.assign(tf.concat([rows, rows[:self._order.shape[0] - self.size]], axis=0))
        return ()

    def take(self, source: tuple, index: tf.Tensor) -> Batch:
        rows, weights = (tf.slice(whole, [index * self.batch_size + self._first], [self._rows])
                         for whole in (self._order, self._weights))
        return Batch(tf.gather(self._images, rows), tf.gather(self._labels, rows), weights)


class Streamed:
    """tf.data makes the batches on the CPU, ahead of the step; `to_device` also copies them ahead to a GPU.

    Images in memory are gathered; those on disk (`records.Records`) are read and decoded, several batches at once.
    """

    def __init__(self, split: Split, batch_size: int, to_device: bool, part: int = 0, parts: int = 1):
        self.name = "prefetch" if to_device else "host"
        self.size, self.batch_size = len(split), batch_size
        self._rows, self._first = batch_size // parts, part * (batch_size // parts)
        self.steps = math.ceil(self.size / batch_size)
        self.error = None  # what a record could not be read for
        self._device = (tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU"))[0].name
        self._on_disk = not isinstance(split.images, np.ndarray)
        with tf.device("CPU"):
            self._images, self._labels = split.images if self._on_disk else tf.constant(split.images), tf.constant(split.labels, tf.int64)

    def begin(self, seed, epoch, first: int):
        return iter(self.batches(seed, epoch, first))

    def batches(self, seed, epoch, first: int) -> tf.data.Dataset:
        with tf.device("CPU"):
            rows = order(seed, epoch, self.size)
            rows = tf.concat([rows, rows[:self.steps * self.batch_size - self.size]], axis=0)

        def batch(index, rows):
            images, fine = self._read(rows) if self._on_disk else (tf.gather(self._images, rows), 1.0)
            weights = _weights(index * self.batch_size + self._first, self._rows, self.size)
            return Batch(tf.ensure_shape(images, [self._rows, *self._images.shape[1:]]),
                         tf.ensure_shape(tf.gather(self._labels, rows), [self._rows]), weights * fine)

        own = tf.reshape(rows, [self.steps, self.batch_size])[:, self._first:self._first + self._rows]
        batches = tf.data.Dataset.from_tensor_slices(own)
        batches = tf.data.Dataset.zip(tf.data.Dataset.range(self.steps), batches).skip(first)
        batches = batches.map(batch, num_parallel_calls=min(os.cpu_count() or 1, 16), deterministic=True).with_options(UNTUNED)
        if self.name == "prefetch" and "GPU" in self._device:
            return batches.apply(tf.data.experimental.prefetch_to_device(self._device, 2))
        return batches.prefetch(2)

    def _read(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(images, 1 or 0 for each: 0 where its record is damaged and left out)"""
        from tfloop import records

        def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            try:
                return self._images.read(rows)
            except UserError as error:
                self.error = error
                raise

        found = tf.numpy_function(read, [rows], [tf.string, tf.bool, tf.float32])
        examples, raw, fine = (tf.ensure_shape(part, [self._rows]) for part in found)
        return records.decode(examples, raw, self._images.shape[1:]), fine

    def take(self, source, index: tf.Tensor) -> Batch:
        return next(source)


def batch_at(split: Split, batch_size: int, seed, epoch, index: int) -> Batch:
    """The batch that every pipeline gives at this place, made on its own."""
    first, size = index * batch_size, len(split)
    rows = np.resize(order(seed, epoch, size).numpy(), first + batch_size)[first:]
    weights = _weights(first, batch_size, size)
    if isinstance(split.images, np.ndarray):
        return Batch(tf.constant(split.images[rows]), tf.constant(split.labels[rows], tf.int64), weights)
    from tfloop import records

    examples, raw, fine = split.images.read(rows)
    images = records.decode(tf.constant(examples.tolist()), tf.constant(raw), split.images.shape[1:])
    return Batch(images, tf.constant(split.labels[rows], tf.int64), weights * fine)


def make(name: str, split: Split, batch_size: int, part: int = 0, parts: int = 1):
    """A pipeline by name; "auto" is resident where the images fit comfortably, else prefetch.

    It gives one part of every batch, of as many equal parts as there are workers.
    """
    if name == "auto":
        in_memory = isinstance(split.images, np.ndarray)
        name = "resident" if in_memory and split.images.nbytes < comfortable_bytes() else "prefetch"
    if name not in PIPELINES:
        raise UserError(f"--pipeline={name} is unknown; choose from auto, {', '.join(PIPELINES)}")
    if name == "resident":
        return Resident(split, batch_size, part, parts)
    return Streamed(split, batch_size, name == "prefetch", part, parts)


def comfortable_bytes() -> int:
    """How much image data "auto" keeps on the device."""
    if tf.config.list_physical_devices("GPU"):
        return GPU_BYTES
    return int(SHARE_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _weights(first: tf.Tensor, batch_size: int, size: int) -> tf.Tensor:
    return tf.cast(tf.cast(first, tf.int64) + tf.range(batch_size, dtype=tf.int64) < size, tf.float32)
