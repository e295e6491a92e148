"""Augmentation on the device, as pure functions of the images and a key.

Images are float32 [batch, height, width, channels], as they lie in the data, before they are
standardised; what comes in from beyond their edges is 0. Random numbers come from the position in
the data, so an epoch can be repeated.
"""

import math

import numpy as np
import tensorflow as tf

from tfloop.randomness import Key


def shift(images: tf.Tensor, key: Key, pixels: tf.Tensor | float) -> tf.Tensor:
    """Each image by whole pixels, from -pixels to pixels, equally likely, in each direction."""
    draws = key.uniform([images.shape[0], 2]) * (2.0 * pixels + 1.0)
    by = tf.cast(tf.floor(draws) - pixels, tf.int64)
    turned = tf.transpose(_down(images, by[:, 0]), [0, 2, 1, 3])
    return tf.transpose(_down(turned, by[:, 1]), [0, 2, 1, 3])


def _down(images: tf.Tensor, by: tf.Tensor) -> tf.Tensor:
    """Each image by its own number of rows, which are copied whole."""
    batch, height = images.shape[:2]
    rows = _range(height) - by[:, None]  # where each comes from
    inside = (rows >= 0) & (rows < height)
    places = tf.where(inside, _range(batch)[:, None] * height + rows, batch * height)
    flat = tf.reshape(images, [batch * height, -1])
    flat = tf.pad(flat, [[0, 1], [0, 0]])  # and one row of nothing
    return tf.reshape(tf.gather(flat, places), images.shape)


def _range(length: int) -> tf.Tensor:
    """int64, since TensorFlow keeps and computes int32 in the host's memory, beside a GPU."""
    return tf.range(length, dtype=tf.int64)


def shifted(images: tf.Tensor, pixels: int) -> list[tf.Tensor]:
    """The images, and their four neighbours: shifted by N pixels down, up, right and left."""
    height, width = images.shape[1:3]
    n = pixels
    wide = tf.pad(images, [[0, 0], [n, n], [n, n], [0, 0]])
    corners = [(n, n), (0, n), (2 * n, n), (n, 0), (n, 2 * n)]
    return [wide[:, top : top + height, left : left + width] for top, left in corners]


def warp(
    images: tf.Tensor,
    key: Key,
    degrees: tf.Tensor | float = 0.0,
    factor: tf.Tensor | float = 0.0,
    elastic: tf.Tensor | float | None = None,
) -> tf.Tensor:
    """Each image turned about its middle, sized, and bent; bilinear.

    The angle lies in ±degrees, the size is 1 ± factor. Bent, the image lies on rubber: each point
    of a grid of 6 × 6, the corners of the nine squares that cover it and of those around them, is
    pulled by up to ±elastic pixels in each direction, and cubic B-splines carry all pixels along.
    (Elastic distortions: Simard, Steinkraus and Platt, ICDAR 2003; on a grid of splines: Rueckert
    et al., IEEE TMI 18, 1999.)
    """
    batch, height, width, _ = images.shape
    draws = key.uniform([batch, 2], -1.0, 1.0)
    angle, size = draws[:, 0] * degrees * (math.pi / 180.0), 1.0 + draws[:, 1] * factor
    cosine = (tf.cos(angle) / size)[:, None, None]
    sine = (tf.sin(angle) / size)[:, None, None]
    middle_y, middle_x = (height - 1) / 2.0, (width - 1) / 2.0
    y, x = tf.range(float(height))[:, None] - middle_y, tf.range(float(width)) - middle_x
    # Where each pixel comes from.
    rows, columns = cosine * y - sine * x + middle_y, sine * y + cosine * x + middle_x
    if elastic is not None:
        pulls = key.fold_in(0).uniform([batch, 2, 6, 6], -1.0, 1.0) * elastic
        pulled = tf.einsum("yi,bkij,xj->bkyx", _splines(height), pulls, _splines(width))
        rows, columns = rows + pulled[:, 0], columns + pulled[:, 1]
    return _bilinear(images, rows, columns)


