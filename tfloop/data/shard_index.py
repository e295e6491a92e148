"""The index of a folder of shards: every record is read once, checked, and found again.

It says where each record lies, its CRC-32 and label, and the mean and scale of the pixels.
"""

import dataclasses
import hashlib
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfloop.data import parts, shard_files
from tfloop.data.dataset import Standardizer
from tfloop.data.readers import read_npz
from tfloop.data.tfrecords import records
from tfloop.errors import UserError
from tfloop.wording import counted, listed, shape_text

INDEX = "index.npz"
FORMAT = 4
COLUMNS = {
    "shard": np.int32,
    "number": np.int32,
    "offset": np.int64,
    "length": np.int32,
    "crc": np.uint32,
    "raw": np.bool_,
    "label": np.int32,
}
IMAGE_KEYS = ("image", "image/encoded", "image_raw", "image/image_raw")
LABEL_KEYS = ("label", "image/class/label", "image/label")
_SIZE_KEYS = (
    ("height", "image/height"),
    ("width", "image/width"),
    ("channels", "depth", "image/channels", "image/depth"),
)
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass
class Part:
    """The records of a part: those that are whole, a row each, and what is wrong with others."""

    files: list[Path]
    columns: dict[str, np.ndarray]  # as COLUMNS
    damaged: list[str]

    def twice(self) -> tuple[Path, Path] | None:
        """Two shards that hold the same records, where there are such."""
        seen: dict[bytes, Path] = {}
        ends = np.searchsorted(self.columns["shard"], np.arange(len(self.files)), side="right")
        for path, first, end in zip(self.files, [0, *ends[:-1]], ends, strict=True):
            crcs, lengths = (self.columns[name][first:end] for name in ("crc", "length"))
            content = hashlib.sha256(crcs.tobytes() + lengths.tobytes()).digest()
            if (crcs[1:] != crcs[:-1]).any() and seen.setdefault(content, path) != path:
                return seen[content], path
        return None


class Index(NamedTuple):
    """What is known of a folder.

    Attributes:
      state: of the shards that it is of.
      parts: "train", "test" and maybe "validation".
      image_shape: of every image.
      standardizer: of the training images.
      classes: how many the labels tell of themselves, as one-hot rows do; 0 where they do not.
      notes: what looks as if it was meant otherwise.
    """

    state: str
    parts: dict[str, Part]
    image_shape: tuple[int, int, int]
    standardizer: Standardizer
    classes: int
    notes: tuple[str, ...]

    @property
    def damaged(self) -> list[str]:
        return [name for part in self.parts.values() for name in part.damaged]


def of_folder(folder: Path, skip: bool) -> Index:
    """The index that lies in the folder, or, where it is of other shards, a new one.

    Args:
      folder: that of the shards.
      skip: leave out what is damaged, where else it is an error.

    Raises:
      UserError: a part is missing, or a record is damaged, or its image or label does not fit the
        others.
    """
    files, others = shard_files.find(folder)
    notes = []
    if files["validation"] and not files["test"]:
        files["test"], files["validation"] = files["validation"], []
        notes.append(parts.NO_TEST)
    if others:
        notes.append(
            f"{counted(len(others), 'shard')} of no part left out, the first is {others[0].name}"
        )
    for part in ("train", "test"):
        if not files[part]:
            raise UserError(
                f"--dataset={folder}: has no {part} shards, files named like "
                f"{part}-00000-of-00004.tfrecord"
            )
    files = {part: found for part, found in files.items() if found}
    state = _state(files)
    index = _read(folder, state, files)
    if index is None:
        index = _scanned(state, files, skip)
        _write(folder, index)
    elif index.damaged and not skip:
        raise UserError(f"{index.damaged[0]}; --on_bad_record=skip leaves it out")
    return index._replace(notes=(*notes, *index.notes))


