"""Models for others: plain Keras or TensorFlow, which take raw pixels and need no tfloop."""

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
    """The model with its standardiser in front: raw pixels → probabilities.

    Its layers are those of `state.model`, in float32 whatever precision they were trained in, and
    with the moving average of their weights where one is kept. It takes [batch, height, width,
    channels].
    """
    if not isinstance(state.model, keras.Sequential):
        raise UserError(
            f"export takes a keras.Sequential; this model is a {type(state.model).__name__}, which "
            "Keras saves itself: state.model.save(…)"
        )
    shape = state.model.input_shape[1:]
    mean = np.broadcast_to(state.mean.numpy(), shape)
    scale = np.broadcast_to(state.scale.numpy(), shape)
    standardize = keras.layers.Normalization(
        axis=(1, 2, 3),
        mean=mean,
        variance=np.square(scale.astype(np.float64)),
        name="standardize",
    )
    layers = [
        type(layer).from_config({**layer.get_config(), "dtype": "float32"})
        for layer in state.model.layers
    ]
    model = keras.Sequential([keras.Input(shape), standardize, *layers], name="tfloop")
    with state.using_ema():
        for layer, trained in zip(layers, state.model.layers, strict=True):
            if not isinstance(layer, keras.layers.Dropout):
                layer.set_weights(trained.get_weights())
    return model


def export(state: TrainState, format: str, path: str | Path) -> None:
    """Write `plain_model` to `path`, whole or not at all.

    Args:
      state: of the model.
      format: one of FORMATS; "weights" is the layers' weights alone, without the standardiser.
      path: a file with the format's ending, or for "saved_model" a folder.

    Raises:
      UserError: an ending that is not the format's, something in the way, or a place that cannot be
        written.
    """
    path, ending = Path(path), FORMATS[format]
    if not path.name.endswith(ending):
        raise UserError(f"--out={path}: a {format} file ends in {ending}")
    if path.exists():
        raise UserError(f"--out={path}: exists already; name another")
    model = plain_model(state)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            partial = Path(folder) / path.name
            if format == "keras":
                model.save(partial)
            elif format == "weights":
                with state.using_ema():
                    state.model.save_weights(partial)
            elif format == "saved_model":
                model.export(partial, verbose=False)
            else:
                saved = str(Path(folder) / "saved")
                model.export(saved, verbose=False)
                partial.write_bytes(tf.lite.TFLiteConverter.from_saved_model(saved).convert())
            if partial.is_dir():
                shutil.move(partial, path)
            else:
                os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--out={path}: cannot be written: {error.strerror or error}") from None