def _splines(length: int) -> np.ndarray:
    """[length, 6]: the share that each of six points has in each pixel; each row's sum is 1.

    The points lie three spacings from edge to edge, and beyond.
    """
    place = np.arange(length) * 3.0 / max(length - 1, 1)
    square = np.minimum(place.astype(int), 2)
    t, shares = place - square, np.zeros((length, 6), np.float32)
    cubics = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 1 + 3 * (t + t**2 - t**3), t**3]
    for i, share in enumerate(cubics):
        shares[np.arange(length), square + i] = share / 6.0
    return shares


def _bilinear(images: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """The images at these places [batch, height, width], between pixels; 0 beyond their edges."""
    batch, height, width, channels = images.shape
    padded = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]])
    flat = tf.reshape(padded, [-1, channels])
    y = tf.clip_by_value(rows + 1.0, 0.0, height + 1.0)
    x = tf.clip_by_value(columns + 1.0, 0.0, width + 1.0)
    top, left = tf.minimum(tf.floor(y), float(height)), tf.minimum(tf.floor(x), float(width))
    row = _range(batch)[:, None, None] * (height + 2) + tf.cast(top, tf.int64)
    first = row * (width + 2) + tf.cast(left, tf.int64)
    a, b, c, d = (tf.gather(flat, first + step) for step in (0, 1, width + 2, width + 3))
    down, right = (y - top)[..., None], (x - left)[..., None]
    above, below = a + (b - a) * right, c + (d - c) * right
    return above + (below - above) * down


def cut_out(images: tf.Tensor, key: Key, side: tf.Tensor | float) -> tf.Tensor:
    """A square of side × side pixels in each image, its middle anywhere, becomes 0.

    (DeVries and Taylor, arXiv:1708.04552.)
    """
    batch, height, width, _ = images.shape
    draws = key.uniform([batch, 2])

    def is_covered(axis: int, length: int) -> tf.Tensor:
        """[batch, length]: which rows, or columns, the square covers."""
        middle = tf.floor(draws[:, axis, None] * length) + 0.5 * (side % 2.0)
        return tf.abs(tf.range(float(length)) + 0.5 - middle) < side / 2.0

    rows, columns = is_covered(0, height), is_covered(1, width)
    kept = ~(rows[:, :, None] & columns[:, None, :])
    return images * tf.cast(kept, images.dtype)[..., None]


def flip(images: tf.Tensor, key: Key) -> tf.Tensor:
    """Each image, or with equal chance its mirror image, left and right changed."""
    is_flipped = key.uniform([images.shape[0]]) < 0.5
    return tf.where(is_flipped[:, None, None, None], tf.reverse(images, axis=[2]), images)


QUANTILES = 4096  # of the distribution that shares are drawn from


def beta_quantiles(alpha: float) -> np.ndarray:
    """[QUANTILES] float32: the middles of as many equally likely parts of Beta(alpha, alpha)."""
    from scipy.stats import beta  # scikit-learn's own dependency

    places = (np.arange(QUANTILES) + 0.5) / QUANTILES
    return beta.ppf(places, alpha, alpha).astype(np.float32)


def draw_share(key: Key, quantiles: np.ndarray) -> tf.Tensor:
    """A number from 0 to 1, drawn from the distribution that has these quantiles."""
    place = tf.cast(key.uniform([1])[0] * QUANTILES, tf.int64)
    return tf.gather(tf.constant(quantiles), tf.minimum(place, QUANTILES - 1))


