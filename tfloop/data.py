"""Where the images come from: the shipped MNIST, scikit-learn's digits, IDX folders and .npz files.

Everything a model must know of its data (image shape, number of classes, the standardiser) follows from the files.
NumPy and scikit-learn only; how the images reach the step is in `pipelines`.
"""

import dataclasses
import gzip
import hashlib
import io
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from tfloop.errors import UserError

SHIPPED = {"mnist": Path(__file__).parent / "datasets" / "mnist"}
IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
DEFLATE_LIMIT = 1032  # bytes out per byte in, at most: https://zlib.net/zlib_tech.html


@dataclasses.dataclass(frozen=True)
class Split:
    """Images [N, height, width, channels], uint8 or float32, and their class numbers [N], int32.

    The images of a data set that stays on disk are `records.Records`.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray | slice) -> "Split":
        select = getattr(self.images, "select", self.images.__getitem__)  # records.Records reads nothing for it
        return Split(select(rows), self.labels[rows])


@dataclasses.dataclass(frozen=True)
class Standardizer:
    """x → (x - mean) / scale, by pixel. Shapes [height, width, channels], float32."""

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, images: np.ndarray) -> "Standardizer":
        """scikit-learn's StandardScaler over `images`; a pixel that never varies keeps scale 1."""
        from sklearn.preprocessing import StandardScaler

        scaler, part = StandardScaler(), cls.at_once(images[0].size)
        for first in range(0, len(images), part):
            scaler.partial_fit(images[first:first + part].reshape(-1, images[0].size))
        shape = images.shape[1:]
        return cls(scaler.mean_.reshape(shape).astype(np.float32), scaler.scale_.reshape(shape).astype(np.float32))

    @staticmethod
    def at_once(pixels: int) -> int:
        """How many images of so many pixels are fitted at once: the scaler works in float64."""
        return min(8192, max(1, 2**23 // pixels))

    @classmethod
    def identity(cls, shape: tuple[int, ...]) -> "Standardizer":
        return cls(np.zeros(shape, np.float32), np.ones(shape, np.float32))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training, validation (maybe empty) and test images of one source."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    standardizer: Standardizer
    left_out: tuple[str, ...] = ()  # damaged records, where they are left out
    digest: str = ""  # of what is on disk, where the images stay there

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train.images.shape[1:]

    @property
    def fingerprint(self) -> int:
        """A number below 2**31 that differs, all but surely, for other training images, labels or their order."""
        if self.digest:
            return zlib.crc32(self.train.labels.tobytes(), zlib.crc32(self.train.images.index["crc"].tobytes())) >> 1
        return zlib.crc32(self.train.labels.tobytes(), zlib.crc32(np.ascontiguousarray(self.train.images).data)) >> 1

    def head(self, size: int) -> "Dataset":
        """The first `size` images of each part."""
        rows = slice(size)
        return dataclasses.replace(self, train=self.train.take(rows), validation=self.validation.take(rows),
                                   test=self.test.take(rows))


def load(dataset: str = "mnist", split: str = "standard", validation_size: int = 0, standardize: bool = True,
         seed: int = 0, on_bad_record: str = "stop") -> Dataset:
    """Read a data set, check it, cut it and fit the standardiser on its training images.

    Args:
      dataset: "mnist", "digits", or the path of a folder with IDX files or TFRecord shards (see `records`), or of an .npz
        with x_train, y_train, x_test and y_test.
      split: "standard" keeps the set's own test images; "shuffled" joins all images, shuffles them by `seed` and
        cuts off as many for the test as the set had.
      validation_size: training images to hold out, the same share of every class.
      standardize: fit a `Standardizer`; otherwise it is the identity.
      seed: of the shuffle and of the choice of validation images.
      on_bad_record: "stop", or "skip" to leave out records of shards that are damaged.

    Raises:
      UserError: a missing, damaged or mislabelled file, or sizes that leave nothing to train on.
    """
    if dataset not in (*SHIPPED, "digits") and any(Path(dataset).glob("*tfrecord*")):
        from tfloop import records

        if split != "standard":
            raise UserError(f"--split={split}: shards keep the test images that they have; use --split=standard")
        return records.load(dataset, validation_size, standardize, seed, on_bad_record == "skip")
    (x_train, y_train), (x_test, y_test) = _read(dataset)
    return from_arrays(x_train, y_train, x_test, y_test, f"--dataset={dataset}", split, validation_size, standardize,
                       seed)


def from_arrays(x_train, y_train, x_test, y_test, name: str = "arrays", split: str = "standard",
                validation_size: int = 0, standardize: bool = True, seed: int = 0) -> Dataset:
    """As `load`, from NumPy arrays: images [N, height, width] or [N, height, width, channels], labels as class
    numbers or one-hot rows. `name` is what error messages call them."""
    train, test, classes = _check(name, (x_train, y_train), (x_test, y_test))
    if split not in ("standard", "shuffled"):
        raise UserError(f"--split={split} is unknown; choose from standard, shuffled")
    if split == "shuffled":
        joined = Split(np.concatenate([train.images, test.images]), np.concatenate([train.labels, test.labels]))
        order = np.random.default_rng(seed).permutation(len(joined))
        train, test = joined.take(order[len(test):]), joined.take(order[:len(test)])
    train, validation = hold_out(train, validation_size, seed)
    fit = Standardizer.fit(train.images) if standardize else Standardizer.identity(train.images.shape[1:])
    return Dataset(name, train, validation, test, classes, fit)


def hold_out(train: Split, size: int, seed: int) -> tuple[Split, Split]:
    """(the rest, `size` images in the proportions of the classes)."""
    if not size:
        return train, train.take(np.arange(0))
    if size >= len(train):
        raise UserError(f"--validation_size={size} leaves nothing to train on: there are {len(train)} training images")
    from sklearn.model_selection import train_test_split

    try:
        rest, held_out = train_test_split(np.arange(len(train)), test_size=size, random_state=seed,
                                          stratify=train.labels)
    except ValueError as error:
        raise UserError(f"--validation_size={size}: cannot be cut in the proportions of the classes: {error}") from None
    return train.take(np.sort(rest)), train.take(np.sort(held_out))


# --- sources


def _read(dataset: str) -> tuple[tuple, tuple]:
    """((training images, labels), (test images, labels)), as they lie in the source."""
    if dataset == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = digits.images.astype(np.uint8)
        rows, held_out = train_test_split(np.arange(len(images)), test_size=360, random_state=0,
                                          stratify=digits.target)
        return (images[rows], digits.target[rows]), (images[held_out], digits.target[held_out])
    if dataset in SHIPPED:
        return _read_idx_folder(SHIPPED[dataset], _read_sums(SHIPPED[dataset]))
    path = Path(dataset)
    if path.is_dir():
        return _read_idx_folder(path, {})
    if path.suffix == ".npz" and path.is_file():
        return _read_keras_npz(path)
    raise UserError(f"--dataset={dataset}: not mnist, digits, a folder of IDX files or TFRecord shards, or an .npz file")


def _read_sums(folder: Path) -> dict[str, str]:
    lines = (folder / "SHA256SUMS").read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def _read_idx_folder(folder: Path, sums: dict[str, str]) -> tuple[tuple, tuple]:
    def read(name: str) -> np.ndarray:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return read_idx(path, sums.get(path.name))
        raise UserError(f"--dataset={folder}: {name} or {name}.gz is missing")

    return tuple((read(f"{part}-images-idx3-ubyte"), read(f"{part}-labels-idx1-ubyte")) for part in ("train", "t10k"))


def read_idx(path: str | Path, sha256: str | None = None) -> np.ndarray:
    """The array in an IDX file (http://yann.lecun.com/exdb/mnist), plain or gzipped.

    Raises:
      UserError: the file is truncated, damaged, longer than its header says, or not the one with this SHA-256 sum.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path}: damaged: its SHA-256 sum is not the one in SHA256SUMS; fetch the file again")
    limit = len(content)
    if content[:2] == b"\x1f\x8b":
        limit *= DEFLATE_LIMIT
        content = gzip.GzipFile(fileobj=io.BytesIO(content))
    else:
        content = io.BytesIO(content)
    try:
        header = content.read(4)
        if len(header) < 4 or header[:2] != b"\0\0" or header[2] not in IDX_DTYPES:
            raise UserError(f"{path}: not an IDX file: it starts with {header[:4].hex() or 'nothing'}")
        rank, dtype = header[3], np.dtype(IDX_DTYPES[header[2]])
        sizes = content.read(4 * rank)
        if len(sizes) < 4 * rank:
            raise UserError(f"{path}: truncated in its header")
        shape = struct.unpack(f">{rank}I", sizes)
        expected = dtype.itemsize
        for size in shape:
            expected *= size
        if expected > limit:
            raise UserError(f"{path}: truncated: its header promises {expected} bytes, more than the file can hold")
        body = content.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if len(body) != expected:
        found = f"{len(body)} bytes follow" if len(body) < expected else "more follow"
        raise UserError(f"{path}: its header promises {expected} bytes of data, {found}")
    return np.frombuffer(body, dtype).reshape(shape)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays in an .npz file, read without pickle.

    Raises:
      UserError: the file is damaged, promises more than it can hold, or holds Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > os.path.getsize(path) * DEFLATE_LIMIT:
                raise UserError(f"{path}: damaged: it promises more data than the file can hold")
            for entry in entries:
                _check_npy(archive, entry, path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except UserError:
        raise
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile, struct.error, MemoryError,
            NotImplementedError, RuntimeError, SyntaxError, TypeError) as error:
        raise UserError(f"{path}: damaged or not an .npz of plain arrays: {error}") from None


def _check_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: str | Path) -> None:
    """Raises UserError where an array's header promises more than its entry holds: NumPy would make room for it first."""
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if math.prod(shape) * dtype.itemsize > entry.file_size:
        raise UserError(f"{path}: damaged: {entry.filename} promises more data than the file can hold")


def _read_keras_npz(path: Path) -> tuple[tuple, tuple]:
    arrays = read_npz(path)
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in arrays]
    if missing:
        raise UserError(f"{path}: has no {', '.join(missing)}; found {', '.join(arrays) or 'nothing'}")
    return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])


