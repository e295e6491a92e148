"""Writes TFRecord shards: of a folder of pictures, a folder to each class, or of any data set that can be read."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfloop import data, records, sources
from tfloop.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg")
TEST_SHARE = 0.1  # of each class, where pictures are not divided into train and test


def pack(source: str, folder: str | Path, format: str = "png", shard_mib: int = 64) -> data.Dataset:
    """Shards in a new folder, whole or not at all, and what they hold.

    Args:
      source: a folder of pictures, SOURCE/train/CLASS/… and SOURCE/test/CLASS/…, or SOURCE/CLASS/…, of which the last
        tenth by name of each class becomes the test; or a data set as in sources.load.
      folder: a new one.
      format: of the images: png, or raw, which is larger and read faster. Pictures stay as they are, unless raw is asked for.
      shard_mib: size of a shard, about.

    Raises:
      UserError: nothing to pack, something that cannot be read, or a folder that is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: is there already; name a new folder")
    pictures = _pictures(Path(source))
    parts, classes = pictures or (_arrays(sources.load(source, standardize=False), source), [])
    _make(folder, parts, classes, format, shard_mib)
    return records.load(folder)


def cached(dataset: data.Dataset, folder: str | Path) -> Path:
    """The folder, in `folder`, with the same training and test images decoded; made the first time."""
    path = Path(folder) / dataset.digest[:16]
    if not path.exists():
        try:
            _make(path, _arrays(dataset, dataset.name), [], "raw", shard_mib=64)
        except UserError:
            if not path.exists():  # else another process was faster
                raise
    return path


def _make(folder: Path, parts: dict[str, Iterable], classes: list[str], format: str, shard_mib: int) -> None:
    """The folder with its shards and their index, whole or not at all."""
    partial, shape = None, []
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".partial"))
        for part, examples in parts.items():
            _write(partial, part, (_example(image, label, format, shape) for image, label in examples), shard_mib << 20)
        if classes:
            (partial / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
        records.load(partial)  # checks what was written, and leaves the index
        partial.chmod(0o755)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    except UserError as error:
        raise UserError(str(error).replace(f"--dataset={partial}", str(folder)).replace(str(partial), str(folder))) from None
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)


def _arrays(dataset: data.Dataset, source: str) -> dict[str, Iterable]:
    if dataset.train.images.dtype != np.uint8:
        raise UserError(f"{source}: pixels are {dataset.train.images.dtype}; only bytes, uint8, can be packed")
    return {"train": _rows(dataset.train), "test": _rows(dataset.test)}


def _rows(split: data.Split) -> Iterator[tuple[np.ndarray, int]]:
    for first in range(0, len(split), records.CHUNK):
        yield from zip(split.images[first:first + records.CHUNK], split.labels[first:first + records.CHUNK].tolist())


def _pictures(source: Path) -> tuple[dict[str, list], list[str]] | None:
    """({part: [(file, class)]}, class names), or None where the source is no folder of pictures."""
    if not source.is_dir() or any(source.glob("*tfrecord*")):
        return None
    if not any(path.is_dir() for path in source.iterdir()):
        if any(path.suffix.lower() in PICTURES for path in source.iterdir()):
            raise UserError(f"{source}: holds pictures; put those of each class into a folder of its own in it")
        return None
    divided = (source / "train").is_dir() and (source / "test").is_dir()
    roots = {part: source / part for part in ("train", "test")} if divided else {"train": source}
    classes = sorted(path.name for path in roots["train"].iterdir() if path.is_dir())
    if len(classes) < 2:
        raise UserError(f"{roots['train']}: holds {len(classes) or 'no'} class folder{'s' * (not classes)}; there must be two or more")
    parts = {"train": [], "test": []}
    for part, root in roots.items():
        if strange := sorted(path.name for path in root.iterdir() if path.is_dir() and path.name not in classes):
            raise UserError(f"{root / strange[0]}: there is no such class in {roots['train']}")
        for number, name in enumerate(classes):
            files = sorted(path for path in (root / name).glob("*") if path.suffix.lower() in PICTURES)
            if not files:
                raise UserError(f"{root / name}: holds no pictures ({', '.join(PICTURES)})")
            if not divided and len(files) < 2:
                raise UserError(f"{root / name}: holds one picture; a class needs two or more, since some of each become the test")
            held = 0 if divided else max(1, round(TEST_SHARE * len(files)))
            parts[part] += [(path, number) for path in files[:len(files) - held]]
            if not divided:
                parts["test"] += [(path, number) for path in files[len(files) - held:]]
    return parts, classes


def _example(image: np.ndarray | Path, label: int, format: str, shape: list[int] | None = None) -> bytes:
    """A serialized tf.train.Example. Where `shape` is given it becomes that of the first image, which all must have."""
    if isinstance(image, Path):
        encoded = image.read_bytes()
        try:
            pixels = tf.io.decode_image(encoded, expand_animations=False).numpy()
        except tf.errors.OpError:
            raise UserError(f"{image}: cannot be read as a picture") from None
    else:
        pixels, encoded = image, None
    if shape is not None:
        shape[:] = shape or pixels.shape
    if shape and tuple(shape) != pixels.shape:
        raise UserError(f"{image}: is {'×'.join(map(str, pixels.shape))}, those before it are {'×'.join(map(str, shape))}; bring all to one size")
    if format == "raw":
        encoded = pixels.tobytes()
    elif encoded is None:
        encoded = tf.io.encode_png(pixels).numpy()
    text = lambda value: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    number = lambda value: tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    features = {"image": text(encoded), "label": number(label), "format": text(b"raw" if format == "raw" else b"encoded"),
                **{name: number(size) for name, size in zip(("height", "width", "channels"), pixels.shape)}}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def _write(folder: Path, part: str, examples: Iterable[bytes], shard_bytes: int) -> None:
    """Shards of about this size, named with their number and how many there are."""
    made, writer, written = [], None, 0
    for example in examples:
        if writer is None or written > shard_bytes:
            if writer:
                writer.close()
            made.append(folder / f"{part}-{len(made):05d}.tfrecord")
            writer, written = tf.io.TFRecordWriter(str(made[-1])), 0
        writer.write(example)
        written += len(example) + 16
    if writer:
        writer.close()
    for path in made:
        path.rename(path.with_name(f"{path.stem}-of-{len(made):05d}.tfrecord"))
