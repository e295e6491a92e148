"""Writes TFRecord shards: of a folder of pictures, a folder to each class, or of any data set."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfloop import scratch
from tfloop.data import parts, pictures, shard_files, shards, sources
from tfloop.data.dataset import Dataset, Split
from tfloop.errors import UserError
from tfloop.wording import counted, of_tensorflow, shape_text

TEST_SHARE = 0.1  # of each class, where pictures are not divided into train and test
Item = tuple[Any, int]  # (an image, or its Picture; class number)


class _Contents(NamedTuple):
    """What is packed."""

    parts: Mapping[str, Iterable[Item]]  # "train", "validation", "test"
    classes: list[str]  # their names, where the source has any
    mode: str = ""  # of pictures.CHANNELS, that all pictures are brought to
    told: tuple[str, ...] = ()  # what was left out or changed


def pack(
    source: str,
    folder: str | Path,
    format: str = "png",
    shard_mib: int = 64,
    say: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Shards in a new folder, whole or not at all, and what they hold.

    Args:
      source: a folder of pictures, SOURCE/train/CLASS/…, SOURCE/test/CLASS/… and maybe
        SOURCE/val/CLASS/…, by any name of `parts`, or SOURCE/CLASS/…, of which the last tenth by
        name of each class becomes the test; or a data set as in sources.load. Pictures in folders
        within a class are its, too.
      folder: a new one.
      format: of the images: png, or raw, which is larger and read faster. Pictures stay as they
        are, unless raw is asked for.
      shard_mib: size of a shard, about.
      say: is told how many files were taken, and what was left out or changed.

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
    for line in contents.told:
        say(line)
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
    encode = _Encoder(format, contents.mode)
    partial = folder
    try:
        with scratch.folder(folder.parent, f"{folder.name}.", ".partial") as partial:
            for part, images in contents.parts.items():
                examples = (encode(image, label) for image, label in images)
                _write(partial, part, examples, shard_mib << 20)
            if odd := [name for name in contents.classes if len(name.splitlines()) != 1]:
                raise UserError(f"{odd[0]!r}: the name of a class is one line; rename it")
            if contents.classes:
                names = "\n".join(contents.classes) + "\n"
                (partial / "classes.txt").write_text(names, encoding="utf-8")
            shards.load(partial)  # checks what was written, and leaves the index
            scratch.open_up(partial)
            partial.rename(folder)
    except UnicodeEncodeError:
        raise UserError(f"{folder}: a class has a name that is no UTF-8; rename it") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    except tf.errors.OpError as error:
        raise UserError(f"{folder}: cannot be written: {of_tensorflow(error.message)}") from None
    except UserError as error:
        message = error.as_flags.replace(f"--dataset={partial}", str(folder))
        raise UserError(message.replace(str(partial), str(folder))) from None


def _arrays(dataset: Dataset, source: str) -> _Contents:
    dtype = getattr(dataset.train.inputs, "dtype", None)
    if not dataset.train.has_images or dtype != np.uint8:
        raise UserError(
            f"{source}: the inputs are {dataset.inputs_text}; only images of bytes, uint8, can be "
            "packed"
        )
    if dataset.target is None or not dataset.target.is_one_class:
        raise UserError(
            f"{source}: the targets are {dataset.targets_text}; only one class of each image can "
            "be packed"
        )
    if dataset.target.kind == "shares" and any(
        (split.targets.max(axis=-1) < 1).any()
        for split in (dataset.train, dataset.test, dataset.validation)
    ):
        raise UserError(f"{source}: the targets are shares of several classes; shards hold one")
    splits = {"train": dataset.train, "test": dataset.test, "validation": dataset.validation}
    present = {part: _rows(dataset, split) for part, split in splits.items() if len(split)}
    return _Contents(present, list(dataset.target.names))


def _rows(dataset: Dataset, split: Split) -> Iterator[tuple[np.ndarray, int]]:
    for first in range(0, len(split), shards.CHUNK):
        rows = slice(first, first + shards.CHUNK)
        classes = dataset.class_numbers(split.targets[rows])
        yield from zip(split.inputs[rows], classes.tolist(), strict=True)


def _pictures(source: Path) -> _Contents | None:
    """What a folder of pictures holds; None where the source is none."""
    if not source.is_dir() or any(map(shard_files.is_shard, source.iterdir())):
        return None
    if not _folders(source):
        if pictures.find(source).files:
            raise UserError(
                f"{source}: holds pictures; put those of each class into a folder of its own in it"
            )
        return None
    if places := _parts_of(source):
        return _divided_pictures(source, places)
    classes, left_out = _classes(source), Counter[str]()
    train, test = [], []
    for number, name in enumerate(classes):
        files = _files(source / name, left_out)
        if len(files) < 2:
            raise UserError(
                f"{source / name}: holds one picture; a class needs two or more, since some of "
                "each become the test"
            )
        held_out = max(1, round(TEST_SHARE * len(files)))
        train += [(path, number) for path in files[:-held_out]]
        test += [(path, number) for path in files[-held_out:]]
    _count_others(source, classes, left_out)
    return _looked_at({"train": train, "test": test}, classes, left_out)


def _parts_of(source: Path) -> dict[str, Path]:
    """part → its folder, as SOURCE/train and SOURCE/test; {} where the folders are classes.

    Raises:
      UserError: there is a part that cannot be trained on, or tested, alone.
    """
    found = parts.by_part(_folders(source), str(source))
    places = {part: source / name for part, name in found.items()}
    if "train" in places and len(places) > 1:
        return places
    for place in places.values():  # a class may be called train, too; it holds pictures
        inner = _folders(place)
        if inner and not any(
            p.is_file() and not pictures.is_hidden(p.name) for p in place.iterdir()
        ):
            raise UserError(
                f"{place}: is named like a part of a data set, and holds folders; beside "
                f"{source / 'train'} there must be {source / 'test'} or {source / 'val'}"
            )
    return _parts_in_words(source)


def _parts_in_words(source: Path) -> dict[str, Path]:
    """As `_parts_of`, of "training_set" and "test_set"; classes may be called so, too.

    Parts hold folders alone, and those of a test are among those of the training.
    """
    folders = _folders(source)
    places = {parts.in_words(name): source / name for name in folders}
    if "train" not in places or "" in places or not 2 <= len(places) == len(folders):
        return {}
    inner = {part: set(_folders(place)) for part, place in places.items()}
    hold_classes = all(names and names <= inner["train"] for names in inner.values())
    hold_files = any(
        p.is_file() and not pictures.is_hidden(p.name)
        for place in places.values()
        for p in place.iterdir()
    )
    return places if hold_classes and not hold_files else {}


def _divided_pictures(source: Path, places: Mapping[str, Path]) -> _Contents:
    """What SOURCE/train/CLASS, SOURCE/test/CLASS and maybe SOURCE/val/CLASS hold."""
    classes, left_out = _classes(places["train"]), Counter[str]()
    found: dict[str, list] = {}
    for part, place in places.items():
        _check_classes(place, classes, places["train"])
        found[part] = []
        for number, name in enumerate(classes):
            if part == "train" or (place / name).is_dir():
                found[part] += [(path, number) for path in _files(place / name, left_out)]
        if not found[part]:
            raise UserError(f"{place}: holds no pictures in folders of the classes")
        _count_others(place, classes, left_out)
    _count_others(source, [path.name for path in places.values()], left_out)
    contents = _looked_at(found, classes, left_out)
    if "test" in found:
        return contents
    looked = dict(contents.parts)
    looked["test"] = looked.pop("validation")
    told = f"{source} {parts.NO_TEST}"
    return contents._replace(parts=looked, told=(*contents.told, told))


def _looked_at(
    by_part: Mapping[str, list[tuple[Path, int]]], classes: list[str], left_out: Counter
) -> _Contents:
    """The pictures with what their headers say, and how many of which kind there are."""
    looked = {
        part: [(pictures.look(path), number) for path, number in items]
        for part, items in by_part.items()
    }
    found = [picture for items in looked.values() for picture, _ in items]
    mode = pictures.widest(found)
    told = [f"{counted(len(found), 'picture')} taken"]
    widened = Counter(picture.mode for picture in found if picture.mode != mode)
    told += [
        f"{counted(count, f'{kind} picture')} became {mode}" for kind, count in widened.items()
    ]
    if text := pictures.left_out_text(left_out):
        told.append(text)
    return _Contents(looked, classes, mode, tuple(told))


def _folders(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted, but for hidden ones."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not pictures.is_hidden(p.name))


def _classes(root: Path) -> list[str]:
    """The names of the class folders in `root`, sorted; a class's number is its place here."""
    classes = _folders(root)
    if len(classes) < 2:
        held = "1 class folder" if classes else "no class folders"
        raise UserError(f"{root}: holds {held}; there must be two or more")
    return classes


