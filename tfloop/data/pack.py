"""Writes TFRecord shards: of a folder of pictures, a folder to each class, or of any data set."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfloop.data import shards, sources
from tfloop.data.dataset import Dataset, Split
from tfloop.errors import UserError
from tfloop.wording import shape_text

PICTURES = (".png", ".jpg", ".jpeg")
TEST_SHARE = 0.1  # of each class, where pictures are not divided into train and test


class _Contents(NamedTuple):
    """What is packed."""

    parts: Mapping[str, Iterable]  # "train", "test" → (image or its file, class number)
    classes: list[str]  # their names, where the source has any


def pack(source: str, folder: str | Path, format: str = "png", shard_mib: int = 64) -> Dataset:
    """Shards in a new folder, whole or not at all, and what they hold.

    Args:
      source: a folder of pictures, SOURCE/train/CLASS/… and SOURCE/test/CLASS/…, or SOURCE/CLASS/…,
        of which the last tenth by name of each class becomes the test; or a data set as in
        sources.load.
      folder: a new one.
      format: of the images: png, or raw, which is larger and read faster. Pictures stay as they
        are, unless raw is asked for.
      shard_mib: size of a shard, about.

    Raises:
      UserError: nothing to pack, something that cannot be read, or a folder that exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    contents = _pictures(Path(source))
    if contents is None:
        contents = _arrays(sources.load(source, standardize=False), source)
    _make(folder, contents, format, shard_mib)
    return shards.load(folder)


def cached(dataset: Dataset, folder: str | Path) -> Path:
    """The folder, in `folder`, with the same training and test images decoded.

    It is made the first time.
    """
    path = Path(folder) / dataset.digest[:16]
    if not path.exists():
        try:
            _make(path, _arrays(dataset, dataset.name), "raw", shard_mib=64)
        except UserError:
            if not path.exists():  # else another process was faster
                raise
    return path


def _make(folder: Path, contents: _Contents, format: str, shard_mib: int) -> None:
    """The folder with its shards and their index, whole or not at all."""
    partial: Path | None = None
    encode = _Encoder(format)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f"{folder.name}."
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix, suffix=".partial"))
        for part, images in contents.parts.items():
            examples = (encode(image, label) for image, label in images)
            _write(partial, part, examples, shard_mib << 20)
        if contents.classes:
            names = "\n".join(contents.classes) + "\n"
            (partial / "classes.txt").write_text(names, encoding="utf-8")
        shards.load(partial)  # checks what was written, and leaves the index
        partial.chmod(0o755)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    except UserError as error:
        message = error.as_flags.replace(f"--dataset={partial}", str(folder))
        raise UserError(message.replace(str(partial), str(folder))) from None
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)


def _arrays(dataset: Dataset, source: str) -> _Contents:
    dtype = dataset.train.inputs.dtype
    if dtype != np.uint8:
        raise UserError(f"{source}: pixels are {dtype}; only bytes, uint8, can be packed")
    return _Contents({"train": _rows(dataset.train), "test": _rows(dataset.test)}, [])


def _rows(split: Split) -> Iterator[tuple[np.ndarray, int]]:
    for first in range(0, len(split), shards.CHUNK):
        rows = slice(first, first + shards.CHUNK)
        yield from zip(split.inputs[rows], split.targets[rows].tolist(), strict=True)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def _pictures(source: Path) -> _Contents | None:
    """What a folder of pictures holds; None where the source is none."""
    if not source.is_dir() or any(source.glob("*tfrecord*")):
        return None
    if not any(path.is_dir() for path in source.iterdir()):
        if any(_is_picture(path) for path in source.iterdir()):
            raise UserError(
                f"{source}: holds pictures; put those of each class into a folder of its own in it"
            )
        return None
    if (source / "train").is_dir() and (source / "test").is_dir():
        return _divided_pictures(source)
    classes = _classes(source)
    train, test = [], []
    for number, name in enumerate(classes):
        files = _files(source / name)
        if len(files) < 2:
            raise UserError(
                f"{source / name}: holds one picture; a class needs two or more, since some of "
                "each become the test"
            )
        held_out = max(1, round(TEST_SHARE * len(files)))
        train += [(path, number) for path in files[:-held_out]]
        test += [(path, number) for path in files[-held_out:]]
    return _Contents({"train": train, "test": test}, classes)


