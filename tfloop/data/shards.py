"""Data sets larger than memory: folders of TFRecord shards, of which any record can be read.

A shard is a TFRecord file of tf.train.Example with a label and an image: PNG, JPEG, or raw bytes
with height, width and channels, and best with format "raw". Its name begins with the part it
belongs to, "train-00000-of-00004.tfrecord", "test-…", or holds it
("mnist-train.tfrecord-00000-of-00001").

The first time a folder is used every record is read once and checked, and an index is left there:
where each record lies, its CRC-32 and label, and the mean and scale of the pixels. After that,
memory holds the index, 29 bytes a record, and nothing of the images: a batch is read from its
places in the shards.
"""

import functools
import os
import resource
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfloop.data import shard_index
from tfloop.data.arrays import hold_out, notes_on
from tfloop.data.dataset import Dataset, Split, Standardizer
from tfloop.data.shard_index import IMAGE_KEYS, INDEX
from tfloop.data.targets import Target
from tfloop.errors import UserError
from tfloop.wording import counted

MOST_UNUSED = 1000  # class numbers; more beside few that are used are no numbers of classes
CHUNK = 1024  # records that are decoded at once
# The index knows all else.
FEATURES = {key: tf.io.FixedLenFeature([], tf.string, "") for key in IMAGE_KEYS}


