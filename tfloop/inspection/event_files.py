"""TensorBoard's event files: TFRecord files of Event messages."""

import contextlib
import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from tfloop.data.tf_data import UNTUNED
from tfloop.errors import UserError
from tfloop.wording import of_tensorflow

_numbers = itertools.count()


class EventFile:
    """A new event file in `folder`.

    What is written is on its way to the disk at once, so that TensorBoard shows it.
    """

    def __init__(self, folder: str | Path) -> None:
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{next(_numbers):06d}.tfloop"
        self._path = Path(folder) / name
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = tf.io.TFRecordWriter(str(self._path))
        self._write(Event(file_version="brain.Event:2"))

    def write(self, step: int, *summaries: Any) -> None:
        """Summary messages, TensorBoard's or TensorFlow's, as one event."""
        merged = Summary()
        for summary in summaries:
            merged.MergeFromString(summary.SerializeToString())
        self._write(Event(step=step, summary=merged))

    def write_graph(self, graph: tf.Graph) -> None:
        """The graph, with what TensorFlow calls gradient_tape under the name "backward"."""
        content = graph.as_graph_def(add_shapes=True)
        for node in content.node:
            node.name = _as_backward(node.name)
            inputs = [_as_backward(name) for name in node.input]
            del node.input[:]
            node.input.extend(inputs)
        self._write(Event(graph_def=content.SerializeToString()))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        try:
            self._file.write(event.SerializeToString())
            self._file.flush()
        except tf.errors.OpError as error:
            raise UserError(
                f"{self._path}: cannot be written: {of_tensorflow(error.message)}"
            ) from None

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        with contextlib.suppress(tf.errors.OpError):  # all was written by `write`, or it said why
            self._file.close()


def _as_backward(name: str) -> str:
    """The name of a node, or of an input: "gradient_tape/forward/conv1/…" → "backward/conv1/…"."""
    mark = "^" if name.startswith("^") else ""
    plain = name.removeprefix(mark)
    for start in ("gradient_tape/forward/", "gradient_tape/"):
        if plain.startswith(start):
            return f"{mark}backward/{plain.removeprefix(start)}"
    return name


class Scalar(NamedTuple):
    """A point of a curve."""

    run: str  # folder, relative to the one that was read; "." is that folder itself
    tag: str
    step: int
    wall_time: float  # seconds since 1970
    value: float


def event_paths(folder: str | Path) -> list[Path]:
    """The event files in `folder` and below, sorted."""
    try:
        return sorted(path for path in Path(folder).rglob("*tfevents*") if path.is_file())
    except RecursionError:
        raise UserError(f"{folder}: its folders are nested too deep") from None


REPLAYS = "replay-"  # the folders of what was trained again begin so


def own_events(folder: str | Path) -> list[Path]:
    """The event files of a run itself: those of its replays are left out."""
    paths, start = event_paths(folder), len(Path(folder).parts)
    return [path for path in paths if not path.parts[start].startswith(REPLAYS)]


def read_scalars(folder: str | Path) -> list[Scalar]:
    """Every scalar in the event files in `folder` and below, in the order of files and events.

    Files of any writer are read, TensorFlow's first version of summaries too. A last record that is
    not whole yet, as in the files of a live run, is left out, and so are zeros at a file's end.

    Args:
      folder: with event files, or one such file.

    Raises:
      UserError: no event files, or a damaged one.
    """
    folder = Path(folder)
    if folder.is_file():
        return read_files([folder], base_of(folder))
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is not a folder' if folder.exists() else 'does not exist'}")
    files = event_paths(folder)
    if not files:
        raise UserError(f"{folder}: holds no event files, here or below")
    return read_files(files, folder)


def base_of(folder: str | Path) -> Path:
    """From where the runs are named: the folder; of a single file that of its run."""
    folder = Path(folder)
    if not folder.is_file():
        return folder
    parent = folder.absolute().parent
    return parent.parent if parent.name in ("train", "test", "validation") else parent


def read_files(files: Iterable[Path], folder: Path) -> list[Scalar]:
    """Every scalar in these event files, whose runs are named from this folder on.

    Raises:
      UserError: a damaged one.
    """
    scalars: list[Scalar] = []
    known: set[tuple[str, str]] = set()
    for path in files:
        run = str(path.absolute().parent.relative_to(folder.absolute()))
        for event in _events(path):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    known.add((run, value.tag))  # later values of a tag may come without it
                try:
                    number = _number(value, (run, value.tag) in known)
                except (TypeError, ValueError):
                    raise UserError(
                        f"{path}: is damaged: {value.tag} at step {event.step} holds no number"
                    ) from None
                if number is not None:
                    scalars.append(Scalar(run, value.tag, event.step, event.wall_time, number))
    return scalars


def _number(value: Any, is_scalar: bool) -> float | None:
    """The number that a summary's value holds; None where it is no scalar in TensorBoard's sense.

    Args:
      value: a Summary.Value.
      is_scalar: does its tag belong to TensorBoard's scalars?

    Raises:
      TypeError, ValueError: it holds what no type and shape of its kind holds.
    """
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return value.simple_value
    if kind != "tensor" or not is_scalar:
        return None
    sizes = [axis.size for axis in value.tensor.tensor_shape.dim]
    dtype = tf.as_dtype(value.tensor.dtype)
    is_number = dtype.is_floating or dtype.is_integer or dtype.is_bool
    if any(size != 1 for size in sizes) or not is_number:
        return None
    return float(tf.make_ndarray(value.tensor).reshape(()))


def _events(path: Path) -> Iterator[Event]:
    try:
        records = tf.data.TFRecordDataset(str(path)).with_options(UNTUNED)
        for record in records.as_numpy_iterator():
            yield Event.FromString(record)
    except DecodeError:
        raise UserError(f"{path}: holds records that are no events") from None
    except tf.errors.DataLossError as error:
        at = re.search(r"corrupted record at (\d+)", error.message)
        is_end = "truncated" in error.message or (at and _is_zeros(path, int(at[1])))
        if not is_end:
            raise UserError(f"{path}: is damaged: {of_tensorflow(error.message)}") from None
    except tf.errors.OpError as error:
        raise UserError(f"{path}: cannot be read: {of_tensorflow(error.message)}") from None


def _is_zeros(path: Path, start: int) -> bool:
    """Is there nothing but zeros from here on? So a file ends whose writer's machine went down."""
    with open(path, "rb") as file:
        file.seek(start)
        return all(not any(part) for part in iter(lambda: file.read(1 << 20), b""))