def _state(files: dict[str, list[Path]]) -> str:
    """Changes with the name, size or date of any shard."""
    about = [
        [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]
        for found in files.values()
    ]
    return hashlib.sha256(repr((FORMAT, about)).encode()).hexdigest()


def _read(folder: Path, state: str, files: dict[str, list[Path]]) -> Index | None:
    """None where there is no index of these very files."""
    if not (folder / INDEX).is_file():
        return None
    try:
        arrays = read_npz(folder / INDEX)
        if str(arrays["state"]) != state:
            return None
        found = {}
        for part, shards in files.items():
            columns = {name: arrays[f"{part}_{name}"] for name in COLUMNS}
            found[part] = Part(shards, columns, arrays[f"{part}_damaged"].tolist())
        shape = tuple(arrays["image_shape"].tolist())
        fit = Standardizer(arrays["mean"], arrays["scale"])
        notes = tuple(arrays["notes"].tolist())
        return Index(state, found, shape, fit, int(arrays["classes"]), notes)
    except (UserError, KeyError):  # damaged, so of no use
        return None


def _write(folder: Path, index: Index) -> None:
    arrays: dict[str, np.ndarray] = {
        "state": np.array(index.state),
        "image_shape": np.array(index.image_shape),
        "mean": index.standardizer.mean,
        "scale": index.standardizer.scale,
        "classes": np.array(index.classes),
        "notes": np.array(index.notes, dtype=np.str_),
    }
    for name, part in index.parts.items():
        arrays |= {f"{name}_{column}": values for column, values in part.columns.items()}
        arrays[f"{name}_damaged"] = np.array(part.damaged, dtype=np.str_)
    partial = folder / f"{INDEX}.{os.getpid()}.partial.npz"
    try:
        np.savez(partial, **arrays)  # type: ignore[arg-type]  # arrays by name
        partial.replace(folder / INDEX)
    except OSError:  # a folder that may not be written to is indexed anew each time
        partial.unlink(missing_ok=True)


# --- reading every record


class _Problem(Exception):
    """What is wrong with a record."""


