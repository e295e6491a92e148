"""Class probabilities of new images, read from a folder of pictures or an .npz file."""

import re
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfloop.data.dataset import check_images
from tfloop.data.readers import read_npz
from tfloop.errors import UserError
from tfloop.state import TrainState
from tfloop.wording import shape_text

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
ARRAYS = ("images", "x", "x_test")
BATCH = 256


def read_images(path: str | Path, shape: tuple[int, int, int]) -> tuple[list[str], np.ndarray]:
    """(names, images [N, *shape]) of the pictures in a folder, by name, or in an .npz file.

    Raises:
      UserError: nothing to read, a damaged file, or an image of another shape than the model's.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not files:
            raise UserError(f"{path}: holds no pictures ({', '.join(PICTURES)})")
        images = [_read_picture(file, shape) for file in files]
        return [file.name for file in files], np.stack(images)
    if path.suffix != ".npz" or not path.is_file():
        missing = "" if path.exists() else "does not exist; "
        raise UserError(f"{path}: {missing}expected a folder of pictures or an .npz file")
    arrays = read_npz(path)
    name = next((name for name in ARRAYS if name in arrays), None)
    if name is None:
        found = ", ".join(arrays) or "nothing"
        raise UserError(f"{path}: expected an array named {' or '.join(ARRAYS)}; found {found}")
    checked = check_images(arrays[name], f"{path}: {name}")
    if not len(checked):
        raise UserError(f"{path}: {name} holds no images")
    return [str(row) for row in range(len(checked))], checked


def _read_picture(file: Path, shape: tuple[int, int, int]) -> np.ndarray:
    channels = shape[-1] if shape[-1] in (1, 3, 4) else 0
    try:
        content = tf.io.read_file(str(file))
        image = tf.io.decode_image(content, channels, expand_animations=False).numpy()
    except tf.errors.OpError as error:
        reason = re.sub(r"{{.*?}}|\[Op.*", "", error.message).strip()
        raise UserError(f"{file}: cannot be read as a picture: {reason}") from None
    if image.shape != tuple(shape):
        raise UserError(
            f"{file}: is {shape_text(image.shape)}, the model takes {shape_text(shape)}"
        )
    return image


def predict(state: TrainState, images: np.ndarray) -> np.ndarray:
    """Probabilities [N, classes] of images [N, height, width, channels] as they lie in the data.

    They are not standardised. As in evaluation, the weights are their moving average where one is
    kept. With a loss of one's own it is what the model gives, whatever that is.

    Raises:
      UserError: there are no images, or the model takes others.
    """
    if not isinstance(state, TrainState):
        raise UserError(f"predict: expected a tfloop.TrainState, found {type(state).__name__}")
    images = check_images(np.asarray(images), "images to predict")
    if not len(images):
        raise UserError("there are no images to predict")
    known = tuple(state.mean.shape)
    if known and images.shape[1:] != known:
        raise UserError(
            f"images to predict are {shape_text(images.shape[1:])}, the model takes "
            f"{shape_text(known)}"
        )
    parts = []
    with state.using_ema():
        for first in range(0, len(images), BATCH):
            outputs = state.predict(images[first : first + BATCH])
            parts.append(state.probabilities(outputs).numpy())
    return np.concatenate(parts)
