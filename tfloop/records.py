"""Data sets larger than memory: folders of TFRecord shards, of which any record can be read at any time.

A shard is a TFRecord file of tf.train.Example with an image (PNG, JPEG, or raw bytes with height, width and channels, and
best with format "raw") and a label. Its name begins with the part it belongs to, "train-00000-of-00004.tfrecord", "test-…", or holds it
("mnist-train.tfrecord-00000-of-00001"). The first time a folder is used every record is read once and checked, and an
index is left there: where each record lies, its CRC-32 and label, and the mean and scale of the pixels. After that, memory holds
the index, 29 bytes a record, and nothing of the images: a batch is read from its places in the shards.
"""

import dataclasses
import functools
import hashlib
import os
import resource
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfloop.data import Dataset, Split, Standardizer, hold_out
from tfloop.errors import UserError
from tfloop.formats import read_npz
from tfloop.pipelines import UNTUNED

INDEX = "index.npz"
FORMAT = 2
HEADER, FOOTER = 12, 4  # bytes around a record: its length and the CRC of that, and its own CRC
CHUNK = 1024  # records that are decoded at once


def shards(folder: str | Path, part: str) -> list[Path]:
    """The shards of "train" or "test" in a folder, by name."""
    files = sorted(path for path in Path(folder).glob("*tfrecord*") if path.is_file())
    return [path for path in files if path.name.startswith(part) or f"-{part}." in path.name]


class Records:
    """The images of a part, as an array that is read when it is indexed: images[5:9], images[rows].

    Attributes:
      shape: (N, height, width, channels); dtype: uint8; nbytes: what they would take in memory.
      skipped: the records that were found damaged and left out since, "FILE: record 7".
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, files: list[Path], index: dict[str, np.ndarray], image_shape: tuple[int, int, int], skip: bool):
        """Args: the shards; for each record its shard, number, offset, length and crc; the shape of an image; what to do
        with a record that is damaged: leave it out, or stop."""
        self.files, self.index, self._skip = files, index, skip
        self.shape = (len(index["offset"]), *image_shape)
        self.nbytes = int(np.prod(self.shape))
        self.skipped: dict[str, None] = {}
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()
        most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(files) + 256 > most[0]:  # every shard stays open
            resource.setrlimit(resource.RLIMIT_NOFILE, (most[1], most[1]))

    def __len__(self) -> int:
        return self.shape[0]

    def select(self, rows: np.ndarray | slice) -> "Records":
        """Some of the records, in this order; nothing is read."""
        return Records(self.files, {name: column[rows] for name, column in self.index.items()}, self.shape[1:], self._skip)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """The images of these rows.

        Raises:
          UserError: a record is not the one that was indexed.
        """
        rows = np.arange(len(self))[rows]
        if not len(rows):
            return np.zeros((0, *self.shape[1:]), np.uint8)
        parts = [rows[first:first + CHUNK] for first in range(0, len(rows), CHUNK)]
        return np.concatenate([self._decode(tf.constant([self._read(row) for row in part.tolist()]),
                                            tf.constant(self.index["raw"][part])).numpy() for part in parts])

    @functools.cached_property
    def _decode(self):
        shape = self.shape[1:]
        return tf.function(lambda examples, raw: decode(examples, raw, shape), autograph=False,
                           input_signature=[tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.bool)])

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(serialized examples, whether each is raw, 1 or 0 for each): 0 where a record is damaged and another stands there.

        Raises:
          UserError: a record is damaged, and none is to be left out.
        """
        found, raw, fine = [], self.index["raw"][rows], np.ones(len(rows), np.float32)
        for place, row in enumerate(rows.tolist()):
            try:
                found.append(self._read(row))
            except UserError as error:
                if not self._skip:
                    raise
                self.skipped[str(error).partition(" is damaged")[0]] = None
                fine[place] = 0.0
                found.append(None)
        good = next((place for place, record in enumerate(found) if record is not None), None)
        if good is None:
            raise UserError(f"{self.files[0].parent}: a whole batch of records is damaged")
        raw = np.where(fine > 0, raw, raw[good])
        return np.array([found[good] if record is None else record for record in found], object), raw, fine

    def _read(self, row: int) -> bytes:
        shard, offset, length = (int(self.index[name][row]) for name in ("shard", "offset", "length"))
        try:
            with self._lock:
                if shard not in self._open:
                    self._open[shard] = os.open(self.files[shard], os.O_RDONLY)
            record = os.pread(self._open[shard], length, offset)
        except OSError as error:
            raise UserError(f"{self.files[shard]}: cannot be read: {error.strerror}") from None
        if zlib.crc32(record) != int(self.index["crc"][row]):
            raise UserError(f"{self.files[shard]}: record {int(self.index['number'][row])} is damaged: it is not the one that was indexed; "
                            f"remove {INDEX} to have all of them checked anew")
        return record

    def __del__(self):
        for descriptor in self._open.values():
            os.close(descriptor)


