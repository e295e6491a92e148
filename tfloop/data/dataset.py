"""What a data set is: images, labels and a standardiser, checked. NumPy and scikit-learn only.

Everything a model must know of its data (image shape, number of classes, the standardiser) follows
from the images and labels. Where they come from is in `sources`, how they reach the step in
`pipelines`.
"""

import dataclasses
import functools
import zlib
from typing import Any

import numpy as np

from tfloop.errors import UserError
from tfloop.wording import shape_text


@dataclasses.dataclass(frozen=True)
class Split:
    """Images [N, height, width, channels], uint8 or float32, and class numbers [N], int32.

    The images of a data set that stays on disk are `shards.Records`.
    """

    images: Any
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def tensors(self) -> tuple:
        """(images, labels) as variables on the device, one copy for all who ask.

        Of a variable a GPU gathers uint8, too; of a constant the CPU would, for it. Labels are
        int64, since TensorFlow keeps int32 on the CPU.
        """
        import tensorflow as tf

        images = tf.Variable(self.images[:], trainable=False)
        return images, tf.Variable(self.labels.astype("int64"), trainable=False)

    def take(self, rows: np.ndarray | slice) -> "Split":
        """Some of the examples, in this order; of images on disk nothing is read for it."""
        select = getattr(self.images, "select", self.images.__getitem__)
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

        pixels = images[0].size
        scaler, rows = StandardScaler(), cls.at_once(pixels)
        for first in range(0, len(images), rows):
            scaler.partial_fit(images[first : first + rows].reshape(-1, pixels))
        return cls.of_scaler(scaler, images.shape[1:])

    @classmethod
    def of_scaler(cls, scaler: Any, shape: tuple[int, ...]) -> "Standardizer":
        """That of a fitted StandardScaler, for images of this shape."""
        mean, scale = scaler.mean_.reshape(shape), scaler.scale_.reshape(shape)
        return cls(mean.astype(np.float32), scale.astype(np.float32))

    @staticmethod
    def at_once(pixels: int) -> int:
        """How many images of N pixels are fitted at once: the scaler works in float64."""
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
        """A number below 2**31 that differs, all but surely, for other training data or order."""
        if self.digest:
            pixels = zlib.crc32(self.train.images.index["crc"].tobytes())
        else:
            pixels = zlib.crc32(np.ascontiguousarray(self.train.images).data)
        return zlib.crc32(self.train.labels.tobytes(), pixels) >> 1

    def without_test(self) -> "Dataset":
        """The same without test images, for choices that are not to be made on them."""
        return dataclasses.replace(self, test=self.test.take(slice(0)))

    def head(self, size: int) -> "Dataset":
        """The first `size` images of each part."""
        rows = slice(size)
        return dataclasses.replace(
            self,
            train=self.train.take(rows),
            validation=self.validation.take(rows),
            test=self.test.take(rows),
        )


def from_arrays(
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    name: str = "arrays",
    split: str = "standard",
    validation_size: int = 0,
    standardize: bool = True,
    seed: int = 0,
) -> Dataset:
    """A data set of NumPy arrays, or of what NumPy makes arrays of.

    Args:
      x_train: training images [N, height, width] or [N, height, width, channels].
      y_train: their labels, class numbers [N] or one-hot rows [N, classes].
      x_test: test images.
      y_test: their labels.
      name: what error messages call them.
      split, validation_size, standardize, seed: as in `sources.load`.

    Raises:
      UserError: arrays that do not fit each other, or sizes that leave nothing to train on.
    """
    parts = [(np.asarray(x), np.asarray(y)) for x, y in ((x_train, y_train), (x_test, y_test))]
    train, test, classes = _check(name, *parts)
    if split not in ("standard", "shuffled"):
        raise UserError(f"--split={split} is unknown; choose from standard, shuffled")
    if split == "shuffled":
        images = np.concatenate([train.images, test.images])
        joined = Split(images, np.concatenate([train.labels, test.labels]))
        order = np.random.default_rng(seed).permutation(len(joined))
        train, test = joined.take(order[len(test) :]), joined.take(order[: len(test)])
    train, validation = hold_out(train, validation_size, seed)
    if standardize:
        fit = Standardizer.fit(train.images)
    else:
        fit = Standardizer.identity(train.images.shape[1:])
    return Dataset(name, train, validation, test, classes, fit)


