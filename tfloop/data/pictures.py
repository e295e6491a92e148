"""Pictures in files, read by one rule, in `pack` and in `predict` alike.

Pillow says what a file is, and reads all that is not plain: it knows every format that people have
(its list is asked for, not kept here), palettes, orientation and odd colour models. A plain PNG or
JPEG, of 8 bits in grey, RGB or RGBA and upright, is left to TensorFlow, which reads it in training,
too: so both see the same pixels.

The rule: the first frame of an animation; turned as EXIF says; palettes, CMYK and other colour
models become RGB; transparency is kept as a fourth channel, unless all is opaque; of a set, grey
pictures beside coloured ones become RGB. More than 8 bits a channel are refused: they would be cut.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps, UnidentifiedImageError

from tfloop.errors import UserError
from tfloop.wording import counted

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}  # the modes that all others are brought to
_DEEP = ("I", "F")  # and those that begin so, such as I;16: more than 8 bits
_ORIENTATION = 0x112  # EXIF's tag
MOST_PIXELS = 1 << 28  # of one picture: more takes more memory than a picture should


class Picture(NamedTuple):
    """What a file holds, as its header says."""

    path: Path
    mode: str  # of CHANNELS
    is_plain: bool  # may TensorFlow read its bytes as they are?


def endings() -> frozenset[str]:
    """The endings of the files that Pillow reads, in small letters."""
    Image.init()
    known = Image.registered_extensions()
    return frozenset(ending for ending, kind in known.items() if kind in Image.OPEN)


def is_hidden(name: str) -> bool:
    """Is a file or folder of this name none of the user's, but the system's?"""
    return name.startswith((".", "@", "__MACOSX"))


class Found(NamedTuple):
    """The pictures below a folder, and what else lies there."""

    files: list[Path]  # by name
    left_out: Counter  # reason → files


def find(folder: Path) -> Found:
    """The pictures in a folder and below, by name; hidden files and folders are left out.

    Links are followed; a folder that is reached twice is taken once.
    """
    files, left_out, known, seen = [], Counter[str](), endings(), set()
    for place, folders, names in os.walk(folder, followlinks=True):
        true_place = os.path.realpath(place)
        if true_place in seen:
            folders.clear()
            continue
        seen.add(true_place)
        for path in (Path(place, name) for name in names):
            if any(map(is_hidden, path.relative_to(folder).parts)):
                left_out["hidden"] += 1
            elif path.suffix.lower() in known:
                files.append(path)
            else:
                left_out[path.suffix.lower() or "without an ending"] += 1
    return Found(sorted(files), left_out)


def left_out_text(left_out: Counter) -> str:
    """ "4 files left out: 3 .txt, 1 hidden"; "" where there are none."""
    if not left_out:
        return ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    return f"{counted(left_out.total(), 'file')} left out: {reasons}"


def look(path: Path) -> Picture:
    """What a picture is, from its header; of transparency, every pixel is looked at.

    Raises:
      UserError: it cannot be read, is too large, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            _check(path, image)
            mode = _mode(image)
            is_plain = image.format in ("PNG", "JPEG") and image.mode == mode
            is_upright = image.getexif().get(_ORIENTATION, 1) == 1
            return Picture(path, mode, is_plain and is_upright)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{path}: has too many pixels for a picture") from None
    except Exception as error:  # Pillow's readers of odd formats raise what comes
        raise UserError(f"{path}: cannot be read as a picture: {_reason(error)}") from None


def _check(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UserError(f"{path}: is {height}×{width}, too large for a picture")
    if image.mode.startswith(_DEEP) or _is_deep(image):
        raise UserError(
            f"{path}: has more than 8 bits a channel, which pictures are not read with; bring it "
            "to 8 bits, or give the numbers in an .npz file"
        )


def _is_deep(image: Image.Image) -> bool:
    """Would Pillow cut its colours to 8 bits?

    A tile's arguments say how it is stored: such as "RGB;16B", or ("RGB", 65535) with the greatest
    number, which a PPM has.
    """
    for tile in getattr(image, "tile", ()):
        args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if isinstance(args[0], str) and re.search(r";(16|32)", args[0]):
            return True
        if tile[0].startswith("ppm") and args[1] > 255:
            return True
    return False


def _mode(image: Image.Image) -> str:
    """The mode of CHANNELS that keeps all that is in the picture."""
    is_clear = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    if is_clear and _is_transparent(image):
        return "RGBA"
    if image.mode in ("1", "L", "LA", "La"):
        return "L"
    if image.mode in ("P", "PA"):
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
        return "L" if (colours == colours[:, :1]).all() else "RGB"
    return "RGB"


def _is_transparent(image: Image.Image) -> bool:
    least, _ = image.convert("RGBA").getchannel("A").getextrema()
    return int(least) < 255  # type: ignore[arg-type]  # of one channel these are numbers


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is none"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def widest(pictures: Iterable[Picture]) -> str:
    """The mode that holds all of these."""
    return max((picture.mode for picture in pictures), key=lambda mode: CHANNELS[mode])


def content(picture: Picture) -> bytes:
    """The file as it is.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return picture.path.read_bytes()
    except OSError as error:
        raise UserError(f"{picture.path}: cannot be read: {error.strerror}") from None


def read(picture: Picture, mode: str) -> np.ndarray:
    """[height, width, channels] uint8, in this mode of CHANNELS.

    Raises:
      UserError: it is damaged.
    """
    path = picture.path
    try:
        if picture.is_plain:
            channels = CHANNELS[mode]
            return tf.io.decode_image(content(picture), channels, expand_animations=False).numpy()
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            pixels = np.asarray(upright.convert(mode))
    except tf.errors.OpError:
        raise UserError(f"{path}: is damaged: it cannot be read as a picture") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a picture: {_reason(error)}") from None
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