# --- checks


def _check(name: str, train: tuple, test: tuple) -> tuple[Split, Split, int]:
    """Both parts as Splits and the number of classes, or a UserError that says what does not fit."""
    parts = (train, test)
    train, test = (Split(check_images(images, f"{name}: {part} images"),
                         _class_numbers(labels, f"{name}: {part} labels"))
                   for part, (images, labels) in (("training", train), ("test", test)))
    for part, cut in (("training", train), ("test", test)):
        if len(cut.images) != len(cut.labels):
            raise UserError(f"{name}: {len(cut.images)} {part} images but {len(cut.labels)} labels")
        if not len(cut):
            raise UserError(f"{name}: there are no {part} images")
    if train.images.shape[1:] != test.images.shape[1:] or train.images.dtype != test.images.dtype:
        raise UserError(f"{name}: training images are {_describe(train.images)}, "
                        f"test images {_describe(test.images)}")
    widths = [np.shape(labels)[1] for _, labels in parts if np.ndim(labels) == 2 and np.shape(labels)[1] > 1]
    if len(set(widths)) > 1:
        raise UserError(f"{name}: one-hot labels have {widths[0]} columns for training and {widths[1]} for the test")
    classes = widths[0] if widths else int(train.labels.max()) + 1
    if classes < 2:
        raise UserError(f"{name}: all training labels are {classes - 1}: nothing to tell apart")
    if classes > len(train):
        raise UserError(f"{name}: label {classes - 1} is out of range for {len(train)} training images")
    if test.labels.max() >= classes:
        raise UserError(f"{name}: test label {test.labels.max()} is out of range: "
                        f"training labels go from 0 to {classes - 1}")
    return train, test, classes


