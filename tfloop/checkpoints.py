"""A state on disk: a folder with TensorFlow's checkpoint files and, written last, a manifest with their sums.

A checkpoint is made under a temporary name, flushed to disk and renamed, and older ones go only after that: at every
instant there is a newest one that is whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfloop.errors import UserError
from tfloop.state import TrainState

FORMAT = 2
MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one run: "000007-step-00004690", numbered in the order they were made."""

    def __init__(self, state: TrainState, folder: str | Path, keep: int = 2):
        """Args: the state to save; a folder of their own; how many of the newest to keep."""
        self._state, self._folder, self._keep = state, Path(folder), keep
        self._tensors = _tensors(state)

    def next_name(self) -> str:
        """The name that `save` will give."""
        last = max((int(path.name[:6]) for path in all_in(self._folder)), default=0)
        return f"{last + 1:06d}-step-{int(self._state.global_step):08d}"

    def save(self, about: dict[str, Any], best: str | None = None) -> Path:
        """Write the state, with `about` in its manifest; then remove all but the newest ones and the one named `best`.

        Raises:
          UserError: it cannot be written; those that were there are untouched.
        """
        path = self._folder / self.next_name()
        temporary = path.with_name(f"{path.name}.partial")
        try:
            self._clean()
            temporary.mkdir(parents=True)
            self._tensors.write(str(temporary / "state"))
            files = sorted(temporary.iterdir())
            for file in files:
                _flush(file)
            sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
            manifest = {"format": FORMAT, **about, "sha256": sums}
            (temporary / MANIFEST).write_text(json.dumps({**manifest, "sha256_of_this": _digest(manifest)}, indent=2) + "\n",
                                              encoding="utf-8")
            _flush(temporary / MANIFEST)
            _flush(temporary)
            temporary.rename(path)
            _flush(self._folder)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}{self._last_good()}") from None
        except tf.errors.OpError as error:
            raise UserError(f"{path}: cannot be written: {error.message.splitlines()[0]}{self._last_good()}") from None
        for old in all_in(self._folder)[self._keep:]:
            if old.name != best:
                old.rename(old.with_name(f"{old.name}.deleted")) # at once out of sight, then in its own time
        self._clean()
        return path

    def _last_good(self) -> str:
        found = all_in(self._folder)
        return f"; the last checkpoint is {found[0]}" if found else "; there is no checkpoint before it"

    def _clean(self) -> None:
        for ending in ("partial", "deleted"):
            for path in self._folder.glob(f"*.{ending}"):
                shutil.rmtree(path, ignore_errors=True)


def all_in(folder: str | Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted((path for path in Path(folder).glob("??????-step-*") if (path.name[:6] + path.name[12:]).isdecimal()), reverse=True)


def newest(folder: str | Path, warn: Callable[[str], None] = lambda message: None) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint in `folder` that is whole, and its manifest; `warn` is told of every one that is not.

    Raises:
      UserError: there is none, all are damaged, or the newest whole one is of another format.
    """
    found = all_in(folder)
    if not found:
        raise UserError(f"{folder}: holds no checkpoint")
    for path in found:
        try:
            return path, read_manifest(path)
        except DamagedCheckpoint as error:
            warn(str(error))
    raise UserError(f"{folder}: every checkpoint is damaged: {', '.join(path.name for path in found)}")


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not those that were written."""


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after comparing it and every file with its sum.

    Raises:
      DamagedCheckpoint: the manifest or a file is missing or damaged.
      UserError: it is of another format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        own, version = manifest.pop("sha256_of_this", None), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path / MANIFEST}: missing or damaged: {error}") from None
    if own != _digest(manifest):
        if isinstance(version, int) and version != FORMAT:
            raise UserError(f"{path}: has format {version}, this version of tfloop reads {FORMAT}")
        raise DamagedCheckpoint(f"{path / MANIFEST}: damaged: its SHA-256 sum is not the one it names")
    if version != FORMAT:
        raise UserError(f"{path}: has format {version}, this version of tfloop reads {FORMAT}")
    for name, expected in manifest["sha256"].items():
        file = path / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise DamagedCheckpoint(f"{file}: missing or damaged: its SHA-256 sum is not the one in {MANIFEST}")
    return manifest


def restore(state: TrainState, path: Path, other_settings: bool = False) -> None:
    """Set every variable of `state` to the one in the checkpoint.

    Args: `other_settings` lets numbers, averages and the loss scale be new, or be gone.

    Raises:
      UserError: the checkpoint is of another model or optimizer.
    """
    try:
        unescaped = lambda key: re.sub(r"\.(.)", lambda found: "/" if found[1] == "S" else found[1], key)  # TensorFlow's names for "/" and "."
        there = {unescaped(key.partition("/.ATTRIBUTES")[0].removeprefix("state/"))
                 for key in tf.train.load_checkpoint(str(path / "state")).get_variable_to_shape_map() if key.startswith("state/")}
        missing, extra = set(state.named()) - there, there - set(state.named())
        free = lambda name: other_settings and (name.startswith("hyper/") or name in ("averages", "loss_scale", "good_steps"))
        if wrong := sorted(name for name in missing | extra if not free(name)):
            raise UserError(f"{path}: is not of this model and optimizer: {'has no' if wrong[0] in missing else 'has also'} {wrong[0]}")
        read = _tensors(state).read(str(path / "state"))
        read.expect_partial() if missing or extra else read.assert_consumed()
    except (AssertionError, ValueError, tf.errors.OpError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is not of this model and optimizer: {str(error).splitlines()[0]}") from None
    if "averages" in missing:
        state.restart_averages()


def _tensors(state: TrainState) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(state=state.named())


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
