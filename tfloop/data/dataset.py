"""What a data set is: inputs, targets and a standardiser, checked. NumPy and scikit-learn only.

Everything a model must know of its data (the shapes, what the targets are, the standardiser)
follows from the arrays. Where they come from is in `sources`, how they reach the step in
`pipelines`.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tfloop.data.targets import Target, class_numbers
from tfloop.errors import UserError
from tfloop.nests import filled, is_leaf, leaves, map_leaves, named_leaves
from tfloop.wording import shape_text


@dataclasses.dataclass(frozen=True)
class Split:
    """A part of a data set: examples that lie in arrays, a row each.

    Attributes:
      inputs: a nest of arrays [N, …]; `shards.Records` of a data set that stays on disk.
      targets: a nest of arrays [N, …].
      sample_weight: [N] float32, how much the loss of each example counts; None: each counts 1.
    """

    inputs: Any
    targets: Any
    sample_weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(leaves(self.targets)[0])

    @property
    def is_in_memory(self) -> bool:
        return all(isinstance(leaf, np.ndarray) for leaf in leaves(self.inputs))

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in leaves(self.inputs))

    @property
    def has_images(self) -> bool:
        """Is the only input images [N, height, width, channels]?"""
        return is_leaf(self.inputs) and len(self.inputs.shape) == 4

    @functools.cached_property
    def tensors(self) -> tuple:
        """(inputs, targets, sample_weight) as variables on the device, one copy for all who ask.

        Of a variable a GPU gathers uint8, too; of a constant the CPU would, for it.
        """
        import tensorflow as tf

        def variable(array: np.ndarray) -> tf.Variable:
            return tf.Variable(array[:], trainable=False)

        parts = (self.inputs, self.targets)
        inputs, targets = (map_leaves(variable, part) for part in parts)
        weight = None if self.sample_weight is None else variable(self.sample_weight)
        return inputs, targets, weight

    @property
    def fingerprint(self) -> int:
        """A checksum of the examples in their order, 32 bits."""
        crc = 0
        for array in (*leaves(self.inputs), *leaves(self.targets), self.sample_weight):
            if array is None:
                continue
            on_disk = getattr(array, "index", None)
            array = array if on_disk is None else on_disk["crc"]
            if array.dtype == object:  # text
                array = np.frombuffer(repr(array.tolist()).encode(), np.uint8)
            crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
        return crc

    def take(self, rows: np.ndarray | slice) -> "Split":
        """Some of the examples, in this order; of inputs on disk nothing is read for it."""

        def select(array: Any) -> Any:
            return getattr(array, "select", array.__getitem__)(rows)

        weight = None if self.sample_weight is None else self.sample_weight[rows]
        return Split(map_leaves(select, self.inputs), map_leaves(select, self.targets), weight)

    def rows(self, rows: np.ndarray | slice) -> Any:
        """The inputs of some of the examples, as they lie in the data."""
        return map_leaves(lambda array: array[rows], self.inputs)


@dataclasses.dataclass(frozen=True)
class Standardizer:
    """x → (x - mean) / scale: float32 arrays that fit one example, or nests of them.

    What is not scaled has None.
    """

    mean: Any
    scale: Any

    @classmethod
    def fit(cls, inputs: Any) -> "Standardizer":
        """scikit-learn's StandardScaler over each array of numbers that can be scaled.

        Images and tables by pixel and column, series and the like by the last axis, over all
        places. What never varies keeps scale 1; whole numbers, such as tokens, are left as they
        are.
        """
        return cls._by_leaf(inputs, _fit)

    @classmethod
    def of_scaler(cls, scaler: Any, shape: tuple[int, ...]) -> "Standardizer":
        """That of a fitted StandardScaler, for arrays of this shape."""
        mean, scale = scaler.mean_.reshape(shape), scaler.scale_.reshape(shape)
        return cls(mean.astype(np.float32), scale.astype(np.float32))

    @staticmethod
    def at_once(numbers: int) -> int:
        """How many rows of N numbers are fitted at once: the scaler works in float64."""
        return min(8192, max(1, 2**23 // max(numbers, 1)))

    @classmethod
    def identity(cls, shape: tuple[int, ...]) -> "Standardizer":
        return cls(np.zeros(shape, np.float32), np.ones(shape, np.float32))

    @classmethod
    def identities(cls, inputs: Any) -> "Standardizer":
        """That which changes nothing of inputs like these."""
        return cls._by_leaf(inputs, lambda array: cls.identity(_scaled_shape(array)))

    @classmethod
    def _by_leaf(cls, inputs: Any, make: Callable) -> "Standardizer":
        made = [make(array) if is_scaled(array) else cls(None, None) for array in leaves(inputs)]
        return cls(
            filled(inputs, [one.mean for one in made]), filled(inputs, [one.scale for one in made])
        )


def is_scaled(array: Any) -> bool:
    """Do the numbers of such an array measure something, so that they can be scaled?

    Floats do, and the pixels of images (uint8 of three axes or more). Other whole numbers name
    something: tokens, categories.
    """
    kind = np.dtype(getattr(array.dtype, "as_numpy_dtype", array.dtype))
    return kind.kind == "f" or (kind == np.uint8 and len(array.shape) > 2)


def _scaled_shape(array: np.ndarray) -> tuple[int, ...]:
    """The shape of mean and scale: one example's, or its last axis."""
    by_last = array.ndim == 3 or array.ndim > 4
    return array.shape[-1:] if by_last else array.shape[1:]