class _Wider(Exception):
    """A picture has more channels than those before it: all are read anew, with as many."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.channels = channels


def _scanned(state: str, files: dict[str, list[Path]], skip: bool) -> Index:
    channels = 0
    while True:
        scan = _Scan(channels, skip)
        try:
            found = {part: scan.part(shards, part == "train") for part, shards in files.items()}
        except _Wider as wider:
            channels = wider.channels
            continue
        shape = scan.image_shape
        notes = [
            f"{counted(count, 'picture')} of {counted(own, 'channel')} read with {shape[-1]}"
            for own, count in sorted(scan.widened.items())
        ]
        notes += [
            f"{twice[0].name} and {twice[1].name} hold the same records"
            for part in found.values()
            if (twice := part.twice())
        ]
        return Index(state, found, shape, scan.standardizer(), scan.classes, tuple(notes))


class _Scan:
    """Checks every record, notes where it lies, and fits the standardiser.

    Attributes:
      image_shape: that of the first image, which all must have.
      classes: the length of the one-hot rows, where labels are such.
      widened: own channels → the pictures that have more now.
    """

    def __init__(self, channels: int, skip: bool) -> None:
        """Make one; `channels` of all pictures, or 0 for those of the first."""
        from sklearn.preprocessing import StandardScaler

        self.image_shape: Any = None
        self.classes = 0
        self.widened: dict[int, int] = {}
        self._channels, self._skip, self._scaler = channels, skip, StandardScaler()

    def standardizer(self) -> Standardizer:
        return Standardizer.of_scaler(self._scaler, self.image_shape)

    def part(self, files: list[Path], fit: bool) -> Part:
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
        return Part(files, columns, damaged)

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
        image = _image(features)
        label, width = _label(features)
        self.classes = max(self.classes, width)
        sizes = _sizes(features, len(image))
        says_raw = features["format"].bytes_list.value[:] == [b"raw"]
        # A PNG can be just as long as its raw bytes: decode first, then think of these.
        pixels = None if says_raw and sizes else self._decoded(image)
        is_raw = pixels is None
        if pixels is None:
            pixels = _raw(features, image, sizes)
        self.image_shape = self.image_shape or pixels.shape
        if pixels.shape != self.image_shape:
            expected = shape_text(self.image_shape)
            raise _Problem(f"is {shape_text(pixels.shape)}, the first record {expected}")
        return pixels, is_raw, label

    def _decoded(self, image: bytes) -> np.ndarray | None:
        """A picture's pixels, with as many channels as all have; None where it is none.

        Raises:
          _Wider: it has more.
        """
        if image.startswith(_PNG) and image[24:25] == b"\x10":
            raise _Problem("holds a PNG of 16 bits a channel; bring it to 8 bits")
        try:
            pixels = tf.io.decode_image(image, expand_animations=False).numpy()
        except tf.errors.OpError:
            return None
        own, all_have = pixels.shape[-1], self._channels or pixels.shape[-1]
        self._channels = all_have
        if own == all_have:
            return pixels
        # 2 are grey and transparent, which nothing is brought to.
        wider = 4 if 2 in (own, all_have) else max(own, all_have)
        if wider != all_have:
            raise _Wider(wider)
        try:
            pixels = tf.io.decode_image(image, all_have, expand_animations=False).numpy()
        except tf.errors.OpError:
            raise _Problem(
                f"holds a picture of {counted(own, 'channel')}, which cannot be read with "
                f"{all_have} as others have"
            ) from None
        self.widened[own] = self.widened.get(own, 0) + 1
        return pixels


def _image(features: Any) -> bytes:
    """The bytes of an example's image."""
    found = None
    for key in IMAGE_KEYS:
        if key in features and (kind := features[key].WhichOneof("kind")):
            values = getattr(features[key], kind).value
            if kind != "bytes_list" or len(values) != 1:
                what = "texts" if kind == "bytes_list" else "numbers"
                raise _Problem(f"has {len(values)} {what} under {key}, not the bytes of one image")
            found = found or values[0]
    if not found:
        names = ", ".join(features) or "nothing"
        raise _Problem(f"has no image: no bytes under {' or '.join(IMAGE_KEYS)}; found {names}")
    return found


def _sizes(features: Any, length: int) -> list[int]:
    """[height, width, channels] of raw bytes, so many; [] where they are not such."""
    found = []
    for keys in _SIZE_KEYS:
        named = [features[key].int64_list.value for key in keys if key in features]
        found.append(named[0][0] if named and len(named[0]) == 1 else 0)
    volume = found[0] * found[1]
    if volume > 0 and not found[2] and length % volume == 0:  # a table without channels
        found[2] = length // volume
        if found[2] not in (1, 3):  # 4 bytes may be one float32 as well
            raise _Problem(
                f"holds {counted(found[2], 'byte')} a pixel and does not say how many channels "
                f"that are; name them under {_SIZE_KEYS[2][0]}, one byte each"
            )
    return found if volume > 0 and volume * found[2] == length else []


def _raw(features: Any, image: bytes, sizes: list[int]) -> np.ndarray:
    if sizes:
        return np.frombuffer(image, np.uint8).reshape(sizes)
    known = [key for keys in _SIZE_KEYS for key in keys if key in features]
    raise _Problem(
        f"holds {len(image)} bytes that are neither PNG, JPEG, GIF, BMP nor, a byte each, height × "
        f"width × channels{f' as in {listed(known)}' if known else ''}"
    )


def _label(features: Any) -> tuple[int, int]:
    """(class number, length of the row) of one whole number, whose row is 0, or a one-hot row.

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
        return values.index(1), len(values)
    if not values or not 0 <= values[0] < 2**31 - 1 or values[0] != int(values[0]):
        raise _Problem(
            f"has the label {values[0] if values else 'nothing'} in {key}; it must be a class "
            "number, from 0 on"
        )
    return int(values[0]), 0
