"""A data set from arrays: their shapes, types and values tell what they are. All is checked."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tfloop.data.dataset import Dataset, Split, Standardizer, described
from tfloop.data.spec import notes_on_ranges, ranges
from tfloop.data.targets import Target, as_targets, check_same, class_numbers, describe
from tfloop.errors import UserError
from tfloop.nests import filled, leaves, map_leaves, named_leaves
from tfloop.wording import listed


def from_arrays(
    x_train: Any,
    y_train: Any = None,
    x_test: Any = None,
    y_test: Any = None,
    name: str = "arrays",
    split: str = "standard",
    validation_size: int = 0,
    standardize: bool = True,
    seed: int = 0,
    *,
    test_size: int = 0,
    validation: tuple[Any, Any] | None = None,
    sample_weight: Any = None,
    class_weight: Mapping[int, float] | None = None,
    class_names: Any = (),
) -> Dataset:
    """A data set of NumPy arrays, or of what NumPy makes arrays of.

    Args:
      x_train: training inputs: images [N, height, width] or [N, height, width, channels], a table
        [N, columns], tokens [N, length], series [N, length, channels], or a dict or tuple of such
        arrays. uint8 of three axes are grey images and get a fourth. Or a Bunch of scikit-learn's,
        whose targets and class names are then taken.
      y_train: their targets: class numbers, from 0 on, of each example or of each place in it;
        rows of shares, such as one-hot rows [N, classes]; rows of 0 and 1 [N, labels]; numbers of
        any shape; or a dict or tuple of such arrays, one for each output of the model.
      x_test: test inputs; None for none.
      y_test: their targets.
      name: what error messages call them.
      split, validation_size, standardize, seed: as in `sources.load`. `standardize` leaves whole
        numbers as they are.
      test_size: examples to cut off for a test, where none are given.
      validation: (inputs, targets) to choose by, where they are given.
      sample_weight: [N], how much the loss of each training example counts.
      class_weight: how much the loss of each class counts, {class number: weight}; others 1.
      class_names: of the classes, in the order of their numbers; by output where there are several.

    Raises:
      UserError: arrays that do not fit each other, or sizes that leave nothing to train on.
    """
    if y_train is None and hasattr(x_train, "data") and hasattr(x_train, "target"):
        has_classes = np.asarray(x_train.target).dtype.kind in "iub"
        class_names = class_names or (getattr(x_train, "target_names", ()) if has_classes else ())
        x_train, y_train = x_train.data, x_train.target
    if y_train is None:
        raise UserError(f"{name}: there are no training targets")
    given = {"training": (x_train, y_train), "test": (x_test, y_test), "validation": validation}
    if (x_test is None) != (y_test is None):
        missing = "targets" if y_test is None else "inputs"
        raise UserError(f"{name}: there are no test {missing}")
    if validation is not None and len(validation) != 2:
        raise UserError(
            f"{name}: validation: expected a pair (inputs, targets), found {len(validation)} parts"
        )
    present = {part: pair for part, pair in given.items() if pair and pair[0] is not None}
    present = {
        part: (_with_columns_of(x_train, x, f"{name}: {part} inputs"), y)
        for part, (x, y) in present.items()
    }
    splits = {part: _split(name, part, *pair) for part, pair in present.items()}
    train = splits["training"]
    kinds = _describe_targets(name, train, class_names)
    for part in ("test", "validation"):
        if part in splits:
            splits[part] = _as_values(splits[part], kinds)
            _check_same(name, part, train, splits[part], kinds)
    if sample_weight is not None:
        weight = _weights(name, sample_weight, len(train))
        train = dataclasses.replace(train, sample_weight=weight)
    if split not in ("standard", "shuffled"):
        raise UserError(f"--split={split} is unknown; choose from standard, shuffled")
    test = splits.get("test")
    if split == "shuffled" and test is not None:
        train, test = _shuffled(train, test, seed)
    if test is None:
        train, test = hold_out(train, test_size, seed, kinds, "test_size")
    elif test_size:
        raise UserError(f"{name}: test_size={test_size} counts where no test is given")
    if "validation" in splits and validation_size:
        raise UserError(
            f"{name}: validation_size={validation_size} counts where no validation is given"
        )
    held_out = splits.get("validation")
    if held_out is None:
        train, held_out = hold_out(train, validation_size, seed, kinds)
    if class_weight:
        train = _with_class_weight(name, train, kinds, class_weight)
    fit = Standardizer.fit if standardize else Standardizer.identities
    notes = [*notes_on(train, kinds), *_notes_on_scales(splits)]
    return Dataset(name, train, held_out, test, kinds, fit(train.inputs), notes=tuple(notes))


def _notes_on_scales(splits: Mapping[str, Split]) -> Iterator[str]:
    """Parts whose numbers lie in quite another range than those of the training."""
    trained = ranges(splits["training"].inputs)
    for part in ("test", "validation"):
        if part in splits:
            for note in notes_on_ranges(trained, splits[part].inputs):
                yield f"{part}: {note}"


_CHANNELS = (1, 3, 4)  # as most images have


def notes_on(train: Split, kinds: Mapping[str, Target]) -> Iterator[str]:
    """What looks as if it was meant otherwise: channels that come first, classes from 1 on."""
    if train.has_images:
        first, second, last = train.inputs.shape[1:]
        may_be_first = first in _CHANNELS and last not in _CHANNELS
        if may_be_first and (second == last or (first > 1 and min(second, last) > 4)):
            yield (
                f"the images are {first} high, {second} wide and have {last} channels; if their "
                "channels come first, give np.moveaxis(images, 1, -1)"
            )
    for (name, targets), target in zip(named_leaves(train.targets), kinds.values(), strict=True):
        if target.is_one_class and target.kind == "classes" and not target.names:
            of = f" of {name}" if name else ""
            counts = np.bincount(np.asarray(targets), minlength=target.classes)
            unused = np.flatnonzero(counts == 0)
            if len(unused):
                more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
                yield (
                    f"no training example{of} has class {unused[0]}{more}: class numbers are "
                    f"counted from 0 on, so the model has {target.classes} classes"
                )


def _shuffled(train: Split, test: Split, seed: int) -> tuple[Split, Split]:
    """All examples joined, shuffled and cut again."""

    def join(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.concatenate([one, other])

    weight = None
    if train.sample_weight is not None:
        weight = join(train.sample_weight, np.ones(len(test), np.float32))
    inputs = map_leaves(join, train.inputs, test.inputs)
    joined = Split(inputs, map_leaves(join, train.targets, test.targets), weight)
    order = np.random.default_rng(seed).permutation(len(joined))
    return joined.take(order[len(test) :]), joined.take(order[: len(test)])


def hold_out(
    train: Split,
    size: int,
    seed: int,
    kinds: Mapping[str, Target] | None = None,
    flag: str = "validation_size",
) -> tuple[Split, Split]:
    """(the rest, `size` examples: in the proportions of the classes, where there is one class each)

    Args:
      train: to cut.
      size: how many to hold out.
      seed: of the choice.
      kinds: what the targets are; None: class numbers.
      flag: what asks for it, for messages.
    """
    if not size:
        return train, train.take(np.arange(0))
    if size >= len(train):
        noun = "images" if train.has_images else "examples"
        raise UserError(
            f"--{flag}={size} leaves nothing to train on: there are {len(train)} training {noun}"
        )
    from sklearn.model_selection import train_test_split

    rows, stratify = np.arange(len(train)), None
    target = (kinds or {"": Target("classes", (), 0)}).get("")
    if target and target.is_one_class:
        stratify = class_numbers(target, train.targets)
    try:
        rest, held_out = train_test_split(
            rows, test_size=size, random_state=seed, stratify=stratify
        )
    except ValueError as error:
        raise UserError(
            f"--{flag}={size}: cannot be cut in the proportions of the classes: {error}"
        ) from None
    return train.take(np.sort(rest)), train.take(np.sort(held_out))


# --- checks


def _describe_targets(name: str, train: Split, class_names: Any) -> dict[str, Target]:
    kinds = {}
    for leaf, array in named_leaves(train.targets):
        own = class_names.get(leaf, ()) if isinstance(class_names, dict) else class_names
        where = f"{name}: training targets{f' {leaf}' if leaf else ''}"
        target = describe(array, where, tuple(own) if not leaf or own else ())
        if target.kind == "classes" and not target.shape and target.classes > len(train):
            raise UserError(
                f"{name}: label {target.classes - 1} is out of range for {len(train)} training "
                f"{'images' if train.has_images else 'examples'}; for values to come close to, "
                "give floats"
            )
        kinds[leaf] = target
    return kinds


def _as_values(split: Split, kinds: Mapping[str, Target]) -> Split:
    """With whole numbers as float32 where the training's targets are values."""
    values = {name for name, target in kinds.items() if target.kind == "values"}
    found = [
        array.astype(np.float32) if name in values else array
        for name, array in named_leaves(split.targets)
    ]
    return dataclasses.replace(split, targets=filled(split.targets, found))


