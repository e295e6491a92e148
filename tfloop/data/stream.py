"""A `tf.data.Dataset` as a data set: read as it is, in its own order.

What can be promised then depends on it. A function that makes the dataset, rather than a dataset
that was made, is asked for a new one wherever reading begins; so a run repeats and resumes bit for
bit if what it makes is deterministic, shuffled with a seed or not at all. A run is resumed by
skipping forward.
"""

import dataclasses
import time
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfloop.data.arrays import from_arrays
from tfloop.data.dataset import Dataset, Split, Standardizer
from tfloop.data.targets import Target, check_same, describe
from tfloop.data.tf_data import UNTUNED
from tfloop.errors import UserError
from tfloop.nests import leaves, map_leaves, named_leaves
from tfloop.wording import listed, shape_text

LOOKED_AT = 1000  # examples whose targets tell what they are
PATIENCE = 5.0  # seconds of counting until that is said


@dataclasses.dataclass(frozen=True)
class Column:
    """What is known of one array of inputs or targets without reading it."""

    shape: tuple[int | None, ...]  # (N, …)
    dtype: np.dtype


class Stream:
    """The training part: an epoch is the dataset once through.

    Attributes:
      inputs, targets: nests of Column.
      batch_size: of its batches; None where it gives examples, of which the loop makes batches.
      repeats: does it give the same each time it is begun?
    """

    sample_weight = None
    is_in_memory = False

    def __init__(
        self,
        make: Callable[[], tf.data.Dataset],
        spec: tuple,
        size: int,
        batch_size: int | None,
        repeats: bool,
        content: int = 0,
    ) -> None:
        """Make one.

        Args:
          make: gives the dataset.
          spec: (inputs, targets) of an example, nests of tf.TensorSpec.
          size: examples in it.
          batch_size, repeats: as the attributes.
          content: a checksum of what is known of the examples.
        """

        def column(leaf: tf.TensorSpec) -> Column:
            return Column((size, *leaf.shape), np.dtype(leaf.dtype.as_numpy_dtype))

        self._make, self._size, self._content = make, size, content
        self.inputs, self.targets = (map_leaves(column, part) for part in spec)
        self.batch_size, self.repeats = batch_size, repeats

    def __len__(self) -> int:
        return self._size

    @property
    def has_images(self) -> bool:
        return isinstance(self.inputs, Column) and len(self.inputs.shape) == 4

    @property
    def fingerprint(self) -> int:
        """Of shapes, types and size, of the targets in any order, and of the first batch."""
        known = zlib.crc32(repr((self.inputs, self.targets, self._size)).encode())
        return known ^ self._content

    def batches(self, batch_size: int, first: int) -> tf.data.Dataset:
        """(inputs, targets, weights) without end, from the batch with this number on.

        An epoch's last batch may be shorter.
        """
        dataset = self._make()
        if self.batch_size is None:
            dataset = dataset.batch(batch_size)
        return dataset.map(_with_weight).repeat().skip(first).with_options(UNTUNED)

    def first(self, rows: int) -> Split:
        """The first examples, in memory."""
        found = []
        count = 0
        dataset = self._make()
        for batch in dataset if self.batch_size else dataset.batch(min(rows, 1024)):
            found.append(_with_weight(*batch))
            targets = found[-1][1]
            count += leaves(targets)[0].shape[0]
            if count >= rows:
                break
        return _joined(found).take(slice(rows))

    def take(self, rows: Any) -> Split:
        """The first examples, in memory.

        Raises:
          UserError: others are asked for.
        """
        if isinstance(rows, slice) and not rows.start and rows.stop is not None:
            return self.first(rows.stop) if rows.stop else self.first(1).take(slice(0))
        raise UserError(
            "a tf.data.Dataset cannot be cut; give its validation and test examples to from_dataset"
        )

    def rows(self, rows: slice) -> Any:
        """The inputs of the first examples."""
        return self.take(rows).inputs


