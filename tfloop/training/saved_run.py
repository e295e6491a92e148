"""A run on disk as objects: its settings, its state, and whether images fit it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tfloop.assembly import make_state
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.state import TrainState
from tfloop.training import checkpoints, folders
from tfloop.wording import shape_text


def open_run(
    folder: str | Path,
    best: bool = False,
    warn: Callable[[str], None] = lambda message: None,
) -> tuple[Config, TrainState, dict[str, Any]]:
    """(settings, state, manifest) of a run, from its newest checkpoint that is whole.

    The weights are their moving average where the run keeps one.

    Args:
      folder: the run's.
      best: take the checkpoint that did best on the validation images.
      warn: is told of checkpoints that are not whole.

    Raises:
      UserError: not a run's folder, or no checkpoint in it is whole.
    """
    folder = Path(folder)
    folders.settings(folder)
    path, manifest = checkpoints.newest(folder / "checkpoints", warn)
    if best:
        if not manifest["best"]:
            raise UserError(
                f"{folder}: has no best checkpoint: the run had no validation images, see "
                "--validation_size"
            )
        path = folder / "checkpoints" / manifest["best"]["checkpoint"]
        manifest = checkpoints.read_manifest(path)
    config = Config.make(**manifest["config"])
    shape, classes = tuple(manifest["image_shape"]), manifest["classes"]
    state = make_state(config, shape, classes, manifest["steps_per_epoch"])
    checkpoints.restore(state, path)
    state.adopt_ema()
    return config, state, manifest


def check_fit(images: np.ndarray, state: TrainState, manifest: dict, where: str) -> None:
    """Raises UserError for images of another shape or pixel type than the model was trained on."""
    shape, pixels = tuple(state.model.input_shape[1:]), manifest["pixels"]
    if images.shape[1:] != shape:
        raise UserError(
            f"{where}: images are {shape_text(images.shape[1:])}, the model takes "
            f"{shape_text(shape)}"
        )
    if images.dtype.name != pixels:
        raise UserError(
            f"{where}: pixels are {images.dtype.name}, the model was trained on {pixels}"
        )
