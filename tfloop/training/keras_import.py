"""Models from others: the weights in a file that Keras wrote."""

import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import tensorflow as tf

from tfloop import models
from tfloop.data.dataset import is_scaled
from tfloop.errors import UserError
from tfloop.nests import leaves, map_leaves
from tfloop.state import TrainState
from tfloop.training.export import plain_model
from tfloop.wording import first_sentence

TOLERANCE = 1e-4  # of probabilities, between their model and this one


def import_weights(state: TrainState, path: str | Path, images: np.ndarray) -> None:
    """Set the model's weights to those of a file that Keras wrote.

    Its standardiser, too, where the file holds one.

    Args:
      state: of a model with the same layers with weights, in the same order.
      path: a .keras file, or a .weights.h5 file of a stack of layers. What stands in front of the
        first layer of a .keras model, Normalization or Rescaling, becomes the standardiser.
      images: some images as they lie in the data, on which the model of a .keras file must agree
        with this one.

    Raises:
      UserError: a file that is missing or damaged, holds other layers, or computes something else.
    """
    path = Path(path)
    if not path.name.endswith((".keras", ".weights.h5")):
        raise UserError(f"{path}: expected a .keras or a .weights.h5 file")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    is_archive = path.suffix == ".keras"
    if is_archive and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: is damaged: it is no archive, as Keras writes it")
    try:
        if is_archive:
            _import_model(state, path, images)
        else:
            _import_h5(state, path)
    except UserError:
        raise
    except Exception as error:  # whatever Keras makes of a file that it did not write
        raise UserError(f"{path}: cannot be read: {first_sentence(error)}") from None


_NO_WEIGHTS = re.compile(r"(^|/)(optimizer|normalization(_\d+)?|seed_generator(_\d+)?)/")


def _import_h5(state: TrainState, path: Path) -> None:
    sizes: list[int] = []

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not _NO_WEIGHTS.search(name):
            sizes.append(item.size)

    with h5py.File(path) as file:
        file.visititems(add)
    groups = models.named_variables(state.model)
    expected = sum(v.shape.num_elements() for group in groups for v in group.values())
    if sum(sizes) != expected:
        raise UserError(
            f"{path}: holds {sum(sizes):,} weights, the model has {expected:,}; see --conv, "
            "--kernel, --pool, --dense"
        )
    try:
        state.model.load_weights(path)
    except ValueError as error:
        raise UserError(f"{path}: does not fit {_misfit(str(error))}") from None
    state.restart_ema()


def _misfit(message: str) -> str:
    """Which layer does not fit, and how, from Keras's message."""
    name = re.search(r"<\w+ name=(\w+)", message)
    layer = name[1] if name else "the model"
    shapes = re.search(r"variable\.shape=(\(.*?\)), Received: value\.shape=(\(.*?\))", message)
    if not shapes:
        return layer
    return f"{layer}: a weight is {shapes[2]}, the model has {shapes[1]}"


def _import_model(state: TrainState, path: Path, images: np.ndarray) -> None:
    _check_sizes(state, path)
    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    front = _front(model)
    theirs = [layer for layer in _with_weights(model) if layer not in front]
    ours = _with_weights(state.model)
    for index in range(max(len(theirs), len(ours))):
        their, our = _describe(theirs, index), _describe(ours, index)
        if their != our:
            raise UserError(
                f"{path}: layer {index + 1} with weights is {their}, the model has {our}; give the "
                "flags of its layers, such as --preset, --conv, --dense"
            )
    for one, other in zip(theirs, ours, strict=True):
        other.set_weights(one.get_weights())
    state.restart_ema()
    if front:
        _adopt_scale(state, front)
    _check_agreement(state, path, model, images, scales_itself=bool(front))


_MOST_CONFIG = 4 << 20  # bytes of an archive's config.json
_NO_SIZES = ("seed", "epsilon", "shared_object_id")  # numbers of a layer that make nothing large


