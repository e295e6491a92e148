"""What a data set is: images, labels and a standardiser, checked. NumPy and scikit-learn only.

Everything a model must know of its data (image shape, number of classes, the standardiser) follows from the images and
labels. Where they come from is in `sources`, how they reach the step in `pipelines`.
"""

import dataclasses
import functools
import zlib

import numpy as np

from tfloop.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """Images [N, height, width, channels], uint8 or float32, and their class numbers [N], int32.

    The images of a data set that stays on disk are `records.Records`.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def tensors(self) -> tuple:
        """(images, labels) as variables on the device, one copy for all who ask.

        Of a variable a GPU gathers uint8, too; of a constant the CPU would, for it. Labels are int64, since TensorFlow
        keeps int32 on the CPU.
        """
        import tensorflow as tf

        return tf.Variable(self.images[:], trainable=False), tf.Variable(self.labels.astype("int64"), trainable=False)

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

    def without_test(self) -> "Dataset":
        """The same without test images, for choices that are not to be made on them."""
        return dataclasses.replace(self, test=self.test.take(slice(0)))

    def head(self, size: int) -> "Dataset":
        """The first `size` images of each part."""
        rows = slice(size)
        return dataclasses.replace(self, train=self.train.take(rows), validation=self.validation.take(rows),
                                   test=self.test.take(rows))


def from_arrays(x_train, y_train, x_test, y_test, name: str = "arrays", split: str = "standard",
                validation_size: int = 0, standardize: bool = True, seed: int = 0) -> Dataset:
    """As `load`, from NumPy arrays: images [N, height, width] or [N, height, width, channels], labels as class
    numbers or one-hot rows. `name` is what error messages call them."""
    train, test, classes = _check(name, *((np.asarray(x), np.asarray(y)) for x, y in ((x_train, y_train), (x_test, y_test))))
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