def _with_weight(inputs: Any, targets: Any, weight: Any = None) -> tuple:
    """A batch with its weights; whole numbers among the targets are int64, as with arrays."""
    rows = tf.shape(leaves(targets)[0])[:1]
    weight = tf.ones(rows) if weight is None else tf.reshape(tf.cast(weight, tf.float32), rows)

    def as_target(leaf: tf.Tensor) -> tf.Tensor:
        if not (leaf.dtype.is_integer or leaf.dtype.is_bool):
            return leaf
        is_column = leaf.shape.rank == 2 and leaf.shape[1] == 1
        return tf.cast(leaf[:, 0] if is_column else leaf, tf.int64)

    return inputs, map_leaves(as_target, targets), weight


def _joined(batches: list[tuple]) -> Split:
    def join(*parts: Any) -> np.ndarray:
        return np.concatenate([np.asarray(part) for part in parts])

    try:
        inputs, targets, weight = (map_leaves(join, *part) for part in zip(*batches, strict=True))
    except ValueError as error:
        raise UserError(
            f"examples of different shapes cannot be read into memory: {str(error).splitlines()[0]}"
        ) from None
    return Split(inputs, targets, None if (weight == 1.0).all() else weight)


def from_dataset(
    train: tf.data.Dataset | Callable[[], tf.data.Dataset],
    test: Any = None,
    validation: Any = None,
    *,
    name: str = "dataset",
    batched: bool | None = None,
    classes: int | None = None,
    class_names: Any = (),
) -> Dataset:
    """A data set from tf.data's datasets of (inputs, targets) or (inputs, targets, sample_weight).

    The training examples stay in the dataset, and come in its own order; --seed does not change it.
    Nothing is standardised. It is gone through once beforehand, to count its examples and classes.
    The test and validation examples are read into memory.

    Args:
      train: the training examples, or batches of them; or a function that makes the dataset anew,
        with which a run repeats and resumes bit for bit where its order is deterministic.
      test, validation: the same of others; None for none.
      name: what messages call it.
      batched: does it give batches? None: where all its arrays have as many rows in the first
        element, and no target is a scalar. Where the dataset says how many rows its elements have,
        it may as well give sequences, and has to be told.
      classes: how many there are, where the targets are class numbers; None: as many as are seen.
      class_names: of the classes.

    Raises:
      UserError: elements of another form, batches of different sizes, or no examples.
    """
    make = train if callable(train) else lambda: train
    dataset = _made(make, name)
    spec = _spec(dataset, name)
    first = next(iter(dataset.take(1)), None)
    if first is None:
        raise UserError(f"{name}: holds no training examples")
    if batched is None:
        batched = _looks_batched(first)
        if batched and all(leaf.shape[0] is not None for leaf in leaves(spec)):
            raise UserError(
                f"{name}: are its elements batches, or examples that are sequences? Say "
                "batched=True or batched=False"
            )
    passed = _Passed(name, batched, classes)
    passed.go_through(_made(make, name))
    sizes = passed.sizes
    if not sizes:
        raise UserError(f"{name}: holds no training examples")
    batch_size = sizes[0] if batched else None
    if batched and (set(sizes[:-1]) - {batch_size} or sizes[-1] > sizes[0]):
        odd = next(i for i, size in enumerate(sizes[1:], 1) if size != batch_size)
        raise UserError(
            f"{name}: batch {odd} has {sizes[odd]} examples, the first has {batch_size}; all but "
            "the last must have as many"
        )
    kinds = passed.kinds(class_names)
    of_example = map_leaves(_without_rows, spec[:2]) if batched else spec[:2]
    of_example = of_example[0], map_leaves(_of_target, of_example[1])
    again = next(iter(_made(make, name).take(1)), None)
    if again is None:
        raise UserError(
            f"{name}: can be read once only; give a function that makes the dataset anew"
        )
    repeats = _are_equal(first, again)
    content = passed.checksum ^ _checksum(first) if repeats else 0
    stream = Stream(make, of_example, sum(sizes), batch_size, repeats, content)
    like = stream.first(1)
    held_out = {}
    for part, given in (("test", test), ("validation", validation)):
        held_out[part] = _in_memory(given, like, batched, f"{name}: {part}")
        if given is not None:
            _check_same(stream, held_out[part], kinds, f"{name}: {part}")
    fit = Standardizer.identities(like.inputs)
    train_part: Any = stream  # a part like any other, but for what lies in memory
    return Dataset(name, train_part, held_out["validation"], held_out["test"], kinds, fit)