IMAGE_KEYS, LABEL_KEYS = ("image", "image/encoded"), ("label", "image/class/label")
FEATURES = {key: tf.io.FixedLenFeature([], tf.string, "") for key in IMAGE_KEYS}  # the index knows all else


def decode(examples: tf.Tensor, raw: tf.Tensor, image_shape: tuple[int, int, int]) -> tf.Tensor:
    """uint8 [n, *image_shape] from serialized examples [n] that were checked before, and whether each holds raw bytes."""
    images = _image(tf.io.parse_example(examples, FEATURES))
    encoded = lambda image: tf.ensure_shape(tf.io.decode_image(image, image_shape[-1], expand_animations=False), image_shape)
    plain = lambda image: tf.reshape(tf.io.decode_raw(image, tf.uint8), image_shape)
    one = lambda each: tf.cond(each[1], lambda: plain(each[0]), lambda: encoded(each[0]))
    return tf.cond(tf.reduce_all(raw), lambda: tf.reshape(tf.io.decode_raw(images, tf.uint8), [-1, *image_shape]),
                   lambda: tf.map_fn(one, (images, raw), fn_output_signature=tf.uint8, parallel_iterations=16))


def _image(parsed: dict[str, tf.Tensor]) -> tf.Tensor:
    first, second = (parsed[key] for key in IMAGE_KEYS)
    return tf.where(first == "", second, first)


# --- the index


@dataclasses.dataclass
class _Part:
    files: list[Path]
    columns: dict[str, np.ndarray]  # as COLUMNS
    damaged: list[str]


def load(folder: str | Path, validation_size: int = 0, standardize: bool = True, seed: int = 0, skip: bool = False) -> Dataset:
    """The data set in a folder of shards.

    Args:
      validation_size, standardize, seed: as sources.load, but that the standardiser has seen the validation images, too.
      skip: leave out what is damaged, where else it is an error.

    Raises:
      UserError: a part is missing, a record is damaged, or its image or label does not fit the others.
    """
    folder = Path(folder)
    state, parts, shape, fit = _indexed(folder, skip)
    train, test = (Split(Records(part.files, {k: v for k, v in part.columns.items() if k != "label"}, shape, skip),
                         part.columns["label"]) for part in parts)
    classes = int(train.labels.max()) + 1
    if classes < 2 or int(test.labels.max()) >= classes:
        raise UserError(f"--dataset={folder}: training labels go from 0 to {classes - 1}, test labels to {int(test.labels.max())}")
    train, validation = hold_out(train, validation_size, seed)
    return Dataset(f"--dataset={folder}", train, validation, test, classes, fit if standardize else Standardizer.identity(shape),
                   left_out=tuple(parts[0].damaged + parts[1].damaged), digest=state)


