"""A batch in parts along its rows, each with its part of Keras's mask."""

import tensorflow as tf
from keras.src.backend import get_keras_mask, set_keras_mask

from tfloop.models.normalization import cut


def split(x: tf.Tensor, sizes: list[int]) -> list[tf.Tensor]:
    """The parts of x along its rows, each with its part of Keras's mask."""
    parts, mask = cut(x, sizes), get_keras_mask(x)
    if mask is not None:
        is_by_row = mask.shape[0] == x.shape[0]  # else it is one for all
        masks = cut(mask, sizes) if is_by_row else [mask] * len(parts)
        for part, part_mask in zip(parts, masks, strict=True):
            set_keras_mask(part, part_mask)
    return parts


def join(parts: list[tf.Tensor]) -> tf.Tensor:
    """The parts put together, with Keras's mask of all."""
    if len(parts) == 1:
        return parts[0]
    x, mask = tf.concat(parts, axis=0), mask_of(parts)
    if mask is not None:
        set_keras_mask(x, mask)
    return x


def mask_of(parts: list[tf.Tensor]) -> tf.Tensor | None:
    """Keras's mask of all parts; None where they have none."""
    masks = [get_keras_mask(part) for part in parts]
    if any(mask is None for mask in masks):
        return None
    is_one = all(mask is masks[0] for mask in masks)  # for all parts, as `split` leaves it
    return masks[0] if is_one else tf.concat(masks, axis=0)


def with_masks_of(outputs: list[tf.Tensor], inputs: list[tf.Tensor]) -> list[tf.Tensor]:
    """The outputs, each with the mask that the input in its place has."""
    for y, x in zip(outputs, inputs, strict=True):
        mask = get_keras_mask(x)
        if mask is not None:
            set_keras_mask(y, mask)
    return outputs
