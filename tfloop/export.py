"""A trained run as a model for others: plain Keras or TensorFlow, which take raw pixels and need no tfloop."""

import os
import shutil
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tfloop.errors import UserError
from tfloop.state import TrainState

FORMATS = {"keras": ".keras", "saved_model": "", "tflite": ".tflite", "weights": ".weights.h5"}


def plain_model(state: TrainState) -> keras.Sequential:
    """The model with its standardiser in front: raw pixels [batch, height, width, channels] → probabilities.

    Its layers are those of `state.model`, and share its weights.
    """
    mean, scale = (np.broadcast_to(v.numpy(), state.model.input_shape[1:]) for v in (state.mean, state.scale))
    standardise = keras.layers.Normalization(axis=(1, 2, 3), mean=mean, variance=np.square(scale.astype(np.float64)), name="standardize")
    return keras.Sequential([keras.Input(state.model.input_shape[1:]), standardise, *state.model.layers], name="tfloop")


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
                state.model.save_weights(made)
            elif format == "saved_model":
                model.export(made, verbose=False)
            else:
                model.export(Path(folder) / "saved", verbose=False)
                made.write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(Path(folder) / "saved")).convert())
            shutil.move(made, path) if made.is_dir() else os.replace(made, path)
    except OSError as error:
        raise UserError(f"--out={path}: cannot be written: {error.strerror or error}") from None