def mixed(values: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """share · each row + (1 - share) · the row that is as far from the end.

    The rows of a batch lie in random order, so that is a row at random. (mixup: Zhang, Cisse,
    Dauphin and Lopez-Paz, arXiv:1710.09412.)
    """
    return share * values + (1.0 - share) * tf.reverse(values, axis=[0])


def cut_mixed(images: tf.Tensor, key: Key, share: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """(images, share): a box of about 1 - share of each is from the image as far from the end.

    The box is the same for all; its middle may lie anywhere, and what of it lies beyond the edge is
    lost, so that a larger share is left. (CutMix: Yun et al., arXiv:1905.04899.)
    """
    _, height, width, _ = images.shape
    draws, side = key.uniform([2]), tf.sqrt(1.0 - share)

    def is_covered(axis: int, length: int) -> tf.Tensor:
        middle = tf.floor(draws[axis] * length)
        return tf.abs(tf.range(float(length)) - middle + 0.5) < 0.5 * side * length

    box = is_covered(0, height)[:, None] & is_covered(1, width)
    area = tf.reduce_mean(tf.cast(box, tf.float32))
    return tf.where(box[None, :, :, None], tf.reverse(images, axis=[0]), images), 1.0 - area


class Augmentation(tf.Module):
    """The augmentations that are asked for, with their numbers as variables.

    Called with images and a key, it gives the images augmented.

    Attributes:
      hyper: "augment_shift" … → float32 variable, for each that is not 0; 0 leaves an augmentation
        out for good.
      names: of all that are asked for.
    """

    def __init__(
        self,
        shift: int = 0,
        rotate: float = 0.0,
        scale: float = 0.0,
        elastic: float = 0.0,
        cutout: int = 0,
        flip: bool = False,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        """Make one.

        Args:
          shift: by up to N pixels.
          rotate: by up to N degrees.
          scale: by up to this share of the size.
          elastic: bent by up to N pixels.
          cutout: side of the square, in pixels.
          flip: left and right changed, of half of the images.
          mixup: examples mixed in pairs, targets too; the share is drawn from Beta(mixup, mixup).
          cutmix: a box of another image in each, targets mixed by its share, which is drawn from
            Beta(cutmix, cutmix). Of both, a step draws one.
        """
        super().__init__(name="augmentation")
        asked = {
            "augment_shift": shift,
            "augment_rotate": rotate,
            "augment_scale": scale,
            "augment_elastic": elastic,
            "augment_cutout": cutout,
        }
        self.hyper = {
            name: tf.Variable(value, dtype=tf.float32, trainable=False, name=name)
            for name, value in asked.items()
            if value
        }
        self._flips = flip
        self._quantiles = {
            name: beta_quantiles(alpha)
            for name, alpha in (("mixup", mixup), ("cutmix", cutmix))
            if alpha
        }
        self.names = [*self.hyper, *(["augment_flip"] if flip else []), *self._quantiles]

    @property
    def changes_images(self) -> bool:
        """Is each image changed for itself?"""
        return bool(self.hyper) or self._flips

    @property
    def mixes(self) -> bool:
        """Are examples mixed with each other?"""
        return bool(self._quantiles)

    def mix(self, images: tf.Tensor, key: Key) -> tuple[tf.Tensor, tf.Tensor]:
        """(the images of a whole batch mixed, the share that each has of its own, a scalar)."""
        images = tf.cast(images, tf.float32)

        def by_mixup() -> tuple[tf.Tensor, tf.Tensor]:
            share = draw_share(key.fold_in(4), self._quantiles["mixup"])
            return mixed(images, share), share

        def by_cutmix() -> tuple[tf.Tensor, tf.Tensor]:
            share = draw_share(key.fold_in(5), self._quantiles["cutmix"])
            return cut_mixed(images, key.fold_in(6), share)

        ways = {"mixup": by_mixup, "cutmix": by_cutmix}
        if len(self._quantiles) == 1:
            return ways[next(iter(self._quantiles))]()
        return tf.cond(key.fold_in(3).uniform([1])[0] < 0.5, by_mixup, by_cutmix)

    def __call__(self, images: tf.Tensor, key: Key) -> tf.Tensor:
        numbers = {name: tf.convert_to_tensor(variable) for name, variable in self.hyper.items()}
        if not numbers.keys().isdisjoint(("augment_rotate", "augment_scale", "augment_elastic")):
            images = warp(
                images,
                key.fold_in(0),
                numbers.get("augment_rotate", 0.0),
                numbers.get("augment_scale", 0.0),
                numbers.get("augment_elastic"),
            )
        if self._flips:
            images = flip(images, key.fold_in(7))
        if "augment_shift" in numbers:
            images = shift(images, key.fold_in(1), numbers["augment_shift"])
        if "augment_cutout" in numbers:
            images = cut_out(images, key.fold_in(2), numbers["augment_cutout"])
        return images