def check_images(images: np.ndarray, where: str) -> np.ndarray:
    """[N, height, width, channels], uint8 or float32, all finite."""
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.ndim != 4 or images.dtype.kind not in "uif" or 0 in images.shape[1:]:
        raise UserError(f"{where}: expected numbers of shape (N, height, width) or (N, height, width, channels), "
                        f"found {images.dtype} {images.shape}")
    if images.dtype == np.uint8:
        return images
    with np.errstate(over="ignore"):
        images = images.astype(np.float32)
    bad = ~np.isfinite(images)
    if bad.any():
        raise UserError(f"{where}: image {int(np.argwhere(bad)[0][0])} has a pixel that is NaN or infinite")
    return images


def _class_numbers(labels: np.ndarray, where: str) -> np.ndarray:
    """[N] int32 from integers [N] or [N, 1], or from one-hot rows [N, classes]."""
    if labels.dtype.kind not in "uifb" or labels.ndim not in (1, 2):
        raise UserError(f"{where}: expected integers or one-hot rows, found {labels.dtype} {labels.shape}")
    if labels.ndim == 2 and labels.shape[1] > 1:
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all()):
            raise UserError(f"{where}: the rows of {labels.shape} are not one-hot")
        return labels.argmax(axis=1).astype(np.int32)
    labels = labels.reshape(-1)
    bad = ~((labels >= 0) & (labels < 2**31 - 1) & (labels == np.floor(labels)))
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(f"{where}: label {labels[row]} in row {row} is not a class number")
    return labels.astype(np.int32)


def _describe(images: np.ndarray) -> str:
    return f"{'×'.join(map(str, images.shape[1:]))} {images.dtype}"
