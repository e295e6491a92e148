"""What a model gives for new inputs, read from pictures, an .npy or an .npz file."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfloop.data import pictures, shard_files, shards
from tfloop.data.arrays import as_inputs
from tfloop.data.dataset import is_scaled
from tfloop.data.readers import read_npy, read_npz
from tfloop.data.spec import Array, Spec
from tfloop.errors import UserError
from tfloop.nests import is_leaf, leaves, map_leaves, named_leaves
from tfloop.state import TrainState
from tfloop.wording import counted, names_text, shape_text

ARRAYS = ("images", "inputs", "x", "x_test")
BATCH = 256


def read_inputs(
    path: str | Path,
    spec: Spec,
    ranges: Mapping[str, Any],
    warn: Callable[[str], None] = lambda text: None,
) -> tuple[list[str], Any]:
    """(names, inputs) of the pictures in a folder, by name, or of the arrays in an .npz file.

    Args:
      path: the folder, of pictures or of shards, whose test examples are taken; or the file: with
        one array for each input, by its name; an array named images, inputs, x or x_test where
        there is one input.
      spec: what the model takes.
      ranges: as `spec.ranges`, of the training inputs, where they are known.
      warn: is told how pictures are scaled.

    Raises:
      UserError: nothing to read, a damaged file, or other inputs than the model's.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: does not exist")
    if spec.has_images and path.is_dir() and any(map(shard_files.is_shard, path.iterdir())):
        test = shards.load(path).test.inputs
        return [str(row) for row in range(len(test))], _scaled(test[:], path, spec, ranges, warn)
    if spec.has_images and (path.is_dir() or path.suffix.lower() in pictures.endings()):
        names, images = _pictures(path, spec, warn)
        return names, _scaled(images, path, spec, ranges, warn)
    if path.suffix.lower() == ".npy" and path.is_file() and isinstance(spec.inputs, Array):
        return _checked(read_npy(path), path, spec)
    if path.suffix.lower() != ".npz" or not path.is_file():
        kinds = "a picture, a folder of pictures, " if spec.has_images else ""
        expected = f"{kinds}an .npy or an .npz file"
        raise UserError(f"{path}: expected {expected}")
    arrays = read_npz(path)
    inputs: Any = {name: arrays[name] for name, _ in named_leaves(spec.inputs) if name in arrays}
    if isinstance(spec.inputs, Array):
        name = next((name for name in ARRAYS if name in arrays), None)
        if name is None:
            found = ", ".join(arrays) or "nothing"
            raise UserError(f"{path}: expected an array named {' or '.join(ARRAYS)}; found {found}")
        inputs = arrays[name]
    elif missing_names := [name for name, _ in named_leaves(spec.inputs) if name not in arrays]:
        raise UserError(f"{path}: has no array {missing_names[0]}; found {', '.join(arrays)}")
    taken = [name] if isinstance(spec.inputs, Array) else [n for n, _ in named_leaves(spec.inputs)]
    if others := sorted(arrays.keys() - set(taken)):
        warn(f"{path}: left out: {names_text(others)}")
    if isinstance(spec.inputs, tuple):
        inputs = tuple(inputs[str(place)] for place in range(len(spec.inputs)))
    return _checked(inputs, path, spec)


def _pictures(path: Path, spec: Spec, warn: Callable[[str], None]) -> tuple[list[str], np.ndarray]:
    """(names, images) of a picture, or of those in a folder; what they lose is said."""
    modes = {channels: mode for mode, channels in pictures.CHANNELS.items()}
    mode = modes.get(spec.image_shape[-1])
    if not mode:
        raise UserError(
            f"{path}: the model takes {spec.image_shape[-1]} channels, which pictures do not have; "
            "give an .npz file"
        )
    found = pictures.find(path) if path.is_dir() else pictures.Found([path], Counter())
    if not found.files:
        raise UserError(f"{path}: holds no pictures")
    if text := pictures.left_out_text(found.left_out):
        warn(f"{path}: {text}")
    looked = [pictures.look(file) for file in found.files]
    images = [_read_picture(picture, mode, spec.image_shape) for picture in looked]
    for kind, count in Counter(picture.mode for picture in looked).items():
        if kind != mode:
            warn(f"{path}: {counted(count, f'{kind} picture')} became {mode}, as in training")
    names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in found.files]
    return names, np.stack(images)


# The scales that people bring pixels of 0 to 255 to: (least, greatest).
_SCALES = ((0.0, 1.0), (-1.0, 1.0), (-0.5, 0.5))


