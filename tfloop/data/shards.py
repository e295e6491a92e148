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

import dataclasses
import functools
import hashlib
import os
import re
import resource
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfloop.data.arrays import hold_out, notes_on
from tfloop.data.dataset import Dataset, Split, Standardizer
from tfloop.data.readers import read_npz
from tfloop.data.targets import Target
from tfloop.data.tfrecords import PACKED, records, unpacked
from tfloop.errors import UserError
from tfloop.wording import shape_text

INDEX = "index.npz"
FORMAT = 3
PARTS = ("train", "test", "validation")  # the last may be missing
NAMES = {"train": ("train",), "test": ("test",), "validation": ("validation", "valid", "val")}
# "…tfrecord", "…tfrecords", and TF-slim's names without that word.
_SHARD = re.compile(r"tfrecords?(-\d+-of-\d+)?$|-\d{5}-of-\d{5}$")
_PLACE = re.compile(r"-(\d+)-of-(\d+)(?=\D*$)")
MOST_UNUSED = 1000  # class numbers; more beside few that are used are no numbers of classes
CHUNK = 1024  # records that are decoded at once
COLUMNS = {
    "shard": np.int32,
    "number": np.int32,
    "offset": np.int64,
    "length": np.int32,
    "crc": np.uint32,
    "raw": np.bool_,
    "label": np.int32,
}


def is_shard(path: Path) -> bool:
    """Is it, by its name, a shard: not hidden, and no copy with another ending?"""
    name = path.name
    return not name.startswith(".") and bool(_SHARD.search(PACKED.sub("", name)))


def shards(folder: str | Path, part: str) -> list[Path]:
    """The shards of a part in a folder, by name.

    Raises:
      UserError: some are missing, by the numbers in their names, or they are of two generations; or
        a compressed one cannot be unpacked.
    """
    files = sorted(p for p in Path(folder).iterdir() if is_shard(p) and p.is_file())
    found = [path for path in files if _is_of(path.name, part)]
    _check_complete(found)
    return [unpacked(path) for path in found]


def _is_of(name: str, part: str) -> bool:
    """Does a shard belong to a part: does its name begin with it, or hold it?"""
    return any(re.search(rf"^{word}(?![a-z])|-{word}\.", name) for word in NAMES[part])


def _check_complete(files: list[Path]) -> None:
    """Raises UserError where the numbers in the names, 3 of 10, do not make a whole."""
    by_base: dict[str, dict[int, set[int]]] = {}
    for path in files:
        if found := _PLACE.search(path.name):
            base = path.name[: found.start()]
            by_base.setdefault(base, {}).setdefault(int(found[2]), set()).add(int(found[1]))
    for base, by_count in by_base.items():
        if len(by_count) > 1:
            first, second, *_ = sorted(by_count)
            raise UserError(
                f"{files[0].parent}: holds shards of two sets, {base}-…-of-{first:05d} and "
                f"{base}-…-of-{second:05d}; remove those that do not belong to it"
            )
        ((count, numbers),) = by_count.items()
        if missing := sorted(set(range(count)) - numbers):
            name = f"{base}-{missing[0]:05d}-of-{count:05d}"
            raise UserError(
                f"{files[0].parent}: {len(missing)} of {count} shards are missing, the first is "
                f"{name}"
            )


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


IMAGE_KEYS = ("image", "image/encoded", "image_raw", "image/image_raw")
LABEL_KEYS = ("label", "image/class/label", "image/label")
# The index knows all else.
FEATURES = {key: tf.io.FixedLenFeature([], tf.string, "") for key in IMAGE_KEYS}


