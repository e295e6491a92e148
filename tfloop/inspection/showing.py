"""Values as people look at them: a few numbers about a tensor, a small picture, a table by layer.

For pdb's `show`, an editor's watch window, and a notebook: `tfloop.debug.show(value)`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tfloop.errors import UserError
from tfloop.nests import named_leaves
from tfloop.vectors import Vector

FIRST = 8  # values that are shown
WIDTH = 28  # of a picture, in characters
PICTURES = 2
SHADES = " .:-=+*#%@"  # from dark to bright


class Shown(str):
    """A text that a notebook or a watch window shows as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def show(value: Any, names: Sequence[str] = ()) -> Shown:
    """Shape, type, smallest, mean and largest value, what is 0, NaN or infinite, and the first few.

    Images come as a picture in characters, labels by name, a Vector by weight, a nest by part.

    Example:
      >>> tfloop.debug.show(loop.batch(0).inputs)
      uint8 [64, 28, 28, 1]: 0 to 255, mean 33.2; 80.9 % are 0 …

    Args:
      value: a tensor, an array, a number, or a nest of them.
      names: of the classes, where these are class numbers.
    """
    return Shown("\n".join(_lines(value, names)))


def _lines(value: Any, names: Sequence[str]) -> Iterator[str]:
    if isinstance(value, Vector):
        yield repr(value)
        return
    array = _array(value)
    if array is not None:
        yield from _of_array(array, names)
        return
    if isinstance(value, str) or not isinstance(value, (Mapping, Sequence)):
        yield repr(value)
        return
    parts = list(_parts(value))
    width = max((len(name) for name, _ in parts), default=0)
    for name, part in parts:
        array = _array(part)
        yield f"{name:{width}}  {repr(part) if array is None else _summary(array)}"


def _parts(nest: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        yield from zip(nest._fields, nest, strict=True)
    elif isinstance(nest, Mapping):
        yield from ((str(name), part) for name, part in nest.items())
    else:
        yield from named_leaves(nest)


def _array(value: Any) -> np.ndarray | None:
    """The numbers of a tensor, a variable, an array or a plain number; None of anything else."""
    if isinstance(value, (bool, int, float, np.generic)):
        return np.asarray(value)
    try:
        found = value.numpy() if hasattr(value, "numpy") else value
    except (NotImplementedError, AttributeError):  # a tensor of a graph has no numbers
        return None
    if hasattr(found, "dtype") and str(found.dtype) == "bfloat16":
        found = found.astype(np.float32)
    return np.asarray(found) if isinstance(found, (np.ndarray, np.generic)) else None


def _of_array(array: np.ndarray, names: Sequence[str]) -> Iterator[str]:
    yield _summary(array)
    if names and array.dtype.kind in "iu" and array.ndim <= 1:
        known = [names[n] if 0 <= n < len(names) else str(n) for n in array.reshape(-1).tolist()]
        yield ", ".join(known[: 4 * FIRST]) + (" …" if len(known) > 4 * FIRST else "")
        return
    if array.ndim:
        values = array.reshape(-1)[:FIRST].tolist()
        more = " …" if array.size > FIRST else ""
        yield "first: " + ", ".join(map(number, values)) + more
    if is_images(array):
        yield from _pictures(array)


def _summary(array: np.ndarray) -> str:
    text = f"{array.dtype} [{', '.join(map(str, array.shape))}]"
    if not array.size or array.dtype.kind not in "fiub":
        return f"{text}: {array.size} values"
    if not array.ndim:
        return f"{number(array.item())} ({array.dtype})"
    wide = array.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    found = []
    if finite.size:
        least, most = number(finite.min()), number(finite.max())
        found.append(f"{least} to {most}, mean {number(finite.mean())}")
    parts = [f"{100 * np.mean(wide == 0):.3g} % are 0"]
    for what, count in (("NaN", np.isnan(wide).sum()), ("infinite", np.isinf(wide).sum())):
        parts += [f"{count} {what}"] if count else []
    if array.dtype.kind == "f" and finite.size:
        parts.append(f"norm {number(float(np.sqrt(np.square(finite).sum())))}")
    return f"{text}: {'; '.join([*found, ', '.join(parts)])}"


def number(value: Any) -> str:
    """A number with four digits."""
    if isinstance(value, (bool, str, bytes)):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) < 1e6):
        return str(int(value))
    return f"{value:.4g}"


def is_images(array: np.ndarray) -> bool:
    """Is it one image or several, with 1 or 3 channels, that a picture can show?"""
    shape = array.shape[-3:]
    has_axes = array.ndim in (3, 4) and shape[-1] in (1, 3) and min(shape[:2]) > 3
    return has_axes and array.size > 0 and array.dtype.kind in "fiu"


def _pictures(array: np.ndarray) -> Iterator[str]:
    """The first image, and the one that has the value farthest from the mean of all."""
    images = array.reshape((-1, *array.shape[-3:])).astype(np.float64)
    away = np.abs(images - np.nanmean(images)).reshape(len(images), -1)
    strange = int(np.nanargmax(np.where(np.isfinite(away), away, np.inf).max(axis=1)))
    chosen = list(dict.fromkeys([0, strange]))[:PICTURES]
    drawn = [picture(images[place]) for place in chosen]
    titles = [f"image {place}" for place in chosen]
    if len(chosen) > 1:
        titles[1] += ", farthest from the mean"
    widths = [max(len(rows[0]), len(title)) for rows, title in zip(drawn, titles, strict=True)]
    for rows in [titles, *zip(*drawn, strict=True)]:
        cells = [f"{cell:{width}}" for cell, width in zip(rows, widths, strict=True)]
        yield "  ".join(cells).rstrip()


def picture(image: np.ndarray) -> list[str]:
    """An image [height, width, channels] in characters, twice as high as they are wide."""
    grey = np.nan_to_num(image.mean(axis=-1), posinf=np.nan, neginf=np.nan)
    height, width = grey.shape
    columns = min(width, WIDTH)
    rows = max(1, round(height * columns / width / 2))
    ys = np.arange(height) * rows // height
    xs = np.arange(width) * columns // width
    sums, counts = np.zeros([rows, columns]), np.zeros([rows, columns])
    np.add.at(sums, (ys[:, None], xs[None, :]), np.nan_to_num(grey))
    np.add.at(counts, (ys[:, None], xs[None, :]), 1)
    cells = sums / np.maximum(counts, 1)
    least, most = cells.min(), cells.max()
    flat = np.full_like(cells, float(most > 0))  # an image of one shade
    scaled = (cells - least) / (most - least) if most > least else flat
    shades = np.minimum((scaled * len(SHADES)).astype(int), len(SHADES) - 1)
    return ["".join(SHADES[shade] for shade in row) for row in shades]


def plot(value: Any, path: str) -> None:
    """Draw a tensor into a PNG file: images side by side, a curve of [n], else a histogram.

    Raises:
      UserError: it holds no numbers, or the file cannot be written.
    """
    from tfloop.inspection import plots

    array = _array(value)
    if array is None or not array.size or array.dtype.kind not in "fiub":
        raise UserError(f"plot: {type(value).__name__} holds no numbers to draw")
    try:
        with open(path, "wb") as file:
            file.write(plots.tensor(array, is_images(array)))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