def _made(make: Callable, name: str) -> tf.data.Dataset:
    dataset = make()
    if not isinstance(dataset, tf.data.Dataset):
        raise UserError(f"{name}: expected a tf.data.Dataset, found {type(dataset).__name__}")
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise UserError(
            f"{name}: the dataset has no end; leave .repeat() out, or .take(STEPS) of it"
        )
    return dataset


def _spec(dataset: tf.data.Dataset, name: str) -> tuple:
    spec = dataset.element_spec
    if not isinstance(spec, tuple) or len(spec) not in (2, 3):
        raise UserError(
            f"{name}: expected elements (inputs, targets) or (inputs, targets, sample_weight), "
            f"found {spec}"
        )
    for leaf in leaves(spec):
        if not isinstance(leaf, tf.TensorSpec) or leaf.shape.rank is None:
            raise UserError(f"{name}: expected tensors of known rank, found {leaf}")
    return spec


def _without_rows(leaf: tf.TensorSpec) -> tf.TensorSpec:
    return tf.TensorSpec(leaf.shape[1:], leaf.dtype)


def _of_target(leaf: tf.TensorSpec) -> tf.TensorSpec:
    """As `_with_weight` has targets."""
    if not (leaf.dtype.is_integer or leaf.dtype.is_bool):
        return leaf
    return tf.TensorSpec([] if leaf.shape == [1] else leaf.shape, tf.int64)


def _looks_batched(element: tuple) -> bool:
    shapes = [leaf.shape for leaf in leaves(element)]
    return all(shape.rank for shape in shapes) and len({shape[0] for shape in shapes}) == 1


class _Passed:
    """What one pass over a dataset tells of its targets.

    Attributes:
      sizes: rows of each batch.
      checksum: of the targets, in whatever order they come; 32 bits.
    """

    def __init__(self, where: str, batched: bool, classes: int | None) -> None:
        self.sizes: list[int] = []
        self.checksum = 0
        self._where, self._batched, self._classes = where, batched, classes
        self._highest: dict[str, int] = {}
        self._first: list[Any] = []  # targets of so many examples
        self._odd: dict[str, np.ndarray] = {}  # the first row that is no share

    def go_through(self, dataset: tf.data.Dataset) -> None:
        """Go through it, without its inputs.

        Raises:
          UserError: a label or weight that is none.
        """
        batches = dataset.map(lambda *x: x[1:])
        is_unknown = dataset.cardinality() == tf.data.UNKNOWN_CARDINALITY
        started = time.monotonic()
        for batch in batches if self._batched else batches.batch(1024):
            if is_unknown and time.monotonic() - started > PATIENCE:
                is_unknown = False  # said once
                warnings.warn(
                    f"{self._where}: its examples are being counted, {sum(self.sizes)} so far; one "
                    "without an end needs .take(N)",
                    stacklevel=2,
                )
            _, targets, weight = _with_weight(None, *batch)
            if not (tf.reduce_all(weight >= 0) and tf.reduce_all(tf.math.is_finite(weight))):
                raise UserError(f"{self._where}: sample_weight: expected finite numbers from 0 on")
            self._take(map_leaves(lambda leaf: leaf.numpy(), targets))

    def _take(self, targets: Any) -> None:
        if sum(self.sizes) < LOOKED_AT:
            self._first.append(targets)
        self.sizes.append(len(leaves(targets)[0]))
        for name, array in named_leaves(targets):
            sums = sum(zlib.crc32(row.tobytes()) for row in array)
            self.checksum = (self.checksum + sums) % 2**32
            if array.dtype.kind == "f":
                if not np.isfinite(array).all():
                    of = f"a target {name}".strip()
                    raise UserError(f"{self._where}: {of} is NaN or infinite")
            else:
                self._take_classes(name, array)
            if array.ndim > 1 and name not in self._odd:
                is_odd = ~np.isclose(array.sum(-1), 1.0, atol=1e-3)
                if is_odd.any():
                    self._odd[name] = array[np.argwhere(is_odd)[0][0]]

    def _take_classes(self, name: str, array: np.ndarray) -> None:
        least, most = int(array.min()), int(array.max())
        if least < 0 or (self._classes and most >= self._classes):
            bad = least if least < 0 else most
            below = self._classes or most
            raise UserError(f"{self._where}: label {bad} is not a class number below {below}")
        self._highest[name] = max(most, self._highest.get(name, 0))

    def kinds(self, names: Any) -> dict[str, Target]:
        """What the targets are; `names` of the classes."""
        joined = map_leaves(lambda *parts: np.concatenate(parts), *self._first)
        kinds = {}
        for name, array in named_leaves(joined):
            own = names.get(name, ()) if isinstance(names, dict) else names
            target = self._kind(name, array)
            kinds[name] = target._replace(names=tuple(map(str, own)))
        return kinds

    def _kind(self, name: str, array: np.ndarray) -> Target:
        if array.dtype.kind != "f" and array.ndim == 1:
            count = self._classes or self._highest[name] + 1
            return Target("classes", (), max(count, 2))
        where = f"{self._where}: targets {name}".rstrip()
        target = describe(array, where)
        if target.kind == "shares" and name in self._odd:  # a row beyond those that were looked at
            target = describe(np.concatenate([array, self._odd[name][np.newaxis]]), where)
        if target.kind == "classes":
            count = self._classes or self._highest[name] + 1
            target = target._replace(classes=max(count, 2))
        return target