def _indexed(folder: Path, skip: bool) -> tuple[str, list[_Part], tuple[int, int, int], Standardizer]:
    files = [shards(folder, part) for part in ("train", "test")]
    if missing := [part for part, found in zip(("train", "test"), files) if not found]:
        raise UserError(f"--dataset={folder}: has no {missing[0]} shards, files named like {missing[0]}-00000-of-00004.tfrecord")
    state = _state(files)
    if found := _read_index(folder, state, files):
        if found[1][0].damaged + found[1][1].damaged and not skip:
            raise UserError(f"{(found[1][0].damaged + found[1][1].damaged)[0]}; --on_bad_record=skip leaves it out")
        return found
    scan, parts = _Scan(skip), []
    for part, shard_files in zip(("train", "test"), files):
        parts.append(scan.part(shard_files, fit=part == "train"))
    _write_index(folder, state, parts, scan)
    return state, parts, scan.shape, scan.standardizer()


def _state(files: list[list[Path]]) -> str:
    """Changes with the name, size or date of any shard."""
    about = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for part in files for path in part]
    return hashlib.sha256(repr((FORMAT, about)).encode()).hexdigest()


def _read_index(folder: Path, state: str, files: list[list[Path]]):
    """What `_indexed` returns, or None where there is no index of these very files."""
    if not (folder / INDEX).is_file():
        return None
    try:
        arrays = read_npz(folder / INDEX)
        if str(arrays["state"]) != state:
            return None
        parts = [_Part(shard_files, {name: arrays[f"{part}_{name}"] for name in COLUMNS}, arrays[f"{part}_damaged"].tolist())
                 for part, shard_files in zip(("train", "test"), files)]
        return state, parts, tuple(arrays["image_shape"].tolist()), Standardizer(arrays["mean"], arrays["scale"])
    except (UserError, KeyError):  # damaged, so of no use
        return None


COLUMNS = {"shard": np.int32, "number": np.int32, "offset": np.int64, "length": np.int32, "crc": np.uint32, "raw": np.bool_,
           "label": np.int32}


def _write_index(folder: Path, state: str, parts: list[_Part], scan: "_Scan") -> None:
    fit = scan.standardizer()
    arrays = {"state": np.array(state), "image_shape": np.array(scan.shape), "mean": fit.mean, "scale": fit.scale}
    for name, part in zip(("train", "test"), parts):
        arrays |= {f"{name}_{column}": values for column, values in part.columns.items()}
        arrays[f"{name}_damaged"] = np.array(part.damaged, dtype=np.str_)
    partial = folder / f"{INDEX}.{os.getpid()}.partial.npz"
    try:
        np.savez(partial, **arrays)
        partial.replace(folder / INDEX)
    except OSError:  # a folder that may not be written to is indexed anew each time
        partial.unlink(missing_ok=True)


