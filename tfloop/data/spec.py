"""What a model must know of its data, without the data: kept in checkpoints, read from there."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfloop.data.dataset import Dataset
from tfloop.data.targets import Target
from tfloop.errors import UserError
from tfloop.nests import is_leaf, leaves, map_leaves, named_leaves
from tfloop.wording import shape_text

SOME = 8  # the size of an example of zeros along an axis of no fixed size


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape and the type of one example's array; "text" is a type, too."""

    shape: tuple[int | None, ...]  # None: of no fixed size
    dtype: str


class Spec(NamedTuple):
    """Shapes and types of one example.

    Attributes:
      inputs, targets: nests of Array, leaves all.
      kinds: what the targets are, by name.
    """

    inputs: Any
    targets: Any
    kinds: Mapping[str, Target]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels).

        Raises:
          UserError: the inputs are no images.
        """
        if not self.has_images:
            raise UserError(
                f"the inputs are {self.text}, and the article's CNN takes images [N, height, "
                "width, channels]; give a --model of your own"
            )
        if None in self.inputs.shape:
            raise UserError(
                f"the inputs are {self.text}: images of no fixed size; the article's CNN takes all "
                "of one, so set their shape in the dataset"
            )
        height, width, channels = self.inputs.shape
        return height, width, channels

    @property
    def has_images(self) -> bool:
        return isinstance(self.inputs, Array) and len(self.inputs.shape) == 3

    @property
    def target(self) -> Target | None:
        return self.kinds.get("")

    @property
    def classes(self) -> int:
        """How many classes or labels the only target has; 0 where there are none."""
        return self.target.classes if self.target else 0

    @property
    def text(self) -> str:
        """ "28×28×1 uint8" """
        return ", ".join(
            f"{shape_text(array.shape)} {array.dtype}".strip() for array in leaves(self.inputs)
        )

    def examples(self, rows: int) -> tuple[Any, Any]:
        """(inputs, targets) of so many examples of zeros and empty texts."""

        def zeros(array: Array) -> np.ndarray:
            shape = [rows, *(size or SOME for size in array.shape)]
            is_text = array.dtype == "text"
            return np.full(shape, b"", object) if is_text else np.zeros(shape, array.dtype)

        return map_leaves(zeros, self.inputs), map_leaves(zeros, self.targets)

    def to_json(self) -> dict[str, Any]:
        kinds = {name: target._asdict() for name, target in self.kinds.items()}
        return {"inputs": _to_json(self.inputs), "targets": _to_json(self.targets), "kinds": kinds}


def of_data(data: Dataset) -> Spec:
    """That of a data set's examples."""

    def array(values: Any) -> Array:
        return Array(
            tuple(values.shape[1:]), "text" if values.dtype == object else str(values.dtype)
        )

    train = data.train
    return Spec(map_leaves(array, train.inputs), map_leaves(array, train.targets), data.kinds)


def of_images(shape: Sequence[int], classes: int, pixels: str = "uint8") -> Spec:
    """That of images with class numbers."""
    height, width, channels = shape
    inputs = Array((height, width, channels), pixels)
    return Spec(inputs, Array((), "int64"), {"": Target("classes", (), classes)})


def from_json(content: Mapping[str, Any]) -> Spec:
    """As `to_json` wrote it."""
    kinds = {
        name: Target(
            target["kind"], tuple(target["shape"]), target["classes"], tuple(target["names"])
        )
        for name, target in content["kinds"].items()
    }
    return Spec(_from_json(content["inputs"]), _from_json(content["targets"]), kinds)


def _to_json(nest: Any) -> Any:
    if isinstance(nest, Array):
        return {"shape": list(nest.shape), "dtype": nest.dtype}
    if isinstance(nest, dict):
        return {"dict": {key: _to_json(part) for key, part in nest.items()}}
    return {"tuple": [_to_json(part) for part in nest]}


def _from_json(content: Any) -> Any:
    if "dict" in content:
        return {key: _from_json(part) for key, part in content["dict"].items()}
    if "tuple" in content:
        return tuple(_from_json(part) for part in content["tuple"])
    return Array(tuple(content["shape"]), content["dtype"])


def ranges(inputs: Any) -> dict[str, list[float]]:
    """By name, the least and the greatest of the numbers in a nest of arrays in memory."""
    found = {}
    for name, array in named_leaves(inputs):
        if isinstance(array, np.ndarray) and array.dtype.kind in "fu" and array.size:
            found[name] = [float(array.min()), float(array.max())]
    return found


def notes_on_ranges(trained: Mapping[str, Any], inputs: Any) -> list[str]:
    """Lines on inputs that lie in quite another range than those of the training, as `ranges`."""
    notes = []
    for name, (low, high) in ranges(inputs).items():
        known = trained.get(name)
        if not known:
            continue
        size, trained_size = max(abs(low), abs(high)), max(abs(known[0]), abs(known[1]))
        is_other_size = bool(size and trained_size) and not 0.1 < size / trained_size < 10
        is_shifted = known[0] >= 0 and low < -0.1 * size  # 0 to 1 became -1 to 1
        if is_other_size or is_shifted:
            of = f" of {name}" if name else ""
            notes.append(
                f"the inputs{of} go from {low:g} to {high:g}, in training from {known[0]:g} to "
                f"{known[1]:g}; are they scaled otherwise?"
            )
    return notes


def check_inputs(spec: Spec, inputs: Any, where: str) -> None:
    """Raises UserError for inputs of other shapes or types than the model was trained on.

    Args:
      spec: of the training data.
      inputs: a nest of arrays [N, …].
      where: names them.
    """
    expected, found = leaves(spec.inputs), leaves(inputs)
    if len(expected) != len(found) or is_leaf(inputs) != is_leaf(spec.inputs):
        raise UserError(f"{where}: holds {len(found)} inputs, the model takes {len(expected)}")
    noun, of = ("images", "pixels") if spec.has_images else ("inputs", "inputs")
    for array, values in zip(expected, found, strict=True):
        if values.shape[1:] != array.shape:
            raise UserError(
                f"{where}: {noun} are {shape_text(values.shape[1:])}, the model takes "
                f"{shape_text(array.shape)}"
            )
        dtype = "text" if values.dtype == object else values.dtype.name
        if dtype != array.dtype:
            raise UserError(f"{where}: {of} are {dtype}, the model was trained on {array.dtype}")
