"""A state on disk: a folder with TensorFlow's checkpoint files and, written last, a manifest with their sums.

A checkpoint is made under a temporary name, flushed to disk and renamed, so a folder with its proper name is whole.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfloop.errors import UserError
from tfloop.state import TrainState

FORMAT = 1
MANIFEST = "manifest.json"


def save(state: TrainState, folder: str | Path, about: dict[str, Any]) -> Path:
    """Write `state` to a new folder `step-00004690` in `folder`, with `about` in its manifest; its path."""
    path = Path(folder) / f"step-{int(state.global_step):08d}"
    temporary = path.with_name(f"{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _checkpoint(state).write(str(temporary / "state"))
    files = sorted(file for file in temporary.iterdir())
    for file in files:
        _flush(file)
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, **about, "sha256": sums}, indent=2) + "\n", encoding="utf-8")
    _flush(manifest)
    _flush(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    _flush(path.parent)
    return path


def newest(folder: str | Path) -> Path:
    """The checkpoint in `folder` with the highest step.

    Raises:
      UserError: there is none.
    """
    found = sorted(path for path in Path(folder).glob("step-*") if path.suffix != ".partial")
    if not found:
        raise UserError(f"{folder}: holds no checkpoint")
    return found[-1]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after comparing every file with its sum.

    Raises:
      UserError: the manifest or a file is missing, damaged, or of another format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sums = dict(manifest["sha256"])
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / MANIFEST}: missing or damaged: {error}") from None
    if version != FORMAT:
        raise UserError(f"{path}: has format {version}, this version of tfloop reads {FORMAT}")
    for name, expected in sums.items():
        file = path / Path(name).name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise UserError(f"{file}: missing or damaged: its SHA-256 sum is not the one in {MANIFEST}")
    return manifest


def restore(state: TrainState, path: Path) -> None:
    """Set every variable of `state` to the one in the checkpoint.

    Raises:
      UserError: the checkpoint is of another model or optimizer.
    """
    try:
        _checkpoint(state).read(str(path / "state")).assert_consumed()
    except (AssertionError, ValueError, tf.errors.OpError) as error:
        raise UserError(f"{path}: is not of this model and optimizer: {str(error).splitlines()[0]}") from None


def _checkpoint(state: TrainState) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(state=state.named())


def _flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