class _Scan:
    """Reads every record once: checks it, notes where it lies, and fits the standardiser."""

    def __init__(self, skip: bool):
        from sklearn.preprocessing import StandardScaler

        self.shape, self._skip, self._scaler = None, skip, StandardScaler()

    def standardizer(self) -> Standardizer:
        return Standardizer(self._scaler.mean_.reshape(self.shape).astype(np.float32),
                            self._scaler.scale_.reshape(self.shape).astype(np.float32))

    def part(self, files: list[Path], fit: bool) -> _Part:
        rows, damaged, waiting = [], [], []

        def flush() -> None:
            if waiting and fit:
                self._scaler.partial_fit(np.stack(waiting).reshape(len(waiting), -1))
            waiting.clear()

        for shard, path in enumerate(files):
            for number, offset, record, problem in _records(path):
                image, raw, label, problem = (None, False, -1, problem) if problem else self._check(record)
                if problem:
                    damaged.append(f"{path}: record {number} {problem}")
                    if not self._skip:
                        raise UserError(f"{damaged[-1]}; --on_bad_record=skip leaves it out")
                    continue
                rows.append((shard, number, offset, len(record), zlib.crc32(record), raw, label))
                waiting.append(image)
                if len(waiting) == Standardizer.at_once(image.size):
                    flush()
        flush()
        if not rows:
            raise UserError(f"{files[0].parent}: there are no records in {', '.join(path.name for path in files[:3])}")
        columns = {name: np.array(column, dtype) for (name, dtype), column in zip(COLUMNS.items(), zip(*rows))}
        return _Part(files, columns, damaged)

    def _check(self, record: bytes) -> tuple[np.ndarray | None, bool, int, str]:
        """(image, is it raw bytes, label, "" or what is wrong)"""
        try:
            features = tf.train.Example.FromString(record).features.feature
        except Exception:  # google.protobuf's DecodeError is not the only one
            return None, False, -1, "is no tf.train.Example"
        image = next((features[key].bytes_list.value[0] for key in IMAGE_KEYS if key in features and features[key].bytes_list.value), None)
        label = next((features[key].int64_list.value[0] for key in LABEL_KEYS if key in features and features[key].int64_list.value), -1)
        if image is None or not 0 <= label < 2**31 - 1:
            return None, False, -1, f"has no {' or '.join(IMAGE_KEYS) if image is None else ' or '.join(LABEL_KEYS)}; found {', '.join(features) or 'nothing'}"
        sizes = [features[key].int64_list.value[0] for key in ("height", "width", "channels")
                 if key in features and features[key].int64_list.value]
        may_be_raw = len(sizes) == 3 and len(image) == np.prod(sizes, dtype=np.int64) > 0
        raw, pixels = may_be_raw and features["format"].bytes_list.value[:] == [b"raw"], None
        if not raw:  # a PNG can be just as long as its raw bytes: decode first, then think of these
            try:
                pixels = tf.io.decode_image(image, self.shape[-1] if self.shape else 0, expand_animations=False).numpy()
            except tf.errors.OpError:
                raw = may_be_raw
        if raw:
            pixels = np.frombuffer(image, np.uint8).reshape(sizes)
        if pixels is None:
            return None, False, -1, "holds an image that is neither PNG, JPEG, GIF, BMP nor raw bytes of height × width × channels"
        self.shape = self.shape or pixels.shape
        if pixels.shape != self.shape:
            return None, False, -1, f"is {'×'.join(map(str, pixels.shape))}, the first record {'×'.join(map(str, self.shape))}"
        return pixels, raw, label, ""


def _records(path: Path) -> Iterator[tuple[int, int, bytes, str]]:
    """(number, offset of the content, content, "" or what is wrong) of each record of a shard, in order.

    TensorFlow checks the CRCs. After a record whose content is damaged the next one is found by its length; after a damaged length
    nothing is.
    """
    size, number, start = path.stat().st_size, 0, 0
    whole = tf.data.TFRecordDataset(str(path)).with_options(UNTUNED).as_numpy_iterator()
    while start < size:
        try:
            record = next(whole) if whole else _check_record(path, start)
        except StopIteration:
            return
        except (tf.errors.DataLossError, _Damaged):
            length = _length(path, start)
            if length is None or start + HEADER + length + FOOTER > size:
                yield number, start, b"", "is truncated or damaged, and with it the rest of the file"
                return
            yield number, start + HEADER, b"", "is damaged: its CRC is wrong"
            whole, start, number = None, start + HEADER + length + FOOTER, number + 1
            continue
        except tf.errors.OpError as error:
            raise UserError(f"{path}: cannot be read: {error.message.splitlines()[0]}") from None
        yield number, start + HEADER, record, ""
        start, number = start + HEADER + len(record) + FOOTER, number + 1


class _Damaged(Exception):
    pass


def _length(path: Path, start: int) -> int | None:
    """The length of the record that starts here; None where that itself is damaged."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    with open(path, "rb") as file:
        file.seek(start)
        header = file.read(HEADER)
    if len(header) < HEADER or masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
        return None
    return int.from_bytes(header[:8], "little")


def _check_record(path: Path, start: int) -> bytes:
    """The record that starts here, checked in Python: TensorFlow cannot begin in the middle of a file."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = _length(path, start)
    if length is None:
        raise _Damaged
    with open(path, "rb") as file:
        file.seek(start + HEADER)
        record, crc = file.read(length), file.read(FOOTER)
    if len(crc) < FOOTER or masked_crc32c(record) != int.from_bytes(crc, "little"):
        raise _Damaged
    return record
