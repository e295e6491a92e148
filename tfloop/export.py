"""Models for others and from others: plain Keras or TensorFlow, which take raw pixels and need no tfloop."""

import os
import re
import shutil
import zipfile
import tempfile
from pathlib import Path

import h5py
import keras
import numpy as np
import tensorflow as tf

from tfloop import models
from tfloop.errors import UserError
from tfloop.state import TrainState

FORMATS = {"keras": ".keras", "saved_model": "", "tflite": ".tflite", "weights": ".weights.h5"}


def plain_model(state: TrainState) -> keras.Sequential:
    """The model with its standardiser in front: raw pixels [batch, height, width, channels] → probabilities.

    Its layers are those of `state.model`, in float32 whatever precision they were trained in, and with the moving average
    of their weights where one is kept.
    """
    mean, scale = (np.broadcast_to(v.numpy(), state.model.input_shape[1:]) for v in (state.mean, state.scale))
    standardise = keras.layers.Normalization(axis=(1, 2, 3), mean=mean, variance=np.square(scale.astype(np.float64)), name="standardize")
    layers = [type(layer).from_config({**layer.get_config(), "dtype": "float32"}) for layer in state.model.layers]
    model = keras.Sequential([keras.Input(state.model.input_shape[1:]), standardise, *layers], name="tfloop")
    with state.averaged():
        for layer, trained in zip(layers, state.model.layers):
            if not isinstance(layer, keras.layers.Dropout):
                layer.set_weights(trained.get_weights())
    return model


def export(state: TrainState, format: str, path: str | Path) -> None:
    """Write `plain_model` to `path`, whole or not at all.

    Args: one of FORMATS ("weights" is the layers' weights alone, without the standardiser); a file with the format's
      ending, or for "saved_model" a folder.

    Raises:
      UserError: an ending that is not the format's, something in the way, or a place that cannot be written.
    """
    path, ending = Path(path), FORMATS[format]
    if not path.name.endswith(ending):
        raise UserError(f"--out={path}: a {format} file ends in {ending}")
    if path.exists():
        raise UserError(f"--out={path}: is there already; name another")
    model = plain_model(state)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            made = Path(folder) / path.name
            if format == "keras":
                model.save(made)
            elif format == "weights":
                with state.averaged():
                    state.model.save_weights(made)
            elif format == "saved_model":
                model.export(made, verbose=False)
            else:
                model.export(Path(folder) / "saved", verbose=False)
                made.write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(Path(folder) / "saved")).convert())
            shutil.move(made, path) if made.is_dir() else os.replace(made, path)
    except OSError as error:
        raise UserError(f"--out={path}: cannot be written: {error.strerror or error}") from None


def import_weights(state: TrainState, path: str | Path, images: np.ndarray) -> None:
    """Set the model's weights, and its standardiser where the file holds one, to those of a file that Keras wrote.

    Args:
      state: of a model with the same layers with weights, in the same order.
      path: a .keras file, or a .weights.h5 file of a stack of layers. What stands in front of the first layer of a .keras
        model, Normalization or Rescaling, becomes the standardiser.
      images: some images as they lie in the data, on which the model of a .keras file must agree with this one.

    Raises:
      UserError: a file that is missing or damaged, holds other layers, or computes something else.
    """
    path = Path(path)
    if not path.name.endswith((".keras", ".weights.h5")):
        raise UserError(f"{path}: expected a .keras or a .weights.h5 file")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".keras" and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: is damaged: it is no archive, as Keras writes it")
    try:
        if path.suffix == ".keras":
            _import_model(state, path, images)
        else:
            _import_h5(state, path)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def _import_h5(state: TrainState, path: Path) -> None:
    model = state.model
    with h5py.File(path) as file:
        sizes = []
        file.visititems(lambda name, item: sizes.append(item.size) if isinstance(item, h5py.Dataset)
                        and not re.search(r"(^|/)(optimizer|normalization(_\d+)?|seed_generator(_\d+)?)/", name) else None)
    expected = sum(variable.shape.num_elements() for group in models.named_variables(model) for variable in group.values())
    if sum(sizes) != expected:
        raise UserError(f"{path}: holds {sum(sizes):,} weights, the model has {expected:,}; see --conv, --kernel, --pool, --dense")
    try:
        model.load_weights(path)
    except ValueError as error:
        name = re.search(r"<\w+ name=(\w+)", str(error))
        shapes = re.search(r"variable\.shape=(\(.*?\)), Received: value\.shape=(\(.*?\))", str(error))
        raise UserError(f"{path}: does not fit {name.group(1) if name else 'the model'}" + (
            f": a weight is {shapes.group(2)}, the model has {shapes.group(1)}" if shapes else "")) from None
    state.restart_averages()


def _import_model(state: TrainState, path: Path, images: np.ndarray) -> None:
    found = keras.saving.load_model(path, compile=False, safe_mode=True)
    front = []
    for layer in found.layers:
        if isinstance(layer, (keras.layers.Normalization, keras.layers.Rescaling)):
            front.append(layer)
        elif layer.weights:
            break
    theirs = [layer for layer in found.layers if layer.weights and layer not in front and not isinstance(layer, keras.layers.Dropout)]
    ours = [layer for layer in state.model.layers if layer.weights and not isinstance(layer, keras.layers.Dropout)]
    for index in range(max(len(theirs), len(ours))):
        one, other = (f"{type(layers[index]).__name__} {[tuple(w.shape) for w in layers[index].weights]}" if index < len(layers)
                      else "nothing" for layers in (theirs, ours))
        if one != other:
            raise UserError(f"{path}: layer {index + 1} with weights is {one}, the model has {other}; give the flags of its layers, such as --preset, "
                            f"--conv, --dense")
    for their, our in zip(theirs, ours):
        our.set_weights(their.get_weights())
    state.restart_averages()
    if front:
        def scaled(pixel):
            x = tf.fill([1, *state.model.input_shape[1:]], pixel)
            for layer in front:
                x = layer(x)
            return np.float64(x[0])

        scale = 255.0 / (scaled(255.0) - scaled(0.0))
        for variable, value in ((state.scale, scale), (state.mean, -scaled(0.0) * scale)):
            variable.assign(np.broadcast_to(value, variable.shape).astype(np.float32))
    raw = tf.cast(images, tf.float32)
    expected = found(raw if front else state.standardize(raw), training=False)
    if not models.last_activation(found):
        expected = models.probabilities(state.model, expected)
    difference = float(tf.reduce_max(tf.abs(plain_model(state)(raw) - expected)))
    if not difference < 1e-4:
        raise UserError(f"{path}: the weights fit, but its model computes something else (probabilities differ by {difference:.2g}): "
                        f"see --conv_activation, --dense_activation, --pool, --padding, --output, --standardize")