class Records:
    """The images of a part, as an array that is read when it is indexed: images[5:9], images[rows].

    Attributes:
      shape: (N, height, width, channels).
      dtype: uint8.
      nbytes: what the images would take in memory.
      skipped: the records that were found damaged and left out since, "FILE: record 7".
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        files: list[Path],
        index: dict[str, np.ndarray],
        image_shape: tuple[int, int, int],
        skip: bool,
    ) -> None:
        """Make one.

        Args:
          files: the shards.
          index: for each record its shard, number, offset, length, crc, and whether it is raw.
          image_shape: of each image.
          skip: leave a damaged record out, where else it is an error.
        """
        self.files, self.index, self._skip = files, index, skip
        self.shape = (len(index["offset"]), *image_shape)
        self.nbytes = int(np.prod(self.shape))
        self.skipped: dict[str, None] = {}
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(files) + 256 > soft:  # every shard stays open
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def __len__(self) -> int:
        return self.shape[0]

    def select(self, rows: np.ndarray | slice) -> "Records":
        """Some of the records, in this order; nothing is read."""
        index = {name: column[rows] for name, column in self.index.items()}
        return Records(self.files, index, self.shape[1:], self._skip)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """The images of these rows.

        Raises:
          UserError: a record is not the one that was indexed.
        """
        rows = np.arange(len(self))[rows]
        if not len(rows):
            return np.zeros((0, *self.shape[1:]), np.uint8)
        images = []
        for first in range(0, len(rows), CHUNK):
            part = rows[first : first + CHUNK]
            examples = tf.constant([self._read(row) for row in part.tolist()])
            images.append(self._decode(examples, tf.constant(self.index["raw"][part])).numpy())
        return np.concatenate(images)

    @functools.cached_property
    def _decode(self) -> Callable:
        signature = [tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.bool)]
        to_images = functools.partial(decode, image_shape=self.shape[1:])
        return tf.function(to_images, autograph=False, input_signature=signature)

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(serialized examples, whether each is raw, 1 or 0 for each).

        0 stands where a record is damaged and another one stands in its place.

        Raises:
          UserError: a record is damaged, and none is to be left out.
        """
        records: list[bytes | None] = []
        whole = np.ones(len(rows), np.float32)
        for place, row in enumerate(rows.tolist()):
            try:
                records.append(self._read(row))
            except UserError as error:
                if not self._skip:
                    raise
                self.skipped[str(error).partition(" is damaged")[0]] = None
                whole[place] = 0.0
                records.append(None)
        good = next((place for place, record in enumerate(records) if record is not None), None)
        if good is None:
            raise UserError(f"{self.files[0].parent}: a whole batch of records is damaged")
        raw = self.index["raw"][rows]
        raw = np.where(whole > 0, raw, raw[good])
        examples = [records[good] if record is None else record for record in records]
        return np.array(examples, object), raw, whole

    def _read(self, row: int) -> bytes:
        shard, offset, length = (
            int(self.index[name][row]) for name in ("shard", "offset", "length")
        )
        path = self.files[shard]
        try:
            with self._lock:
                if shard not in self._open:
                    self._open[shard] = os.open(path, os.O_RDONLY)
            record = os.pread(self._open[shard], length, offset)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if zlib.crc32(record) != int(self.index["crc"][row]):
            number = int(self.index["number"][row])
            raise UserError(
                f"{path}: record {number} is damaged: it is not the one that was indexed; remove "
                f"{INDEX} to have all of them checked anew"
            )
        return record

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def decode(examples: tf.Tensor, raw: tf.Tensor, image_shape: tuple[int, int, int]) -> tf.Tensor:
    """uint8 [n, *image_shape] from serialized examples that were checked before.

    Args:
      examples: [n] string.
      raw: [n] bool, whether each holds raw bytes.
      image_shape: (height, width, channels).
    """
    images = _image(tf.io.parse_example(examples, FEATURES))

    def decode_encoded(image: tf.Tensor) -> tf.Tensor:
        channels = image_shape[-1] if image_shape[-1] in (1, 3, 4) else 0  # as TensorFlow takes
        pixels = tf.io.decode_image(image, channels, expand_animations=False)
        return tf.ensure_shape(pixels, image_shape)

    def decode_one(image_and_raw: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        image, is_raw = image_and_raw
        return tf.cond(
            is_raw,
            lambda: tf.reshape(tf.io.decode_raw(image, tf.uint8), image_shape),
            lambda: decode_encoded(image),
        )

    side_by_side = None if tf.executing_eagerly() else 16  # TensorFlow warns of it there
    return tf.cond(
        tf.reduce_all(raw),
        lambda: tf.reshape(tf.io.decode_raw(images, tf.uint8), [-1, *image_shape]),
        lambda: tf.map_fn(
            decode_one,
            (images, raw),
            fn_output_signature=tf.uint8,
            parallel_iterations=side_by_side,
        ),
    )


def _image(parsed: dict[str, tf.Tensor]) -> tf.Tensor:
    image = parsed[IMAGE_KEYS[0]]
    for key in IMAGE_KEYS[1:]:
        image = tf.where(image == "", parsed[key], image)
    return image


def load(
    folder: str | Path,
    validation_size: int = 0,
    standardize: bool = True,
    seed: int = 0,
    skip: bool = False,
) -> Dataset:
    """The data set in a folder of shards.

    Args:
      folder: that of the shards.
      validation_size, standardize, seed: as in sources.load, but that the standardiser has seen the
        validation images, too.
      skip: leave out what is damaged, where else it is an error.

    Raises:
      UserError: a part is missing, a record is damaged, or its image or label does not fit the
        others.
    """
    folder = Path(folder)
    index = shard_index.of_folder(folder, skip)
    splits = {name: _split(part, index.image_shape, skip) for name, part in index.parts.items()}
    train, test = splits["train"], splits["test"]
    names = _class_names(folder)
    classes = max(int(train.targets.max()) + 1, index.classes, len(names))
    if names and len(names) < classes:
        raise UserError(
            f"{folder / 'classes.txt'}: holds {counted(len(names), 'name')}, a line "
            f"each, and there are {classes} classes; mend it, or remove it"
        )
    used = len(np.unique(train.targets))
    if classes - used > MOST_UNUSED and classes > 10 * used:
        raise UserError(
            f"--dataset={folder}: labels go up to {classes - 1}, and only {used} different ones "
            "are used; number the classes from 0 on"
        )
    if classes < 2 or int(test.targets.max()) >= classes:
        raise UserError(
            f"--dataset={folder}: training labels go from 0 to {classes - 1}, test labels to "
            f"{int(test.targets.max())}"
        )
    if "validation" in splits:
        if validation_size:
            raise UserError(
                f"--validation_size={validation_size}: --dataset={folder} has validation shards of "
                "its own; leave it out"
            )
        validation = splits["validation"]
        if int(validation.targets.max()) >= classes:
            raise UserError(
                f"--dataset={folder}: training labels go from 0 to {classes - 1}, validation "
                f"labels to {int(validation.targets.max())}"
            )
    else:
        train, validation = hold_out(train, validation_size, seed)
    fit = index.standardizer if standardize else Standardizer.identity(index.image_shape)
    kinds = {"": Target("classes", (), classes, names)}
    return Dataset(
        f"--dataset={folder}",
        train,
        validation,
        test,
        kinds,
        fit,
        left_out=tuple(index.damaged),
        notes=(*index.notes, *notes_on(train, kinds)),
        digest=index.state,
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    """The names in classes.txt, a line each; () where there is no such file."""
    path = folder / "classes.txt"
    if not path.is_file():
        return ()
    return tuple(path.read_text(encoding="utf-8", errors="replace").strip("\n").split("\n"))


def _split(part: shard_index.Part, image_shape: tuple[int, int, int], skip: bool) -> Split:
    columns = {name: column for name, column in part.columns.items() if name != "label"}
    return Split(
        Records(part.files, columns, image_shape, skip), part.columns["label"].astype(np.int64)
    )