def hold_out(train: Split, size: int, seed: int) -> tuple[Split, Split]:
    """(the rest, `size` images in the proportions of the classes)."""
    if not size:
        return train, train.take(np.arange(0))
    if size >= len(train):
        raise UserError(
            f"--validation_size={size} leaves nothing to train on: there are {len(train)} training "
            "images"
        )
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(train))
    try:
        rest, held_out = train_test_split(
            rows, test_size=size, random_state=seed, stratify=train.labels
        )
    except ValueError as error:
        raise UserError(
            f"--validation_size={size}: cannot be cut in the proportions of the classes: {error}"
        ) from None
    return train.take(np.sort(rest)), train.take(np.sort(held_out))


# --- checks


def _check(name: str, train: tuple, test: tuple) -> tuple[Split, Split, int]:
    """Both parts as Splits and the number of classes, or a UserError that says what is wrong."""
    splits = {part: _split(name, part, *given) for part, given in _named(train, test)}
    training, tested = splits["training"], splits["test"]
    if _describe(training.images) != _describe(tested.images):
        raise UserError(
            f"{name}: training images are {_describe(training.images)}, test images "
            f"{_describe(tested.images)}"
        )
    widths = [labels.shape[1] for _, labels in (train, test) if _is_one_hot(labels)]
    if len(set(widths)) > 1:
        raise UserError(
            f"{name}: one-hot labels have {widths[0]} columns for training and {widths[1]} for the "
            "test"
        )
    classes = widths[0] if widths else int(training.labels.max()) + 1
    if classes < 2:
        raise UserError(f"{name}: all training labels are {classes - 1}: nothing to tell apart")
    if classes > len(training):
        raise UserError(
            f"{name}: label {classes - 1} is out of range for {len(training)} training images"
        )
    if tested.labels.max() >= classes:
        raise UserError(
            f"{name}: test label {tested.labels.max()} is out of range: training labels go from 0 "
            f"to {classes - 1}"
        )
    return training, tested, classes


def _named(train: tuple, test: tuple) -> list[tuple[str, tuple]]:
    return [("training", train), ("test", test)]


def _split(name: str, part: str, images: np.ndarray, labels: np.ndarray) -> Split:
    checked = Split(
        check_images(images, f"{name}: {part} images"),
        _class_numbers(labels, f"{name}: {part} labels"),
    )
    if len(checked.images) != len(checked.labels):
        raise UserError(
            f"{name}: {len(checked.images)} {part} images but {len(checked.labels)} labels"
        )
    if not len(checked):
        raise UserError(f"{name}: there are no {part} images")
    return checked


def check_images(images: np.ndarray, where: str) -> np.ndarray:
    """[N, height, width, channels], uint8 or float32, all finite.

    Raises:
      UserError: an array of another kind, or a pixel that is not finite; `where` names it.
    """
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.ndim != 4 or images.dtype.kind not in "uif" or 0 in images.shape[1:]:
        raise UserError(
            f"{where}: expected numbers of shape (N, height, width) or (N, height, width, "
            f"channels), found {images.dtype} {images.shape}"
        )
    if images.dtype == np.uint8:
        return images
    with np.errstate(over="ignore"):
        images = images.astype(np.float32)
    bad = ~np.isfinite(images)
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise UserError(f"{where}: image {row} has a pixel that is NaN or infinite")
    return images


def _is_one_hot(labels: np.ndarray) -> bool:
    return labels.ndim == 2 and labels.shape[1] > 1


def _class_numbers(labels: np.ndarray, where: str) -> np.ndarray:
    """[N] int32 from integers [N] or [N, 1], or from one-hot rows [N, classes]."""
    if labels.dtype.kind not in "uifb" or labels.ndim not in (1, 2):
        raise UserError(
            f"{where}: expected integers or one-hot rows, found {labels.dtype} {labels.shape}"
        )
    if _is_one_hot(labels):
        are_bits = ((labels == 0) | (labels == 1)).all()
        if not (are_bits and (labels.sum(axis=1) == 1).all()):
            raise UserError(f"{where}: the rows of {labels.shape} are not one-hot")
        return labels.argmax(axis=1).astype(np.int32)
    labels = labels.reshape(-1)
    bad = ~((labels >= 0) & (labels < 2**31 - 1) & (labels == np.floor(labels)))
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(f"{where}: label {labels[row]} in row {row} is not a class number")
    return labels.astype(np.int32)


def _describe(images: np.ndarray) -> str:
    return f"{shape_text(images.shape[1:])} {images.dtype}"