def _check_same(
    name: str, part: str, train: Split, other: Split, kinds: Mapping[str, Target]
) -> None:
    """Raises UserError for a part that does not fit the training examples."""
    one, two = described(train.inputs), described(other.inputs)
    if one != two:
        noun = "images" if train.has_images else "inputs"
        raise UserError(f"{name}: training {noun} are {one}, {part} {noun} {two}")
    found = dict(named_leaves(other.targets))
    if found.keys() != kinds.keys():
        raise UserError(
            f"{name}: training targets are {listed(kinds)}, {part} targets {listed(found)}"
        )
    for leaf, array in found.items():
        check_same(kinds[leaf], array, f"{name}: {part} targets{f' {leaf}' if leaf else ''}")


def _with_columns_of(train: Any, other: Any, where: str) -> Any:
    """A table whose columns have names, in the order of those of the training."""
    own, names = getattr(other, "columns", None), getattr(train, "columns", None)
    if own is None or names is None or list(own) == list(names):
        return other
    if sorted(map(str, own)) != sorted(map(str, names)):
        raise UserError(
            f"{where}: the columns are {listed(own)}, those of the training {listed(names)}"
        )
    return other[list(names)]


def _split(name: str, part: str, inputs: Any, targets: Any) -> Split:
    inputs = _arrays(inputs, f"{name}: {part} inputs", _as_inputs)
    targets = _arrays(targets, f"{name}: {part} targets", as_targets)
    checked = Split(inputs, targets)
    noun = "images" if checked.has_images else "examples"
    for leaf, array in named_leaves(targets):
        of = f" of {leaf}" if leaf else ""
        if len(array) != len(leaves(inputs)[0]):
            raise UserError(
                f"{name}: {len(leaves(inputs)[0])} {part} {noun} but {len(array)} targets{of}"
            )
    for leaf, array in named_leaves(inputs):
        if len(array) != len(checked):
            raise UserError(
                f"{name}: {part} inputs have {len(checked)} rows, but {leaf} has {len(array)}"
            )
    if not len(checked):
        raise UserError(f"{name}: there are no {part} {noun}")
    return checked