def _check_classes(root: Path, classes: list[str], train: Path) -> None:
    """Raises UserError where `root` has a class folder that is none of `classes`."""
    for name in _folders(root):
        if name not in classes:
            raise UserError(f"{root / name}: there is no such class in {train}")


def _files(folder: Path, left_out: Counter) -> list[Path]:
    found = pictures.find(folder)
    left_out.update(found.left_out)
    if not found.files:
        raise UserError(f"{folder}: holds no pictures")
    return found.files


def _count_others(root: Path, taken: Collection[str], left_out: Counter) -> None:
    """Count the files beside the folders that are taken, and those in hidden folders."""
    for path in root.iterdir():
        if path.is_dir() and path.name not in taken:
            left_out[f"in {path.name}"] += sum(each.is_file() for each in path.rglob("*"))
        elif path.is_file():
            left_out["beside the classes"] += 1


class _Encoder:
    """Makes serialized tf.train.Examples of images, which must all have one shape."""

    def __init__(self, format: str, mode: str) -> None:
        self._format, self._mode = format, mode
        self._shape: tuple[int, ...] | None = None

    def __call__(self, image: np.ndarray | pictures.Picture, label: int) -> bytes:
        encoded, name = None, "image"
        if isinstance(image, pictures.Picture):
            name, pixels = str(image.path), pictures.read(image, self._mode)
            if image.is_plain and image.mode == self._mode:
                encoded = pictures.content(image)
        else:
            pixels = image
        if self._format == "png" and pixels.shape[-1] not in range(1, 5):
            raise UserError(
                f"images of {shape_text(pixels.shape)}: a PNG has 1 to 4 channels; use --format=raw"
            )
        self._shape = self._shape or pixels.shape
        if pixels.shape != self._shape:
            raise UserError(
                f"{name}: is {shape_text(pixels.shape)}, those before it are "
                f"{shape_text(self._shape)}; bring all to one size"
            )
        return example(pixels, label, self._format, encoded)


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
