"""What targets are: classes, shares of classes, several labels, or values. Told by their values.

The default loss, the accuracy and what `evaluate` prints follow from it.
"""

from typing import Any, Literal, NamedTuple

import numpy as np

from tfloop.errors import UserError

Kind = Literal["classes", "shares", "labels", "values"]
SHOWN_CLASSES = 10**6  # more are taken for something else than classes


class Target(NamedTuple):
    """What one array of targets is.

    Attributes:
      kind: "classes": class numbers from 0 on, of an example or of each place in it. "shares": a
        row of shares that add up to 1, one-hot rows among them. "labels": a row of 0 and 1, of
        which any number may be 1. "values": numbers to come close to.
      shape: of one example's.
      classes: how many classes or labels there are; 0 of values.
      names: of the classes; () where they have none.
    """

    kind: Kind
    shape: tuple[int, ...]
    classes: int
    names: tuple[str, ...] = ()

    @property
    def is_one_class(self) -> bool:
        """Does each example belong to one class?"""
        return self.kind in ("classes", "shares") and self.shape in ((), (self.classes,))

    @property
    def is_for_places(self) -> bool:
        """Has each place of an example a class, as in a mask?"""
        return self.kind == "classes" and bool(self.shape)

    def name_of(self, number: int) -> str:
        """The name of a class, or its number."""
        return self.names[number] if number < len(self.names) else str(number)


def as_targets(values: Any, where: str) -> np.ndarray:
    """Targets as an array: whole numbers int64, others float32.

    One column of class numbers [N, 1] becomes [N], and masks [N, height, width, 1] lose their last
    axis.

    Raises:
      UserError: what is no numbers, or is not finite; `where` names it.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "uifb" or not array.ndim:
        raise UserError(f"{where}: expected numbers, found {array.dtype} {array.shape}")
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32) if array.dtype == np.float64 else array
        bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        if bad.any():
            row = int(np.argmax(bad))
            raise UserError(f"{where}: row {row} is NaN or infinite")
        return array
    if array.ndim > 1 and array.shape[-1] == 1:
        array = array[..., 0]
    return array.astype(np.int64)


def describe(array: np.ndarray, where: str, names: tuple[str, ...] = ()) -> Target:
    """What these training targets are.

    Raises:
      UserError: whole numbers that are no class numbers; names that are not as many as classes.
    """
    target = _described(array, where)
    if names and len(names) != target.classes:
        raise UserError(f"{where}: {len(names)} class names for {target.classes} classes")
    return target._replace(names=tuple(map(str, names)))


def _described(array: np.ndarray, where: str) -> Target:
    shape = array.shape[1:]
    if array.ndim > 2 and shape[-1] > 1 and _are_one_hot(array):
        return Target("shares", shape, shape[-1])
    if array.ndim == 2 and shape[0] > 1:
        are_bits = bool(((array == 0) | (array == 1)).all())
        is_share = array.dtype.kind == "f" and bool((array >= 0).all())
        sums = array.sum(axis=1)
        if (are_bits or is_share) and np.allclose(sums, 1.0, atol=1e-4):
            return Target("shares", shape, shape[0])
        if are_bits:
            return Target("labels", shape, shape[0])
    if array.dtype.kind == "f":
        return Target("values", shape, 0)
    if not array.size:
        return Target("classes", shape, 0)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= SHOWN_CLASSES:
        number = low if low < 0 else high
        row = int(np.argwhere(array == number)[0][0])
        raise UserError(
            f"{where}: label {number} in row {row} is not a class number; for values to come close "
            "to, give floats"
        )
    if high < 1:
        raise UserError(f"{where}: all labels are {high}: nothing to tell apart")
    return Target("classes", shape, high + 1)


def _are_one_hot(array: np.ndarray) -> bool:
    """Is each row along the last axis one 1 among zeros? Looked at in some examples first."""
    for some in (array[:8], array):
        if not ((some == 0) | (some == 1)).all() or not (some.sum(axis=-1) == 1).all():
            return False
    return True


def check_same(target: Target, array: np.ndarray, where: str) -> None:
    """Raises UserError for other targets than those of training: test, or validation.

    Args:
      target: what those of training are.
      array: the others.
      where: names them.
    """
    if array.shape[1:] != target.shape:
        columns = (target.shape, array.shape[1:])
        if all(len(shape) == 1 for shape in columns):
            raise UserError(
                f"{where}: {target.shape[0]} columns for training and {array.shape[1]} here"
            )
        raise UserError(f"{where}: shape {array.shape[1:]}, those of training {target.shape}")
    if target.kind == "classes":
        if array.dtype.kind == "f":
            raise UserError(f"{where}: {array.dtype}, those of training are class numbers")
        if array.size and array.max() >= target.classes:
            raise UserError(
                f"{where}: label {array.max()} is out of range: training labels go from 0 to "
                f"{target.classes - 1}"
            )
        if array.size and array.min() < 0:
            raise UserError(f"{where}: label {array.min()} is not a class number")
    elif target.kind in ("shares", "labels"):
        is_other = (array < 0) | (array > 1)
        if target.kind == "shares":
            is_other = is_other.any(-1) | ~np.isclose(array.sum(-1), 1.0, atol=1e-3)
            expected = "shares from 0 to 1 that add up to 1"
        else:
            is_other |= (array != 0) & (array != 1)
            expected = "0 and 1"
        if is_other.any():
            row = int(np.argwhere(is_other)[0][0])
            raise UserError(f"{where}: row {row} holds other numbers than {expected}")


def class_numbers(target: Target, array: np.ndarray) -> np.ndarray:
    """[N] the class of each example, of classes or shares."""
    return array.argmax(axis=-1) if target.kind == "shares" else array