def _divided_pictures(source: Path) -> _Contents:
    """What SOURCE/train/CLASS and SOURCE/test/CLASS hold."""
    classes = _classes(source / "train")
    parts: dict[str, list] = {}
    for part in ("train", "test"):
        _check_classes(source / part, classes)
        parts[part] = []
        for number, name in enumerate(classes):
            parts[part] += [(path, number) for path in _files(source / part / name)]
    return _Contents(parts, classes)


def _classes(root: Path) -> list[str]:
    """The names of the class folders in `root`, sorted; a class's number is its place here."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    if len(classes) < 2:
        held = "1 class folder" if classes else "no class folders"
        raise UserError(f"{root}: holds {held}; there must be two or more")
    return classes


def _check_classes(root: Path, classes: list[str]) -> None:
    """Raises UserError where `root` has a class folder that is none of `classes`."""
    for path in sorted(root.iterdir()):
        if path.is_dir() and path.name not in classes:
            raise UserError(f"{path}: there is no such class in {root.parent / 'train'}")


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.glob("*") if _is_picture(path))
    if not files:
        raise UserError(f"{folder}: holds no pictures ({', '.join(PICTURES)})")
    return files


class _Encoder:
    """Makes serialized tf.train.Examples of images, which must all have one shape."""

    def __init__(self, format: str) -> None:
        self._format = format
        self._shape: tuple[int, ...] | None = None

    def __call__(self, image: np.ndarray | Path, label: int) -> bytes:
        pixels, encoded = _read(image) if isinstance(image, Path) else (image, None)
        self._shape = self._shape or pixels.shape
        if pixels.shape != self._shape:
            raise UserError(
                f"{image}: is {shape_text(pixels.shape)}, those before it are "
                f"{shape_text(self._shape)}; bring all to one size"
            )
        return example(pixels, label, self._format, encoded)


def _read(path: Path) -> tuple[np.ndarray, bytes]:
    """(pixels, content) of a picture."""
    content = path.read_bytes()
    try:
        return tf.io.decode_image(content, expand_animations=False).numpy(), content
    except tf.errors.OpError:
        raise UserError(f"{path}: cannot be read as a picture") from None


def example(
    pixels: np.ndarray, label: int, format: str = "png", encoded: bytes | None = None
) -> bytes:
    """A serialized tf.train.Example of an image.

    Args:
      pixels: [height, width, channels] uint8.
      label: its class number.
      format: "png" or "raw".
      encoded: the image as PNG or JPEG, where it is that already.
    """
    if format == "raw":
        encoded = pixels.tobytes()
    elif encoded is None:
        encoded = tf.io.encode_png(pixels).numpy()
    sizes = zip(("height", "width", "channels"), pixels.shape, strict=True)
    features = {
        "image": _bytes_feature(encoded),
        "label": _int_feature(label),
        "format": _bytes_feature(b"raw" if format == "raw" else b"encoded"),
        **{name: _int_feature(size) for name, size in sizes},
    }
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return example.SerializeToString()


def _bytes_feature(value: Any) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def _int_feature(value: int) -> tf.train.Feature:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))


def _write(folder: Path, part: str, examples: Iterable[bytes], shard_bytes: int) -> None:
    """Shards of about this size, named with their number and how many there are."""
    paths: list[Path] = []
    writer, written = None, 0
    for serialized in examples:
        if writer is None or written > shard_bytes:
            if writer:
                writer.close()
            paths.append(folder / f"{part}-{len(paths):05d}.tfrecord")
            writer, written = tf.io.TFRecordWriter(str(paths[-1])), 0
        writer.write(serialized)
        written += len(serialized) + 16
    if writer:
        writer.close()
    for path in paths:
        path.rename(path.with_name(f"{path.stem}-of-{len(paths):05d}.tfrecord"))
