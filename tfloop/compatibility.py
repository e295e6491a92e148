"""Do a model and a data set fit each other, and the loss? Asked before anything is trained."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfloop import models
from tfloop.config import check_setting
from tfloop.data import pipelines
from tfloop.data.dataset import Dataset, Split
from tfloop.errors import UserError
from tfloop.state import TrainState
from tfloop.wording import first_sentence, shape_text

LOOKED_AT = 8  # training images whose outputs tell whether a model gives probabilities


def check_data(data: Dataset, sizes: dict[str, int]) -> None:
    """Raises UserError for what is no data set, and sizes that it does not suffice for."""
    if not isinstance(data, Dataset):
        raise UserError(
            f"expected a tfloop.Dataset, found {type(data).__name__}; tfloop.from_arrays(…) and "
            "tfloop.load(…) make one"
        )
    for name, value in sizes.items():
        check_setting(name, value)
    for part, split in (("training", data.train), ("test", data.test)):
        check_labels(split, f"{data.name}: {part} labels")
    if sizes["batch_size"] > len(data.train):
        raise UserError(
            f"--batch_size={sizes['batch_size']} is larger than the {len(data.train)} training "
            "images"
        )


def check_labels(split: Split, what: str) -> None:
    """Raises UserError for labels that are no class numbers, which would be cut to whole ones."""
    labels = split.labels
    if labels.dtype.kind not in "iub" or labels.ndim != 1:
        raise UserError(
            f"{what}: found {labels.dtype} {labels.shape}; the loop trains on class numbers [N], "
            "whole numbers from 0 on"
        )


def check_fit(state: TrainState, data: Dataset, most: int) -> tf.TensorShape:
    """The shape of the model's outputs for one image.

    Args:
      state: whose model.
      data: that it is to be trained on.
      most: images that it takes at once.

    Raises:
      UserError: the model takes other images, gives outputs that do not fit the classes, or gives
        probabilities where logits are meant.
    """
    _check_takes(state.model, data.image_shape)
    batch = pipelines.batch_at(data.train, min(LOOKED_AT, most), 0, 0, 0)
    images = state.standardize(batch.images)
    outputs = _called(state, images, data)
    rows = images.shape[0]
    if not tf.is_tensor(outputs) or len(outputs.shape) != 2 or outputs.shape[0] != rows:
        is_tensor = tf.is_tensor(outputs)
        found = f"shape {tuple(outputs.shape)}" if is_tensor else _described(outputs)
        raise UserError(
            f"the model gives {found} for a batch of {rows} images; expected one tensor [batch, "
            "outputs]"
        )
    if state.loss is None and outputs.shape[1] < data.classes:
        raise UserError(
            f"the model gives outputs of shape {tuple(outputs.shape[1:])} for an image; the data "
            f"have {data.classes} classes"
        )
    if state.loss is None:
        _check_logits(state, images, outputs)
    return outputs.shape[1:]


def _called(state: TrainState, images: tf.Tensor, data: Dataset) -> Any:
    try:
        return state.forward(images)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, tf.errors.OpError) as error:
        inputs, reason = getattr(state.model, "inputs", None) or [], first_sentence(error)
        if len(inputs) > 1:
            names = ", ".join(x.name for x in inputs)
            reason = (
                f"it has {len(inputs)} inputs ({names}); the loop hands in one tensor of images"
            )
        elif inputs and "Invalid input shape" in reason:
            reason = f"it takes inputs of shape {tuple(inputs[0].shape)}"
        raise UserError(
            f"the model cannot be called with images [{images.shape[0]}, "
            f"{', '.join(map(str, data.image_shape))}] float32: {reason}"
        ) from None


def _described(outputs: Any) -> str:
    parts = keras.tree.flatten(outputs)
    if len(parts) > 1:
        return f"{len(parts)} outputs"
    return type(outputs).__name__


def _check_logits(state: TrainState, images: tf.Tensor, outputs: tf.Tensor) -> None:
    """Raises UserError where rows of outputs are probabilities: by their values, of any model."""
    squashed = models.squashed_values(outputs.numpy())
    if not squashed:
        return
    try:  # logits would leave the interval from 0 to 1 for inputs of another size
        more = [state.forward(x).numpy() for x in (10.0 * images, -10.0 * images)]
        wide = [values for values in more if np.isfinite(values).all()]
    except (ValueError, TypeError, tf.errors.OpError):  # tokens, of which there are so many
        wide = []
    if wide:
        squashed = models.squashed_values(np.concatenate([outputs.numpy(), *wide]))
    if squashed:
        *_, (last, _, _) = models.activations(state.model, images)
        shown = ", ".join(f"{value:.3g}" for value in outputs.numpy()[0][:4])
        raise UserError(
            f"the model's outputs are probabilities, those of a {squashed} ({last} gives {shown}, "
            f"… for the first image); the loss takes logits. Leave the {squashed} out, or give a "
            "loss of your own, such as keras.losses.sparse_categorical_crossentropy"
        )


def classifies(state: TrainState, outputs: tf.TensorShape, classes: int) -> bool:
    """Is there an output for each class, so that accuracy means something?"""
    return outputs[0] > 1 and (state.loss is None or outputs[0] == classes)


def _check_takes(model: Any, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError where the model says what images it takes, and they are others."""
    is_built = isinstance(model, keras.Model) and model.built
    shape = getattr(model, "input_shape", None) if is_built else None
    if not isinstance(shape, tuple) or len(shape) != 4 or isinstance(shape[0], tuple):
        return
    pairs = zip(shape[1:], image_shape, strict=True)
    if any(side not in (None, found) for side, found in pairs):
        raise UserError(
            f"the model takes images of {shape_text(shape[1:])}, the data have "
            f"{shape_text(image_shape)}"
        )
