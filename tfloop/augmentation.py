"""Augmentation on the device, as pure functions of the images and a key: shift, rotate and scale, cut out.

Images are float32 [batch, height, width, channels], as they lie in the data, before they are standardised; what comes
in from beyond their edges is 0. Random numbers come from the position in the data, so an epoch can be repeated.
"""

import math

import tensorflow as tf

from tfloop.randomness import Key


def shift(images: tf.Tensor, key: Key, pixels) -> tf.Tensor:
    """Each image by whole pixels, from -pixels to pixels, equally likely, in each direction."""
    by = tf.cast(tf.floor(key.uniform([images.shape[0], 2]) * (2.0 * pixels + 1.0)) - pixels, tf.int32)
    turned = tf.transpose(_down(images, by[:, 0]), [0, 2, 1, 3])
    return tf.transpose(_down(turned, by[:, 1]), [0, 2, 1, 3])


def _down(images: tf.Tensor, by: tf.Tensor) -> tf.Tensor:
    """Each image by its own number of rows, which are copied whole."""
    batch, height = images.shape[:2]
    rows = tf.range(height) - by[:, None]  # where each comes from
    places = tf.where((rows >= 0) & (rows < height), tf.range(batch)[:, None] * height + rows, batch * height)
    flat = tf.pad(tf.reshape(images, [batch * height, -1]), [[0, 1], [0, 0]])  # and one row of nothing
    return tf.reshape(tf.gather(flat, places), images.shape)


def shifted(images: tf.Tensor, pixels: int) -> list[tf.Tensor]:
    """The images, and all of them by so many pixels down, up, right and left."""
    height, width = images.shape[1:3]
    wide = tf.pad(images, [[0, 0], [pixels, pixels], [pixels, pixels], [0, 0]])
    corners = [(pixels, pixels), (0, pixels), (2 * pixels, pixels), (pixels, 0), (pixels, 2 * pixels)]
    return [wide[:, top:top + height, left:left + width] for top, left in corners]


def turn(images: tf.Tensor, key: Key, degrees, factor) -> tf.Tensor:
    """Each image about its middle, by an angle in ±degrees, and by a size in 1 ± factor; bilinear."""
    batch, height, width, _ = images.shape
    draws = key.uniform([batch, 2], -1.0, 1.0)
    angle, size = draws[:, 0] * degrees * (math.pi / 180.0), 1.0 + draws[:, 1] * factor
    cosine, sine = tf.cos(angle) / size, tf.sin(angle) / size
    x, y, zero = (width - 1) / 2.0, (height - 1) / 2.0, tf.zeros([batch])
    back = tf.stack([cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y, zero, zero], axis=1)
    return tf.raw_ops.ImageProjectiveTransformV3(images=images, transforms=back, output_shape=[height, width],
                                                 interpolation="BILINEAR", fill_mode="CONSTANT", fill_value=0.0)


def cut_out(images: tf.Tensor, key: Key, side) -> tf.Tensor:
    """A square of side × side pixels in each image, its middle anywhere, becomes 0 (DeVries and Taylor, arXiv:1708.04552)."""
    batch, height, width, _ = images.shape
    draws = key.uniform([batch, 2])
    covered = [tf.abs(tf.range(float(length)) + 0.5 - (tf.floor(draws[:, axis, None] * length) + 0.5 * (side % 2.0))) < side / 2.0
               for axis, length in enumerate((height, width))]
    return images * tf.cast(~(covered[0][:, :, None] & covered[1][:, None, :]), images.dtype)[..., None]


class Augmentation(tf.Module):
    """The augmentations that are asked for, with their numbers as variables: called with images and a key.

    Attributes:
      hyper: "augment_shift" … → float32 variable, for each that is not 0; 0 leaves an augmentation out for good.
    """

    def __init__(self, shift: int = 0, rotate: float = 0.0, scale: float = 0.0, cutout: int = 0):
        """Args: pixels; degrees; share of the size; side of the square in pixels."""
        super().__init__(name="augmentation")
        asked = {"augment_shift": shift, "augment_rotate": rotate, "augment_scale": scale, "augment_cutout": cutout}
        self.hyper = {name: tf.Variable(value, dtype=tf.float32, trainable=False, name=name) for name, value in asked.items() if value}

    def __call__(self, images: tf.Tensor, key: Key) -> tf.Tensor:
        numbers = {name: tf.convert_to_tensor(variable) for name, variable in self.hyper.items()}
        if "augment_rotate" in numbers or "augment_scale" in numbers:
            images = turn(images, key.fold_in(0), numbers.get("augment_rotate", 0.0), numbers.get("augment_scale", 0.0))
        if "augment_shift" in numbers:
            images = shift(images, key.fold_in(1), numbers["augment_shift"])
        if "augment_cutout" in numbers:
            images = cut_out(images, key.fold_in(2), numbers["augment_cutout"])
        return images