def as_inputs(inputs: Any, where: str) -> Any:
    """A nest of inputs as `from_arrays` takes them; `where` names them in messages."""
    return _arrays(inputs, where, _as_inputs)


def _arrays(nest: Any, where: str, convert: Callable) -> Any:
    """The nest with arrays for leaves. A list is what NumPy makes an array of, no nest."""
    if isinstance(nest, Mapping) and not hasattr(nest, "columns"):
        if not nest:
            raise UserError(f"{where}: the dict is empty")
        if odd := [key for key in nest if "/" in str(key)]:
            raise UserError(f"{where}: {odd[0]!r}: a name without / is needed")
        return {str(key): _arrays(nest[key], f"{where} {key}", convert) for key in nest}
    if isinstance(nest, tuple):
        if not nest:
            raise UserError(f"{where}: the tuple is empty")
        return tuple(_arrays(part, f"{where} {i}", convert) for i, part in enumerate(nest))
    try:
        return convert(nest, where)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None


def _as_inputs(values: Any, where: str) -> np.ndarray:
    """One array of inputs [N, …]: images as `check_images` has them, others in their own type.

    float64 becomes float32; text stays text.
    """
    if np.ma.is_masked(values):
        raise UserError(f"{where}: holds masked values; fill them, or leave those rows out")
    array = np.asarray(values)
    if array.dtype.kind in "SUO" and array.ndim:
        return _as_text(array, where)
    if array.dtype.kind not in "uifb" or not array.ndim or 0 in array.shape[1:]:
        raise UserError(f"{where}: expected numbers [N, …], found {array.dtype} {array.shape}")
    is_image = array.ndim == 4 or (array.ndim == 3 and array.dtype == np.uint8)
    if is_image:
        return check_images(array, where)
    if array.dtype.kind != "f":
        return array
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    if bad.any():
        raise UserError(f"{where}: row {int(np.argmax(bad))} holds NaN or infinity")
    return array


def _as_text(array: np.ndarray, where: str) -> np.ndarray:
    if not all(isinstance(value, (str, bytes)) for value in array.flat):
        bad = next(value for value in array.flat if not isinstance(value, (str, bytes)))
        raise UserError(
            f"{where}: expected numbers or text, found a {type(bad).__name__} among {array.dtype}"
        )
    flat = [value.encode() if isinstance(value, str) else value for value in array.flat]
    text = np.empty(len(flat), object)
    text[:] = flat
    return text.reshape(array.shape)


def _weights(name: str, values: Any, rows: int) -> np.ndarray:
    weight = np.asarray(values)
    if weight.dtype.kind not in "uifb" or weight.shape != (rows,):
        raise UserError(
            f"{name}: sample_weight: expected a number for each of {rows} examples, found "
            f"{weight.dtype} {weight.shape}"
        )
    weight = weight.astype(np.float32)
    if not np.isfinite(weight).all() or (weight < 0).any() or not weight.any():
        raise UserError(f"{name}: sample_weight: expected finite numbers from 0 on, not all 0")
    return weight


def _with_class_weight(
    name: str, train: Split, kinds: Mapping[str, Target], class_weight: Mapping[int, float]
) -> Split:
    target = kinds.get("")
    if target is None or not target.is_one_class:
        raise UserError(f"{name}: class_weight counts where each example has one class")
    by_class = np.ones(target.classes, np.float32)
    for number, weight in class_weight.items():
        if number not in range(target.classes) or not 0 <= weight < np.inf:
            raise UserError(
                f"{name}: class_weight: expected weights from 0 on of classes 0 to "
                f"{target.classes - 1}, found {number!r}: {weight!r}"
            )
        by_class[number] = weight
    own = by_class[class_numbers(target, train.targets)]
    weight = own if train.sample_weight is None else own * train.sample_weight
    return dataclasses.replace(train, sample_weight=_weights(name, weight, len(train)))


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