def decode(examples: tf.Tensor, raw: tf.Tensor, image_shape: tuple[int, int, int]) -> tf.Tensor:
    """uint8 [n, *image_shape] from serialized examples that were checked before.

    Args:
      examples: [n] string.
      raw: [n] bool, whether each holds raw bytes.
      image_shape: (height, width, channels).
    """
    images = _image(tf.io.parse_example(examples, FEATURES))

    def decode_encoded(image: tf.Tensor) -> tf.Tensor:
        pixels = tf.io.decode_image(image, image_shape[-1], expand_animations=False)
        return tf.ensure_shape(pixels, image_shape)

    def decode_one(image_and_raw: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        image, is_raw = image_and_raw
        return tf.cond(
            is_raw,
            lambda: tf.reshape(tf.io.decode_raw(image, tf.uint8), image_shape),
            lambda: decode_encoded(image),
        )

    return tf.cond(
        tf.reduce_all(raw),
        lambda: tf.reshape(tf.io.decode_raw(images, tf.uint8), [-1, *image_shape]),
        lambda: tf.map_fn(
            decode_one, (images, raw), fn_output_signature=tf.uint8, parallel_iterations=16
        ),
    )


def _image(parsed: dict[str, tf.Tensor]) -> tf.Tensor:
    image = parsed[IMAGE_KEYS[0]]
    for key in IMAGE_KEYS[1:]:
        image = tf.where(image == "", parsed[key], image)
    return image


# --- the index


@dataclasses.dataclass
class _Part:
    files: list[Path]
    columns: dict[str, np.ndarray]  # as COLUMNS
    damaged: list[str]


class _Index(NamedTuple):
    state: str  # of the shards that it is of
    parts: list[_Part]
    image_shape: tuple[int, int, int]
    standardizer: Standardizer

    @property
    def damaged(self) -> list[str]:
        return [name for part in self.parts for name in part.damaged]


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
    index = _indexed(folder, skip)
    splits = [_split(part, index.image_shape, skip) for part in index.parts]
    train, test = splits[:2]
    classes = int(train.targets.max()) + 1
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
    if len(splits) > 2:
        if validation_size:
            raise UserError(
                f"--validation_size={validation_size}: --dataset={folder} has validation shards of "
                "its own; leave it out"
            )
        validation = splits[2]
        if int(validation.targets.max()) >= classes:
            raise UserError(
                f"--dataset={folder}: training labels go from 0 to {classes - 1}, validation "
                f"labels to {int(validation.targets.max())}"
            )
    else:
        train, validation = hold_out(train, validation_size, seed)
    names = _class_names(folder, classes)
    fit = index.standardizer if standardize else Standardizer.identity(index.image_shape)
    return Dataset(
        f"--dataset={folder}",
        train,
        validation,
        test,
        {"": Target("classes", (), classes, names)},
        fit,
        left_out=tuple(index.damaged),
        notes=tuple(notes_on(train, {"": Target("classes", (), classes, names)})),
        digest=index.state,
    )


def _class_names(folder: Path, classes: int) -> tuple[str, ...]:
    """The names in classes.txt, a line each; () where it is none of so many classes."""
    path = folder / "classes.txt"
    if not path.is_file():
        return ()
    names = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return tuple(names) if len(names) == classes else ()


def _split(part: _Part, image_shape: tuple[int, int, int], skip: bool) -> Split:
    columns = {name: column for name, column in part.columns.items() if name != "label"}
    return Split(
        Records(part.files, columns, image_shape, skip), part.columns["label"].astype(np.int64)
    )


def _indexed(folder: Path, skip: bool) -> _Index:
    files = {part: shards(folder, part) for part in PARTS}
    if not files["validation"]:
        del files["validation"]
    for part, found in files.items():
        if not found:
            raise UserError(
                f"--dataset={folder}: has no {part} shards, files named like "
                f"{part}-00000-of-00004.tfrecord"
            )
    state = _state(list(files.values()))
    if index := _read_index(folder, state, files):
        if index.damaged and not skip:
            raise UserError(f"{index.damaged[0]}; --on_bad_record=skip leaves it out")
        return index
    scan = _Scan(skip)
    parts = [scan.part(found, fit=part == "train") for part, found in files.items()]
    index = _Index(state, parts, scan.image_shape, scan.standardizer())
    _write_index(folder, index)
    return index


def _state(files: list[list[Path]]) -> str:
    """Changes with the name, size or date of any shard."""
    paths = [path for part in files for path in part]
    about = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr((FORMAT, about)).encode()).hexdigest()


def _read_index(folder: Path, state: str, files: dict[str, list[Path]]) -> _Index | None:
    """None where there is no index of these very files."""
    if not (folder / INDEX).is_file():
        return None
    try:
        arrays = read_npz(folder / INDEX)
        if str(arrays["state"]) != state:
            return None
        parts = []
        for part, shard_files in files.items():
            columns = {name: arrays[f"{part}_{name}"] for name in COLUMNS}
            parts.append(_Part(shard_files, columns, arrays[f"{part}_damaged"].tolist()))
        fit = Standardizer(arrays["mean"], arrays["scale"])
        return _Index(state, parts, tuple(arrays["image_shape"].tolist()), fit)
    except (UserError, KeyError):  # damaged, so of no use
        return None


def _write_index(folder: Path, index: _Index) -> None:
    arrays: dict[str, np.ndarray] = {
        "state": np.array(index.state),
        "image_shape": np.array(index.image_shape),
        "mean": index.standardizer.mean,
        "scale": index.standardizer.scale,
    }
    for name, part in zip(PARTS, index.parts, strict=False):
        arrays |= {f"{name}_{column}": values for column, values in part.columns.items()}
        arrays[f"{name}_damaged"] = np.array(part.damaged, dtype=np.str_)
    partial = folder / f"{INDEX}.{os.getpid()}.partial.npz"
    try:
        np.savez(partial, **arrays)  # type: ignore[arg-type]  # arrays by name
        partial.replace(folder / INDEX)
    except OSError:  # a folder that may not be written to is indexed anew each time
        partial.unlink(missing_ok=True)


class _Problem(Exception):
    """What is wrong with a record."""


