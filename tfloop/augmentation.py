"""Augmentation on the device, as pure functions of the images and a key: shift; rotate, scale and bend; cut out.

Images are float32 [batch, height, width, channels], as they lie in the data, before they are standardised; what comes
in from beyond their edges is 0. Random numbers come from the position in the data, so an epoch can be repeated.
"""

import math

import numpy as np
import tensorflow as tf

from tfloop.randomness import Key


def shift(images: tf.Tensor, key: Key, pixels) -> tf.Tensor:
    """Each image by whole pixels, from -pixels to pixels, equally likely, in each direction."""
    by = tf.cast(tf.floor(key.uniform([images.shape[0], 2]) * (2.0 * pixels + 1.0)) - pixels, tf.int64)
    turned = tf.transpose(_down(images, by[:, 0]), [0, 2, 1, 3])
    return tf.transpose(_down(turned, by[:, 1]), [0, 2, 1, 3])


def _down(images: tf.Tensor, by: tf.Tensor) -> tf.Tensor:
    """Each image by its own number of rows, which are copied whole."""
    batch, height = images.shape[:2]
    rows = _range(height) - by[:, None]  # where each comes from
    places = tf.where((rows >= 0) & (rows < height), _range(batch)[:, None] * height + rows, batch * height)
    flat = tf.pad(tf.reshape(images, [batch * height, -1]), [[0, 1], [0, 0]])  # and one row of nothing
    return tf.reshape(tf.gather(flat, places), images.shape)


def _range(length: int) -> tf.Tensor:
    """int64, since TensorFlow keeps and computes int32 in the host's memory, beside a GPU."""
    return tf.range(length, dtype=tf.int64)


def shifted(images: tf.Tensor, pixels: int) -> list[tf.Tensor]:
    """The images, and all of them by so many pixels down, up, right and left."""
    height, width = images.shape[1:3]
    wide = tf.pad(images, [[0, 0], [pixels, pixels], [pixels, pixels], [0, 0]])
    corners = [(pixels, pixels), (0, pixels), (2 * pixels, pixels), (pixels, 0), (pixels, 2 * pixels)]
    return [wide[:, top:top + height, left:left + width] for top, left in corners]


def warp(images: tf.Tensor, key: Key, degrees=0.0, factor=0.0, elastic=None) -> tf.Tensor:
    """Each image turned about its middle by an angle in ±degrees, sized by 1 ± factor, and bent; bilinear.

    Bent, the image lies on rubber: each point of a grid of 6 × 6, the corners of the nine squares that cover it and of those
    around them, is pulled by up to ±elastic pixels in each direction, and cubic B-splines carry all pixels along. (Elastic
    distortions: Simard, Steinkraus and Platt, ICDAR 2003; on a grid of splines: Rueckert et al., IEEE TMI 18, 1999.)
    """
    batch, height, width, _ = images.shape
    draws = key.uniform([batch, 2], -1.0, 1.0)
    angle, size = draws[:, 0] * degrees * (math.pi / 180.0), 1.0 + draws[:, 1] * factor
    cosine, sine = (tf.cos(angle) / size)[:, None, None], (tf.sin(angle) / size)[:, None, None]
    y, x = tf.range(float(height))[:, None] - (height - 1) / 2.0, tf.range(float(width)) - (width - 1) / 2.0
    rows, columns = cosine * y - sine * x + (height - 1) / 2.0, sine * y + cosine * x + (width - 1) / 2.0  # where pixels come from
    if elastic is not None:
        pulls = key.fold_in(0).uniform([batch, 2, 6, 6], -1.0, 1.0) * elastic
        pulled = tf.einsum("yi,bkij,xj->bkyx", _splines(height), pulls, _splines(width))
        rows, columns = rows + pulled[:, 0], columns + pulled[:, 1]
    return _bilinear(images, rows, columns)


def _splines(length: int) -> np.ndarray:
    """[length, 6]: the share that each of six points, three spacings from edge to edge, has in each pixel; each row's sum is 1."""
    place = np.arange(length) * 3.0 / max(length - 1, 1)
    square = np.minimum(place.astype(int), 2)
    t, shares = place - square, np.zeros((length, 6), np.float32)
    for i, share in enumerate([(1 - t)**3, 3 * t**3 - 6 * t**2 + 4, 1 + 3 * (t + t**2 - t**3), t**3]):
        shares[np.arange(length), square + i] = share / 6.0
    return shares


def _bilinear(images: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """The images at these places [batch, height, width], between pixels; 0 beyond their edges."""
    batch, height, width, channels = images.shape
    wide = tf.reshape(tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]]), [-1, channels])
    y, x = tf.clip_by_value(rows + 1.0, 0.0, height + 1.0), tf.clip_by_value(columns + 1.0, 0.0, width + 1.0)
    top, left = tf.minimum(tf.floor(y), float(height)), tf.minimum(tf.floor(x), float(width))
    first = (_range(batch)[:, None, None] * (height + 2) + tf.cast(top, tf.int64)) * (width + 2) + tf.cast(left, tf.int64)
    a, b, c, d = (tf.gather(wide, first + step) for step in (0, 1, width + 2, width + 3))
    down, right = (y - top)[..., None], (x - left)[..., None]
    above, below = a + (b - a) * right, c + (d - c) * right
    return above + (below - above) * down


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

    def __init__(self, shift: int = 0, rotate: float = 0.0, scale: float = 0.0, elastic: float = 0.0, cutout: int = 0):
        """Args: pixels; degrees; share of the size; pixels; side of the square in pixels."""
        super().__init__(name="augmentation")
        asked = {"augment_shift": shift, "augment_rotate": rotate, "augment_scale": scale, "augment_elastic": elastic,
                 "augment_cutout": cutout}
        self.hyper = {name: tf.Variable(value, dtype=tf.float32, trainable=False, name=name) for name, value in asked.items() if value}

    def __call__(self, images: tf.Tensor, key: Key) -> tf.Tensor:
        numbers = {name: tf.convert_to_tensor(variable) for name, variable in self.hyper.items()}
        if not numbers.keys().isdisjoint(("augment_rotate", "augment_scale", "augment_elastic")):
            images = warp(images, key.fold_in(0), numbers.get("augment_rotate", 0.0), numbers.get("augment_scale", 0.0),
                          numbers.get("augment_elastic"))
        if "augment_shift" in numbers:
            images = shift(images, key.fold_in(1), numbers["augment_shift"])
        if "augment_cutout" in numbers:
            images = cut_out(images, key.fold_in(2), numbers["augment_cutout"])
        return images