def _scaled(
    images: np.ndarray,
    path: Path,
    spec: Spec,
    ranges: Mapping[str, Any],
    warn: Callable[[str], None],
) -> np.ndarray:
    """Pictures as the numbers that a model was trained on, where these are not pixels.

    Raises:
      UserError: nobody knows how those were scaled.
    """
    dtype = leaves(spec.inputs)[0].dtype
    low, high = ranges.get("") or (0, 255 if dtype == "uint8" else math.inf)
    if dtype == "uint8":
        brightest = int(images.max())
        if high < brightest / 4:
            warn(
                f"{path}: pixels go up to {brightest}, in training to {high:g}; are they scaled "
                "otherwise?"
            )
        return images
    if dtype.startswith("float"):
        if low >= 0 and 128 <= high <= 255:
            return images.astype(dtype)
        for least, greatest in _SCALES:
            slack = 0.05 * (greatest - least)  # a set need not hold black and white
            if 0 <= low - least <= slack and 0 <= greatest - high <= slack:
                warn(f"{path}: pixels are scaled to {least:g} to {greatest:g}, as in training")
                shares = images.astype(np.float64) / 255.0
                return (least + (greatest - least) * shares).astype(dtype)
    trained = f"from {low:g} to {high:g}" if ranges.get("") else "of an unknown scale"
    raise UserError(
        f"{path}: holds pixels from 0 to 255, and the model was trained on {dtype} {trained}; give "
        "the numbers in an .npz file"
    )


def _checked(inputs: Any, path: Path, spec: Spec) -> tuple[list[str], Any]:
    dtypes = {name: array.dtype for name, array in named_leaves(spec.inputs)}
    inputs = _as_bytes(inputs, dtypes[""]) if list(dtypes) == [""] else inputs
    checked = as_inputs(inputs, f"{path}")
    if spec.has_images and is_leaf(checked) and checked.ndim == 3:
        checked = checked[..., np.newaxis]  # grey images without their channel
    if not len(leaves(checked)[0]):
        raise UserError(f"{path}: holds no {'images' if spec.has_images else 'examples'}")
    return [str(row) for row in range(len(leaves(checked)[0]))], checked


def _as_bytes(array: Any, dtype: str) -> Any:
    """Whole numbers from 0 to 255 as the bytes that the model was trained on."""
    is_whole = dtype == "uint8" and isinstance(array, np.ndarray) and array.dtype.kind in "iu"
    if is_whole and array.size and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8)
    return array


def _as_trained(values: np.ndarray, mean: Any) -> np.ndarray:
    """Whole numbers as float32 where the model was trained on numbers that are scaled."""
    return values.astype(np.float32) if mean is not None and not is_scaled(values) else values


def _read_picture(picture: pictures.Picture, mode: str, shape: tuple[int, int, int]) -> np.ndarray:
    image = pictures.read(picture, mode)
    if image.shape != tuple(shape):
        raise UserError(
            f"{picture.path}: is {shape_text(image.shape)}, the model takes {shape_text(shape)}"
        )
    return image


def predict(state: TrainState, inputs: Any) -> Any:
    """What the model gives for inputs as they lie in the data, a nest of arrays [N, …].

    Classes and labels of the default loss come as probabilities, such as [N, classes]; with a loss
    of one's own it is what the model gives, whatever that is. Inputs are not standardised before.
    As in evaluation, the weights are their moving average where one is kept.

    Raises:
      UserError: there are no inputs, or the model takes others.
    """
    if not isinstance(state, TrainState):
        raise UserError(f"predict: expected a tfloop.TrainState, found {type(state).__name__}")
    inputs = as_inputs(inputs, "inputs to predict")
    is_grey = is_leaf(inputs) and inputs.ndim == 3 and is_leaf(state.mean)
    if is_grey and state.mean is not None and state.mean.shape.rank == 3:
        inputs = inputs[..., np.newaxis]  # a grey image without its channel
    rows = len(leaves(inputs)[0])
    noun = "images" if is_leaf(inputs) and inputs.ndim == 4 else "examples"
    if not rows:
        raise UserError(f"there are no {noun} to predict")
    if not state.has_one_scale:
        known_names = [name for name, _ in named_leaves(state.mean)]
        found_names = [name for name, _ in named_leaves(inputs)]
        if known_names != found_names:
            raise UserError(
                f"inputs to predict are {', '.join(found_names) or 'one array'}, the model takes "
                f"{', '.join(known_names) or 'one array'}"
            )
        inputs = map_leaves(_as_trained, inputs, state.mean)
    for name, known in named_leaves(state.mean):
        values = dict(named_leaves(inputs)).get(name)
        shape = () if known is None else tuple(known.shape)
        if values is not None and shape and values.shape[1:][-len(shape) :] != shape:
            raise UserError(
                f"{noun} to predict are {shape_text(values.shape[1:])}, the model takes "
                f"{shape_text(shape)}"
            )
    parts = []
    with state.using_ema():
        for first in range(0, rows, BATCH):
            some = slice(first, first + BATCH)
            batch = map_leaves(lambda array, some=some: tf.constant(array[some]), inputs)
            outputs = state.probabilities(state.predict(batch))
            parts.append(map_leaves(lambda x: x.numpy(), outputs))
    return map_leaves(lambda *arrays: np.concatenate(arrays), *parts)
