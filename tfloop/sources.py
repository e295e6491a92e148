"""Where the images come from: the shipped MNIST, scikit-learn's digits, IDX folders, .npz files and TFRecord shards."""

from pathlib import Path

import numpy as np

from tfloop.data import Dataset, from_arrays
from tfloop.errors import UserError
from tfloop.formats import read_idx, read_npz

SHIPPED = {"mnist": Path(__file__).parent / "datasets" / "mnist"}


def load(dataset: str = "mnist", split: str = "standard", validation_size: int = 0, standardize: bool = True,
         seed: int = 0, on_bad_record: str = "stop") -> Dataset:
    """Read a data set, check it, cut it and fit the standardiser on its training images.

    Args:
      dataset: "mnist", "digits", or the path of a folder with IDX files or TFRecord shards (see `records`), or of an .npz
        with x_train, y_train, x_test and y_test.
      split: "standard" keeps the set's own test images; "shuffled" joins all images, shuffles them by `seed` and
        cuts off as many for the test as the set had.
      validation_size: training images to hold out, the same share of every class.
      standardize: fit a `Standardizer`; otherwise it is the identity.
      seed: of the shuffle and of the choice of validation images.
      on_bad_record: "stop", or "skip" to leave out records of shards that are damaged.

    Raises:
      UserError: a missing, damaged or mislabelled file, or sizes that leave nothing to train on.
    """
    if dataset not in (*SHIPPED, "digits") and any(Path(dataset).glob("*tfrecord*")):
        from tfloop import records

        if split != "standard":
            raise UserError(f"--split={split}: shards keep the test images that they have; use --split=standard")
        return records.load(dataset, validation_size, standardize, seed, on_bad_record == "skip")
    (x_train, y_train), (x_test, y_test) = _read(dataset)
    return from_arrays(x_train, y_train, x_test, y_test, f"--dataset={dataset}", split, validation_size, standardize,
                       seed)


def _read(dataset: str) -> tuple[tuple, tuple]:
    """((training images, labels), (test images, labels)), as they lie in the source."""
    if dataset == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = digits.images.astype(np.uint8)
        rows, held_out = train_test_split(np.arange(len(images)), test_size=360, random_state=0,
                                          stratify=digits.target)
        return (images[rows], digits.target[rows]), (images[held_out], digits.target[held_out])
    if dataset in SHIPPED:
        return _read_idx_folder(SHIPPED[dataset], _read_sums(SHIPPED[dataset]))
    path = Path(dataset)
    if path.is_dir():
        return _read_idx_folder(path, {})
    if path.suffix == ".npz" and path.is_file():
        return _read_keras_npz(path)
    if not path.exists():
        raise UserError(f"--dataset={dataset}: does not exist; name mnist, digits, a folder of IDX files or TFRecord shards, or an .npz file")
    raise UserError(f"--dataset={dataset}: not mnist, digits, a folder of IDX files or TFRecord shards, or an .npz file")


def _read_sums(folder: Path) -> dict[str, str]:
    lines = (folder / "SHA256SUMS").read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def _read_idx_folder(folder: Path, sums: dict[str, str]) -> tuple[tuple, tuple]:
    def read(name: str) -> np.ndarray:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return read_idx(path, sums.get(path.name))
        raise UserError(f"--dataset={folder}: {name} or {name}.gz is missing (of pictures, tfloop pack first makes shards)")

    return tuple((read(f"{part}-images-idx3-ubyte"), read(f"{part}-labels-idx1-ubyte")) for part in ("train", "t10k"))


def _read_keras_npz(path: Path) -> tuple[tuple, tuple]:
    arrays = read_npz(path)
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in arrays]
    if missing:
        raise UserError(f"{path}: has no {', '.join(missing)}; found {', '.join(arrays) or 'nothing'}")
    return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])