def _checksum(element: tuple) -> int:
    """Of the first example or batch."""
    crc = 0
    for leaf in leaves(element):
        array = leaf.numpy()
        content = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
        crc = zlib.crc32(content, crc)
    return crc


def _check_same(stream: Stream, part: Split, kinds: dict[str, Target], where: str) -> None:
    """Raises UserError for test or validation examples that are not like those of the training."""
    trained, found = dict(named_leaves(stream.inputs)), dict(named_leaves(part.inputs))
    if trained.keys() != found.keys():
        raise UserError(
            f"{where}: inputs are {listed(found)}, those of the training {listed(trained)}"
        )
    for name, array in found.items():
        known = trained[name]
        sizes = zip(known.shape[1:], array.shape[1:], strict=False)
        is_same = len(known.shape) == array.ndim and all(k in (None, n) for k, n in sizes)
        if not is_same or known.dtype != array.dtype:
            one, other = (
                f"{shape_text(shape)} {dtype}".strip()
                for shape, dtype in ((known.shape[1:], known.dtype), (array.shape[1:], array.dtype))
            )
            raise UserError(
                f"{where}: inputs {name} are {other}, those of the training {one}".replace(
                    "  ", " "
                )
            )
    targets = dict(named_leaves(part.targets))
    if targets.keys() != kinds.keys():
        raise UserError(
            f"{where}: targets are {listed(targets)}, those of the training {listed(kinds)}"
        )
    for name, array in targets.items():
        check_same(kinds[name], array, f"{where} targets {name}".rstrip())


def _are_equal(one: tuple, other: tuple) -> bool:
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(np.array_equal(a.numpy(), b.numpy()) for a, b in pairs)


def _in_memory(given: Any, like: Split, batched: bool, where: str) -> Split:
    """The examples of a dataset, or of a pair of arrays, in memory; none where nothing is given."""
    if given is None:
        return like.take(slice(0))
    if isinstance(given, tuple):
        data = from_arrays(given[0], given[1], name=where, standardize=False)
        return data.train
    dataset = _made(given if callable(given) else lambda: given, where)
    found = []
    for batch in dataset if batched else dataset.batch(1024):
        found.append(_with_weight(*batch))
    if not found:
        raise UserError(f"{where}: holds no examples")
    return _joined(found)