def _check_sizes(state: TrainState, path: Path) -> None:
    """Raises UserError for an archive that would take far more memory than the model it must fit.

    Keras unpacks all of it, and makes all its layers, before anyone can look at them.
    """
    shapes = [tuple(weight.shape) for weight in state.model.weights]
    inputs = [spec.shape[1:] for spec in leaves(state.model.inputs)]
    sizes = [size or 1 for shape in (*shapes, *inputs) for size in shape]
    largest = max([1024, *sizes, *(math.prod(size or 1 for size in shape) for shape in inputs)])
    weights = sum(4 * math.prod(shape) for shape in shapes)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry.file_size for entry in archive.infolist()}
        most = 16 * weights + (64 << 20)  # an optimizer's slots, in 64 bits, and more
        if sum(entries.values()) > most:
            raise UserError(
                f"{path}: unpacks to {sum(entries.values()) / 2**20:,.0f} MiB, too much for a "
                f"model whose weights are {weights / 2**20:,.1f} MiB; see --conv, --dense"
            )
        if entries.get("config.json", 0) > _MOST_CONFIG:
            raise UserError(f"{path}: its config.json is larger than {_MOST_CONFIG >> 20} MiB")
        config = json.loads(archive.read("config.json"))
    config.pop("compile_config", None)  # is not read
    found = max(_numbers(config), default=0)
    if found > largest:
        raise UserError(
            f"{path}: a layer in it has a size of {found:,}, the model has none above {largest:,}; "
            "see --conv, --dense"
        )


def _numbers(config: Any) -> Iterator[int]:
    """The whole numbers in a configuration as Keras writes it, but for those that size nothing."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [each for name, each in value.items() if name not in _NO_SIZES]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, int) and not isinstance(value, bool):
            yield value


def _front(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers that scale the pixels, in front of the first layer with weights."""
    front = []
    for layer in _layers(model):
        if isinstance(layer, (keras.layers.Normalization, keras.layers.Rescaling)):
            front.append(layer)
        elif layer.weights:
            break
    return front


def _layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers in their order, those of a model in it among them."""
    found: list[keras.layers.Layer] = []
    for layer in model.layers:
        found += _layers(layer) if isinstance(layer, keras.Model) else [layer]
    return found


def _with_weights(model: keras.Model) -> list[keras.layers.Layer]:
    return [
        layer
        for layer in _layers(model)
        if layer.weights and not isinstance(layer, keras.layers.Dropout)
    ]


def _describe(layers: list[keras.layers.Layer], index: int) -> str:
    if index >= len(layers):
        return "nothing"
    shapes = [tuple(weight.shape) for weight in layers[index].weights]
    return f"{type(layers[index]).__name__} {shapes}"


def _adopt_scale(state: TrainState, front: list[keras.layers.Layer]) -> None:
    """The layers in front, which are linear in each pixel, become the standardiser."""

    def scaled(pixel: float) -> np.ndarray:
        x = tf.fill([1, *state.model.input_shape[1:]], pixel)
        for layer in front:
            x = layer(x)
        return x[0].numpy().astype(np.float64)

    scale = 255.0 / (scaled(255.0) - scaled(0.0))
    mean = -scaled(0.0) * scale
    for variable, value in ((state.scale, scale), (state.mean, mean)):
        variable.assign(np.broadcast_to(value, variable.shape).astype(np.float32))


def _as_float32(array: np.ndarray) -> tf.Tensor:
    return tf.cast(array, tf.float32) if is_scaled(array) else tf.constant(array)


def _check_agreement(
    state: TrainState,
    path: Path,
    model: keras.Model,
    inputs: Any,
    scales_itself: bool,
) -> None:
    """Raises UserError where their model gives other probabilities than this one."""
    raw = map_leaves(_as_float32, inputs)
    expected = model(raw if scales_itself else state.standardize(raw), training=False)
    are_logits = tf.is_tensor(expected) and not models.output_activation(model)
    if are_logits and not models.squashed_values(expected.numpy()):
        expected = state.probabilities(expected)
    ours, theirs = leaves(plain_model(state, as_predicted=False)(raw)), leaves(expected)
    difference = max(float(tf.reduce_max(tf.abs(a - b))) for a, b in zip(ours, theirs, strict=True))
    if not difference < TOLERANCE:
        raise UserError(
            f"{path}: the weights fit, but its model computes something else (probabilities differ "
            f"by {difference:.2g}): see --conv_activation, --dense_activation, --pool, --padding, "
            "--output, --standardize"
        )
