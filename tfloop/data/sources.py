"""Where the images come from: the shipped MNIST, scikit-learn's digits, files in several formats.

To add a format, register a `Source` here.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfloop import user_code
from tfloop.data import parts, user_data
from tfloop.data.arrays import check_images, from_arrays
from tfloop.data.dataset import Dataset
from tfloop.data.readers import read_idx, read_npz
from tfloop.errors import UserError

SHIPPED = {"mnist": Path(__file__).parent / "mnist"}
Part = tuple[np.ndarray, np.ndarray]  # images, labels


class Cut(NamedTuple):
    """How a data set is read and cut; the arguments of `load`."""

    split: str = "standard"
    validation_size: int = 0
    standardize: bool = True
    seed: int = 0
    on_bad_record: str = "stop"
    options: Sequence[str] = ()


class Source(NamedTuple):
    """A kind of data set.

    Attributes:
      what: how messages describe it: "an .npz file".
      matches: name or path → is it of this kind?
      read: (name or path, cut) → the data set.
    """

    what: str
    matches: Callable[[str], bool]
    read: Callable[[str, Cut], Dataset]


SOURCES: list[Source] = []


def register(source: Source) -> None:
    """Let `load` read what the source matches; the one that was registered last is asked first."""
    SOURCES.insert(0, source)


def load(
    dataset: str = "mnist",
    split: str = "standard",
    validation_size: int = 0,
    standardize: bool = True,
    seed: int = 0,
    on_bad_record: str = "stop",
    options: Sequence[str] = (),
) -> Dataset:
    """Read a data set, check it, cut it and fit the standardiser on its training images.

    Args:
      dataset: "mnist", "digits", or the path of a folder with IDX files or TFRecord shards (see
        `shards`), or of an .npz with x_train, y_train, x_test and y_test; or a function of one's
        own, "FILE.py:function" (see `user_data`).
      split: "standard" keeps the set's own test images; "shuffled" joins all images, shuffles them
        by `seed` and cuts off as many for the test as the set had.
      validation_size: training images to hold out, the same share of every class.
      standardize: fit a `Standardizer`; otherwise it is the identity.
      seed: of the shuffle and of the choice of validation images.
      on_bad_record: "stop", or "skip" to leave out records of shards that are damaged.
      options: "name=value", arguments of a function of one's own.

    Raises:
      UserError: a missing, damaged or mislabelled file, or sizes that leave nothing to train on.
    """
    cut = Cut(split, validation_size, standardize, seed, on_bad_record, options)
    if options and not user_code.is_reference(dataset):
        raise UserError(
            f"--data_options: --dataset={dataset} takes none; a function of your own does: "
            "--dataset=FILE.py:function"
        )
    for source in SOURCES:
        if source.matches(dataset):
            return source.read(dataset, cut)
    kinds = list(dict.fromkeys(source.what for source in SOURCES))
    choices = f"{', '.join(kinds[:-1])}, or {kinds[-1]}"
    if not Path(dataset).exists():
        raise UserError(f"--dataset={dataset}: does not exist; name {choices}")
    raise UserError(f"--dataset={dataset}: not {choices}")


def _from_parts(read: Callable[[str], tuple[Part, Part]]) -> Callable[[str, Cut], Dataset]:
    """A `Source.read` from a function that gives training and test as they lie there."""

    def read_and_cut(dataset: str, cut: Cut) -> Dataset:
        train, test = read(dataset)
        return _cut(dataset, {"train": train, "test": test}, cut)

    return read_and_cut


def _cut(dataset: str, by_part: Mapping[str, Part], cut: Cut) -> Dataset:
    return from_arrays(
        *by_part["train"],
        *by_part["test"],
        name=f"--dataset={dataset}",
        split=cut.split,
        validation_size=cut.validation_size,
        standardize=cut.standardize,
        seed=cut.seed,
        validation=by_part.get("validation"),
    )


def _read_shipped(dataset: str) -> tuple[Part, Part]:
    folder = SHIPPED[dataset]
    lines = (folder / "SHA256SUMS").read_text(encoding="ascii").splitlines()
    sums = {name: digest for digest, name in (line.split() for line in lines)}
    return _read_idx_parts(folder, sums)


def _read_digits(dataset: str) -> tuple[Part, Part]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = digits.images.astype(np.uint8)
    rows, held_out = train_test_split(
        np.arange(len(images)), test_size=360, random_state=0, stratify=digits.target
    )
    return (images[rows], digits.target[rows]), (images[held_out], digits.target[held_out])


def _read_idx_folder(dataset: str) -> tuple[Part, Part]:
    return _read_idx_parts(Path(dataset), {})


def _read_idx_parts(folder: Path, sums: dict[str, str]) -> tuple[Part, Part]:
    """The four files of MNIST's layout, whose SHA-256 sums are checked where they are known."""

    def read(name: str) -> np.ndarray:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return read_idx(path, sums.get(path.name))
        raise UserError(
            f"--dataset={folder}: {name} or {name}.gz is missing (of pictures, tfloop pack first "
            "makes shards)"
        )

    def part(name: str) -> Part:
        file = f"{name}-images-idx3-ubyte"
        images = check_images(read(file), f"--dataset={folder}: {file}")
        return images, read(f"{name}-labels-idx1-ubyte")

    return part("train"), part("t10k")


