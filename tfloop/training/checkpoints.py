"""A state on disk: a folder with TensorFlow's checkpoint files and a manifest with their sums.

A checkpoint is made under a temporary name, flushed to disk and renamed, and older ones go only
after that: at every instant there is a newest one that is whole.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfloop import plain_files, scratch
from tfloop.errors import UserError
from tfloop.optimizers import Optimizer
from tfloop.state import TrainState
from tfloop.training.manifests import FORMAT, MANIFEST, all_in, number_of, sum_of, sum_of_file
from tfloop.training.manifests import newest as newest
from tfloop.training.manifests import read_manifest as read_manifest
from tfloop.vectors import count_elements
from tfloop.wording import of_tensorflow


class Checkpoints:
    """The checkpoints of one run: "000007-step-00004690", numbered in the order they were made."""

    def __init__(self, state: TrainState, folder: str | Path, keep: int = 2) -> None:
        """Make one.

        Args:
          state: what is saved.
          folder: of the checkpoints alone.
          keep: how many of the newest to keep.
        """
        self._state, self._folder, self._keep = state, Path(folder), keep

    def next_name(self) -> str:
        """The name that `save` will give."""
        last = max(map(number_of, all_in(self._folder)), default=0)
        return f"{last + 1:06d}-step-{int(self._state.global_step):08d}"

    def save(self, about: dict[str, Any], best: str | None = None) -> Path:
        """Write the state; then remove all but the newest checkpoints and the best.

        Args:
          about: what its manifest holds beside the sums.
          best: the name of one that is kept, however old.

        Raises:
          UserError: it cannot be written; the older ones are untouched.
        """
        path = self._folder / self.next_name()
        if self._folder.is_symlink():  # what it points to is not the run's
            raise UserError(f"{self._folder}: has become a link; nothing is written through it")
        try:
            self._clean()
            self._write(path, about)
        except OSError as error:
            self._clean()
            reason = f"{error.strerror}{self._last_good()}"
            raise UserError(f"{path}: cannot be written: {reason}") from None
        except tf.errors.OpError as error:
            self._clean()
            reason = f"{of_tensorflow(error.message)}{self._last_good()}"
            raise UserError(f"{path}: cannot be written: {reason}") from None
        for old in all_in(self._folder)[self._keep :]:
            if old.name != best:
                old.rename(old.with_name(f"{old.name}.deleted"))  # out of sight at once
        self._clean()
        return path

    def _write(self, path: Path, about: dict[str, Any]) -> None:
        temporary = path.with_name(f"{path.name}.partial")
        temporary.mkdir(parents=True)
        _tensors(self._state).write(str(temporary / "state"))
        files = sorted(temporary.iterdir())
        for file in files:
            _flush(file)
        sums = {file.name: sum_of_file(file) for file in files}
        trained = {"without_gradient": self._state.stable(self._state.without_gradient)}
        manifest = {"format": FORMAT, **about, **trained, "sha256": sums}
        text = json.dumps({**manifest, "sha256_of_this": sum_of(manifest)}, indent=2)
        (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")
        _flush(temporary / MANIFEST)
        _flush(temporary)
        temporary.rename(path)
        _flush(self._folder)

    def _last_good(self) -> str:
        kept = all_in(self._folder)
        if not kept:
            return "; there is no checkpoint before it"
        return f"; the last checkpoint is {kept[0]}"

    def _clean(self) -> None:
        """Remove what is no longer needed, and what an interrupted `save` left."""
        for ending in ("partial", "deleted"):
            for path in self._folder.glob(f"*.{ending}"):
                shutil.rmtree(path, ignore_errors=True)


def restore(state: TrainState, path: Path, other_settings: bool = False) -> None:
    """Set every variable of `state` to the one in the checkpoint.

    Args:
      state: is changed in place.
      path: of the checkpoint.
      other_settings: numbers, averages and the loss scale may be new, or be gone.

    Raises:
      UserError: the checkpoint is of another model or optimizer.
    """
    misfit = f"{path}: is not of this model and optimizer"
    try:
        saved = _names_in(path)
        _leave_out_what_it_did(state, path)
        in_one = _slots_in_one_vector(state, path)
        expected = set(state.named()) - in_one
        missing, extra = expected - saved, saved - expected - in_one
        _check_trained(path, missing, extra)
        for name in sorted(missing | extra):
            if not (_is_of_no_use(name) or (other_settings and _may_differ(name))):
                what = "has no" if name in missing else "has also"
                raise UserError(f"{misfit}: {what} {name}")
        others = _with_other_totals(state, path)  # of other metrics: the epoch's are counted anew
        tensors = {name: v for name, v in state.named().items() if name not in others | in_one}
        with _plain_name(path) as name:
            read = tf.train.Checkpoint(state=tensors).read(name)
            if missing or extra or others or in_one:
                read.expect_partial()
            else:
                read.assert_consumed()
    except UserError:
        raise
    except (AssertionError, ValueError, TypeError, tf.errors.OpError) as error:
        raise UserError(f"{misfit}: {of_tensorflow(str(error))}") from None
    if "averages" in missing:
        state.restart_ema()


@contextlib.contextmanager
def _plain_name(path: Path) -> Iterator[str]:
    """A name of a checkpoint's files that TensorFlow does not take for a pattern.

    It looks for files by patterns, in which [, ], *, ? and \\ mean something.
    """
    if not set("[]*?\\{}") & set(str(path.absolute())):
        yield str(path / "state")
        return
    with scratch.temporary("checkpoint") as folder:
        link = folder / "checkpoint"
        link.symlink_to(path.absolute(), target_is_directory=True)
        yield str(link / "state")


def _shapes(path: Path) -> dict[str, list[int]]:
    """The keys in a checkpoint, with the shapes of what they hold."""
    with _plain_name(path) as name:
        return tf.train.load_checkpoint(name).get_variable_to_shape_map()


def _slots_in_one_vector(state: TrainState, path: Path) -> set[str]:
    """Set the slots that an earlier version saved as one vector over all weights.

    Returns: the names of their variables, in the state and in the checkpoint.
    """
    optimizer, found = state.optimizer, set[str]()
    if not isinstance(optimizer, Optimizer):
        return found
    shapes = _shapes(path)
    size = count_elements(state.weights.values())
    for name in {key.partition("/")[0] for key in optimizer.slots}:
        key = f"state/slots.S{name}/.ATTRIBUTES/VARIABLE_VALUE"
        keys = optimizer.in_blocks(name)
        if keys and shapes.get(key) == [size]:
            with _plain_name(path) as file:
                value = tf.train.load_checkpoint(file).get_tensor(key)
            optimizer.set_whole(name, tf.constant(value))
            found |= {f"slots/{name}", *(f"slots/{part}" for part in keys)}
    return found


def _leave_out_what_it_did(state: TrainState, path: Path) -> None:
    """Weights that had no gradient when they were saved are not trained here either.

    A state learns of that in its loop's first step, which this one may not have made.
    """
    try:
        manifest = plain_files.read_json(path / MANIFEST, finite=False)
        named = set(manifest.get("without_gradient", ()))
    except (OSError, ValueError, AttributeError):
        return  # `read_manifest` says what is wrong with it
    names = [name for name in state.weights if state.stable([name])[0] in named]
    if names:
        state.leave_out(names)


def _check_trained(path: Path, missing: set[str], extra: set[str]) -> None:
    """Raises UserError where other weights are trained here than when they were saved."""
    for group, other, was, cure in (
        ("weights", "moving", "frozen", "trainable = False"),
        ("moving", "weights", "trained", "trainable = True"),
    ):
        for name in sorted(missing):
            kind, _, weight = name.partition("/")
            if kind == group and f"{other}/{weight}" in extra:
                raise UserError(
                    f"{path}: {weight} was {was} when it was saved, and is not here; set its "
                    f"layer's {cure} before the state is restored"
                )


def _is_of_no_use(name: str) -> bool:
    """Is it what earlier versions kept: Keras's seeds, and the rate that a schedule drove?"""
    return "seed_generator" in name or name == "slots/1"


def _may_differ(name: str) -> bool:
    is_of_settings = name.startswith(("hyper/", "schedule/"))
    return is_of_settings or name in ("averages", "loss_scale", "good_steps")


def _names_in(path: Path) -> set[str]:
    """The names of the variables in a checkpoint, as `TrainState.named` has them."""
    keys = _shapes(path)
    names = set()
    for key in keys:
        if key.startswith("state/"):
            escaped = key.partition("/.ATTRIBUTES")[0].removeprefix("state/")
            # TensorFlow writes ".S" for "/" and ".." for ".".
            names.add(re.sub(r"\.(.)", lambda m: "/" if m[1] == "S" else m[1], escaped))
    return names


def _with_other_totals(state: TrainState, path: Path) -> set[str]:
    """ "totals", where the checkpoint's are of other metrics than the state's."""
    shapes = _shapes(path)
    found = shapes.get("state/totals/.ATTRIBUTES/VARIABLE_VALUE")
    return set() if found in (None, list(state.totals.shape)) else {"totals"}


def _tensors(state: TrainState) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(state=state.named())


def _flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
