"""Pictures made of tiles, as PNG bytes for TensorBoard: filters, feature maps, thumbnails."""

import math

import numpy as np


def filters(kernel: np.ndarray) -> bytes:
    """The filters of a kernel [height, width, channels, filters], each scaled on its own.

    Grey or in colour.
    """
    kernel = np.moveaxis(kernel, -1, 0)
    if kernel.shape[-1] not in (1, 3):
        kernel = kernel.mean(axis=-1, keepdims=True)
    return _encode(_grid(kernel, columns=8, zoom=max(1, 48 // kernel.shape[1])))


def feature_maps(activation: np.ndarray, channels: int = 16) -> bytes:
    """[images, height, width, channels]: a row per image, a column per channel."""
    maps = np.moveaxis(activation[..., :channels], -1, 1)
    columns = maps.shape[1]
    maps = maps.reshape(-1, *maps.shape[2:], 1)
    return _encode(_grid(maps, columns, zoom=max(1, 56 // maps.shape[1])))


def sprite(images: np.ndarray) -> bytes:
    """Thumbnails, row by row, as the projector wants them: as many columns as rows."""
    images = to_visible(images)
    side = math.ceil(math.sqrt(len(images)))
    sheet = np.zeros((side * side, *images.shape[1:]), np.uint8)
    sheet[: len(images)] = images
    return _encode(tiled(sheet, side))


def to_visible(images: np.ndarray) -> np.ndarray:
    """uint8, grey or in colour, from the darkest value of all images to the brightest."""
    if images.shape[-1] not in (1, 3):
        images = images.mean(axis=-1, keepdims=True)
    low, high = float(images.min()), float(images.max())
    return (255 * (images - low) / max(high - low, 1e-12)).astype(np.uint8)


def tiled(tiles: np.ndarray, columns: int) -> np.ndarray:
    """One picture of tiles [n, height, width, channels], row by row; columns divides n."""
    n, height, width, channels = tiles.shape
    rows = tiles.reshape(n // columns, columns, height, width, channels)
    return rows.transpose(0, 2, 1, 3, 4).reshape(-1, columns * width, channels)


def _grid(tiles: np.ndarray, columns: int, zoom: int) -> np.ndarray:
    """uint8 picture of float tiles, each scaled to its own range, with lines between."""
    low = tiles.min(axis=(1, 2, 3), keepdims=True)
    high = tiles.max(axis=(1, 2, 3), keepdims=True)
    tiles = (255 * (tiles - low) / np.maximum(high - low, 1e-12)).astype(np.uint8)
    tiles = tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)
    around = ((0, -len(tiles) % columns), (1, 1), (1, 1), (0, 0))
    return tiled(np.pad(tiles, around, constant_values=64), columns)


def _encode(pixels: np.ndarray) -> bytes:
    import tensorflow as tf

    return tf.io.encode_png(pixels).numpy()