def _fit(array: np.ndarray) -> Standardizer:
    from sklearn.preprocessing import StandardScaler

    shape = _scaled_shape(array)
    numbers = int(np.prod(shape))
    scaler, rows = StandardScaler(), Standardizer.at_once(int(np.prod(array.shape[1:])))
    for first in range(0, len(array), rows):
        scaler.partial_fit(array[first : first + rows].reshape(-1, numbers))
    return Standardizer.of_scaler(scaler, shape)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training, validation (maybe empty) and test examples (maybe none) of one source.

    Attributes:
      kinds: what the targets are, by the names of `nests.named_leaves`: "" where there is one. A
        number stands for class numbers below it.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    kinds: Mapping[str, Target]
    standardizer: Standardizer
    left_out: tuple[str, ...] = ()  # damaged records, where they are left out
    notes: tuple[str, ...] = ()  # what looks as if it was meant otherwise
    digest: str = ""  # of what is on disk, where the images stay there

    def __post_init__(self) -> None:
        if isinstance(self.kinds, int):
            object.__setattr__(self, "kinds", {"": Target("classes", (), self.kinds)})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels).

        Raises:
          UserError: the inputs are no images.
        """
        if not self.train.has_images:
            raise UserError(
                f"{self.name}: the inputs are {self.inputs_text}, and this needs images [N, "
                "height, width, channels]; give a --model of your own"
            )
        return self.train.inputs.shape[1:]

    def as_images(self) -> "Dataset":
        """The same, with one channel where the inputs are images [N, height, width] without."""
        inputs = self.train.inputs
        if not is_leaf(inputs) or len(inputs.shape) != 3 or inputs.dtype.kind != "f":
            return self

        def with_channel(split: Split) -> Split:
            return dataclasses.replace(split, inputs=split.inputs[..., np.newaxis])

        train, validation, test = map(with_channel, (self.train, self.validation, self.test))
        is_fitted = bool(np.any(self.standardizer.mean))
        fit = Standardizer.fit if is_fitted else Standardizer.identities
        return dataclasses.replace(
            self,
            train=train,
            validation=validation,
            test=test,
            standardizer=fit(train.inputs),
        )

    @property
    def target(self) -> Target | None:
        """What the targets are, where there is one array of them."""
        return self.kinds.get("")

    @property
    def classes(self) -> int:
        """How many classes or labels the only target has; 0 where there are none."""
        return self.target.classes if self.target else 0

    @property
    def inputs_text(self) -> str:
        """ "28×28×1 uint8", or "age 4 float32, words 20 int64" """
        return described(self.train.inputs)

    @property
    def targets_text(self) -> str:
        """ "10 classes", or "price: values; kind: 3 classes" """
        return targets_text(self.kinds)

    @property
    def noun(self) -> str:
        """What the examples are called: "images" or "examples"."""
        return "images" if self.train.has_images else "examples"

    def class_numbers(self, targets: np.ndarray) -> np.ndarray:
        """[N] the class of each example of the only target."""
        assert self.target is not None
        return class_numbers(self.target, targets)

    @property
    def fingerprint(self) -> int:
        """A number below 2**31 that differs, all but surely, for other training data or order."""
        return self.train.fingerprint >> 1

    @property
    def held_out_fingerprints(self) -> dict[str, int]:
        """As `fingerprint`, of the test and the validation examples, where there are any."""
        parts = {"test": self.test, "validation": self.validation}
        return {part: split.fingerprint >> 1 for part, split in parts.items() if len(split)}

    def without_test(self) -> "Dataset":
        """The same without test examples, for choices that are not to be made on them."""
        return dataclasses.replace(self, test=self.test.take(slice(0)))

    def head(self, size: int) -> "Dataset":
        """The first `size` examples of each part."""
        rows = slice(size)
        return dataclasses.replace(
            self,
            train=self.train.take(rows),
            validation=self.validation.take(rows),
            test=self.test.take(rows),
        )


def with_classes_of(dataset: Dataset, kinds: Mapping[str, Target], where: str) -> Dataset:
    """The data set with its class numbers those that a model was trained with, matched by name.

    Where one of the two has no class names, numbers are taken as they are.

    Raises:
      UserError: a class that the model does not know; `where` names the data.
    """
    places = {}
    for name, own in dataset.kinds.items():
        trained = kinds.get(name)
        has_classes = own.kind == "classes" or own.is_one_class
        if trained is None or not has_classes or not own.names or not trained.names:
            continue
        if own.names == trained.names:
            continue
        if twice := [each for each in own.names if own.names.count(each) > 1]:
            raise UserError(f"{where}: has several classes {twice[0]!r}, so names match no numbers")
        if unknown := [each for each in own.names if each not in trained.names]:
            raise UserError(
                f"{where}: has the class {unknown[0]!r}, which the run was not trained on; its "
                f"classes are {', '.join(trained.names)}"
            )
        places[name] = np.array([trained.names.index(each) for each in own.names])
    if not places:
        return dataset

    def renumbered(split: Split) -> Split:
        values = [
            _renumbered(targets, places[name], kinds[name]) if name in places else targets
            for name, targets in zip(dataset.kinds, leaves(split.targets), strict=True)
        ]
        return dataclasses.replace(split, targets=filled(split.targets, values))

    return dataclasses.replace(
        dataset,
        train=renumbered(dataset.train),
        validation=renumbered(dataset.validation),
        test=renumbered(dataset.test),
        kinds={**dataset.kinds, **{name: kinds[name] for name in places}},
    )


def _renumbered(targets: np.ndarray, places: np.ndarray, target: Target) -> np.ndarray:
    """Class numbers, or the columns of shares, at the places that they have in `target`."""
    if target.kind == "classes":
        return places[targets]
    found = np.zeros((len(targets), target.classes), targets.dtype)
    found[:, places] = targets
    return found


def targets_text(kinds: Mapping[str, Target]) -> str:
    """ "10 classes", or "kind: 3 classes; price: values" """
    return "; ".join(
        f"{name}: {target_text(target)}" if name else target_text(target)
        for name, target in kinds.items()
    )


def target_text(target: Target) -> str:
    """ "10 classes", "5 labels", "values", "3×3 of 2 classes" """
    of_each = target.kind in ("shares", "labels")
    places = f"{shape_text(target.shape)} of " if target.shape and not of_each else ""
    if target.kind == "values":
        return f"{shape_text(target.shape)} values" if target.shape else "values"
    noun = {"classes": "classes", "shares": "classes as shares", "labels": "labels"}[target.kind]
    return f"{places}{target.classes} {noun}"


def described(inputs: Any) -> str:
    return ", ".join(
        f"{name} {_array_text(array)}" if name else _array_text(array)
        for name, array in named_leaves(inputs)
    )


def _array_text(array: Any) -> str:
    kind = "text" if array.dtype == object else str(array.dtype)
    return f"{shape_text(array.shape[1:])} {kind}" if array.shape[1:] else kind