class _Scan:
    """Reads every record once: checks it, notes where it lies, and fits the standardiser.

    Attributes:
      image_shape: that of the first image, which all must have.
    """

    def __init__(self, skip: bool) -> None:
        from sklearn.preprocessing import StandardScaler

        self.image_shape: Any = None
        self._skip, self._scaler = skip, StandardScaler()

    def standardizer(self) -> Standardizer:
        return Standardizer.of_scaler(self._scaler, self.image_shape)

    def part(self, files: list[Path], fit: bool) -> _Part:
        """All records of a part; `fit` the standardiser on them, too."""
        rows: list[tuple] = []
        damaged: list[str] = []
        waiting: list[np.ndarray] = []  # to be fitted
        for shard, path in enumerate(files):
            for number, offset, record, problem in records(path):
                try:
                    if problem:
                        raise _Problem(problem)
                    image, raw, label = self._check(record)
                except _Problem as found:
                    damaged.append(f"{path}: record {number} {found}")
                    if not self._skip:
                        raise UserError(
                            f"{damaged[-1]}; --on_bad_record=skip leaves it out"
                        ) from None
                    continue
                crc = zlib.crc32(record)
                rows.append((shard, number, offset, len(record), crc, raw, label))
                if fit:
                    waiting.append(image)
                if len(waiting) == Standardizer.at_once(image.size):
                    self._fit(waiting)
        self._fit(waiting)
        if not rows:
            names = ", ".join(path.name for path in files[:3])
            raise UserError(f"{files[0].parent}: there are no records in {names}")
        columns: dict[str, np.ndarray] = {
            name: np.array(column, dtype)
            for (name, dtype), column in zip(COLUMNS.items(), zip(*rows, strict=True), strict=True)
        }
        return _Part(files, columns, damaged)

    def _fit(self, waiting: list[np.ndarray]) -> None:
        if waiting:
            self._scaler.partial_fit(np.stack(waiting).reshape(len(waiting), -1))
        waiting.clear()

    def _check(self, record: bytes) -> tuple[np.ndarray, bool, int]:
        """(image, is it raw bytes, label)

        Raises:
          _Problem: the record is no example with an image and a label that fit the others.
        """
        try:
            features = tf.train.Example.FromString(record).features.feature
        except Exception:  # google.protobuf's DecodeError is not the only one
            raise _Problem("is no tf.train.Example") from None
        image = _first(features, IMAGE_KEYS, "bytes_list")
        if image is None:
            found = ", ".join(features) or "nothing"
            raise _Problem(f"has no image: no bytes under {' or '.join(IMAGE_KEYS)}; found {found}")
        label = _label(features)
        pixels, raw = self._pixels(features, image)
        self.image_shape = self.image_shape or pixels.shape
        if pixels.shape != self.image_shape:
            expected = shape_text(self.image_shape)
            raise _Problem(f"is {shape_text(pixels.shape)}, the first record {expected}")
        return pixels, raw, label

    def _pixels(self, features: Any, image: bytes) -> tuple[np.ndarray, bool]:
        """(the image, is it raw bytes)"""
        named = [_first(features, (key,), "int64_list") for key in ("height", "width", "channels")]
        sizes = [size for size in named if size is not None]
        volume = np.prod(sizes, dtype=np.int64)
        may_be_raw = len(sizes) == 3 and len(image) == volume > 0
        says_raw = features["format"].bytes_list.value[:] == [b"raw"]
        if not (may_be_raw and says_raw):
            # A PNG can be just as long as its raw bytes: decode first, then think of these.
            channels = self.image_shape[-1] if self.image_shape else 0
            try:
                decoded = tf.io.decode_image(image, channels, expand_animations=False)
                return decoded.numpy(), False
            except tf.errors.OpError:
                if not may_be_raw:
                    raise _Problem(
                        "holds an image that is neither PNG, JPEG, GIF, BMP nor raw bytes of "
                        "height × width × channels"
                    ) from None
        return np.frombuffer(image, np.uint8).reshape(sizes), True


def _label(features: Any) -> int:
    """The class number of an example: one whole number, or a row of one 1 and else 0.

    Raises:
      _Problem: there is none.
    """
    key = next((key for key in LABEL_KEYS if key in features), None)
    if key is None:
        found = ", ".join(features) or "nothing"
        raise _Problem(f"has no label: nothing under {' or '.join(LABEL_KEYS)}; found {found}")
    kind = features[key].WhichOneof("kind")
    values = list(getattr(features[key], kind).value) if kind else []
    if kind == "bytes_list":
        raise _Problem(f"has a label in {key} that is text; it must be a class number, int64")
    if len(values) > 1:
        if sorted(values) != [0] * (len(values) - 1) + [1]:
            raise _Problem(
                f"has {len(values)} numbers as a label in {key}, which are no one-hot row"
            )
        return values.index(1)
    if not values or values[0] != int(values[0]) or not 0 <= values[0] < 2**31 - 1:
        raise _Problem(
            f"has the label {values[0] if values else 'nothing'} in {key}; it must be a class "
            "number, from 0 on"
        )
    return int(values[0])


def _first(features: Any, keys: tuple[str, ...], kind: str) -> Any:
    """The first value under any of these keys; None where there is none."""
    for key in keys:
        if key in features and (values := getattr(features[key], kind).value):
            return values[0]
    return None