def _read_npz(dataset: str, cut: Cut) -> Dataset:
    """An archive as Keras writes its data sets: x_train, y_train, and so on, for each part."""
    pairs: dict[str, tuple[str, str]] = {}
    notes: list[str] = []

    def choose(shapes: dict[str, tuple[int, ...]]) -> set[str]:
        pairs.update(_pairs(dataset, shapes))
        if "test" not in pairs:
            pairs["test"] = pairs.pop("validation")
            notes.append(parts.NO_TEST)
        for part, (x, y) in pairs.items():
            inputs, targets = shapes[x], shapes[y]
            if inputs and targets and inputs[0] != targets[0]:
                word = "training" if part == "train" else part
                raise UserError(f"{dataset}: {inputs[0]} {word} images but {targets[0]} targets")
        wanted = {name for pair in pairs.values() for name in pair}
        if others := sorted(shapes.keys() - wanted):
            notes.append(f"left out: {', '.join(others[:6])}{' …' if len(others) > 6 else ''}")
        return wanted

    arrays = read_npz(dataset, choose)
    by_part = {part: (arrays[x], arrays[y]) for part, (x, y) in pairs.items()}
    data = _cut(dataset, by_part, cut)
    return dataclasses.replace(data, notes=(*notes, *data.notes))


def _pairs(dataset: str, shapes: Collection[str]) -> dict[str, tuple[str, str]]:
    """part → the names of its inputs and targets: x_train and y_train, X_val and y_val …

    Raises:
      UserError: one of a pair is missing, or training, or what to test by.
    """
    by_axis = {}
    for axis in "xy":
        own = [name for name in shapes if name.lower().startswith(f"{axis}_")]
        by_axis[axis] = parts.by_part(own, dataset, lambda name: parts.named(name[2:]))
    x, y = by_axis["x"], by_axis["y"]
    missing = [f"y{x[part][1:]}" for part in x if part not in y]
    missing += [f"x{y[part][1:]}" for part in y if part not in x]
    if not missing and "train" not in x:
        missing = ["x_train", "y_train"]
    if not missing and len(x) == 1:
        missing = ["x_test", "y_test"]
    if missing:
        raise UserError(
            f"{dataset}: has no {', '.join(missing)}; found {', '.join(shapes) or 'nothing'}"
        )
    return {part: (x[part], y[part]) for part in x}


def _read_shards(dataset: str, cut: Cut) -> Dataset:
    from tfloop.data import shards

    if cut.split != "standard":
        raise UserError(
            f"--split={cut.split}: shards keep the test images that they have; use --split=standard"
        )
    skip = cut.on_bad_record == "skip"
    return shards.load(dataset, cut.validation_size, cut.standardize, cut.seed, skip)


def _holds_shards(dataset: str) -> bool:
    from tfloop.data import shard_files

    return Path(dataset).is_dir() and any(map(shard_files.is_shard, Path(dataset).iterdir()))


def _is_npz(dataset: str) -> bool:
    return Path(dataset).suffix.lower() == ".npz" and Path(dataset).is_file()


_FOLDER = "a folder of IDX files or TFRecord shards"
SOURCES += [
    Source("mnist", lambda name: name in SHIPPED, _from_parts(_read_shipped)),
    Source("digits", lambda name: name == "digits", _from_parts(_read_digits)),
    Source(_FOLDER, _holds_shards, _read_shards),
    Source(_FOLDER, lambda name: Path(name).is_dir(), _from_parts(_read_idx_folder)),
    Source("an .npz file", _is_npz, _read_npz),
    Source("FILE.py:function", user_code.is_reference, user_data.read),
]
