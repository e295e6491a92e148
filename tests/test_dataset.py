import gzip
import io
import shutil
import struct
import zipfile

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

import tfloop
from tfloop.data import readers
from tfloop.data.dataset import Standardizer
from tfloop.data.readers import read_idx
from tfloop.data.sources import SHIPPED
from tfloop.errors import UserError

pytestmark = pytest.mark.quick


def idx(array: np.ndarray) -> bytes:
    code = {"uint8": 8, "int32": 12, "float32": 13}[array.dtype.name]
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


@pytest.fixture
def folder(tmp_path, random):
    """An IDX folder of 20 training and 10 test images of 5×4, plain and gzipped."""
    for part, n in (("train", 20), ("t10k", 10)):
        images, labels = (
            random.integers(0, 256, (n, 5, 4), np.uint8),
            np.arange(n, dtype=np.uint8) % 3,
        )
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_shipped_mnist_is_the_standard_set(mnist):
    assert mnist.train.inputs.shape == (60000, 28, 28, 1) and mnist.test.inputs.shape == (
        10000,
        28,
        28,
        1,
    )
    assert mnist.classes == 10 and np.bincount(mnist.train.targets)[:3].tolist() == [
        5923,
        6742,
        5958,
    ]
    assert mnist.train.targets[:5].tolist() == [5, 0, 4, 1, 9]


def test_shapes_and_classes_follow_from_the_files(folder):
    data = tfloop.load(str(folder))
    assert (
        data.image_shape == (5, 4, 1)
        and data.classes == 3
        and len(data.train) == 20
        and len(data.test) == 10
    )


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.array([1, -2], np.int32),
        np.linspace(0, 1, 6, dtype=np.float32).reshape(3, 2),
    ],
    ids=lambda a: a.dtype.name,
)
def test_idx_is_read_back_plain_and_gzipped(tmp_path, array):
    (tmp_path / "plain").write_bytes(idx(array))
    (tmp_path / "zipped").write_bytes(gzip.compress(idx(array)))
    for name in ("plain", "zipped"):
        np.testing.assert_array_equal(read_idx(tmp_path / name), array)


GOOD = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not an IDX file: it starts with nothing"),
        (b"PNG and so on", "not an IDX file: it starts with 504e4720"),
        (GOOD[:9], "truncated in its header"),
        (GOOD[:-1], "promises 24 bytes of data, 23 bytes follow"),
        (GOOD + b"x", "promises 24 bytes of data, more follow"),
        (gzip.compress(GOOD)[:-9], "damaged"),
        (b"\x1f\x8b" + gzip.compress(GOOD)[2:-8] + b"\0" * 8, "damaged"),
        (
            struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1),
            "more than the file can hold",
        ),
    ],
    ids=["empty", "other", "header", "short", "long", "cut", "sum", "bomb"],
)
def test_a_damaged_idx_file_is_named(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        read_idx(path)


def test_a_changed_mnist_file_is_noticed(tmp_path, monkeypatch):
    shutil.copytree(SHIPPED["mnist"], tmp_path / "mnist")
    monkeypatch.setitem(SHIPPED, "mnist", tmp_path / "mnist")
    path = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[4] ^= 1  # the gzip time stamp: everything else would still read well
    path.write_bytes(content)
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte.gz: damaged: its SHA-256"):
        tfloop.load("mnist")


def test_a_missing_file_is_named(folder):
    (folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(
        UserError, match="t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz is missing"
    ):
        tfloop.load(str(folder))


def test_labels_in_place_of_images_are_noticed(folder):
    shutil.copy(folder / "train-labels-idx1-ubyte.gz", folder / "train-images-idx3-ubyte.gz")
    (folder / "train-images-idx3-ubyte").unlink()
    with pytest.raises(
        UserError,
        match=r"train-images-idx3-ubyte: expected numbers of shape .* found uint8 \(20,\)",
    ):
        tfloop.load(str(folder))


def test_an_unknown_data_set_is_named():
    with pytest.raises(
        UserError, match="dataset=cifar: does not exist; name mnist, digits, a folder"
    ):
        tfloop.load("cifar")


def arrays(**changed):
    made = dict(
        x_train=np.zeros((6, 4, 4, 3), np.uint8),
        y_train=np.arange(6) % 2,
        x_test=np.ones((4, 4, 4, 3), np.uint8),
        y_test=np.arange(4) % 2,
    )
    return {**made, **changed}


def test_npz_as_keras_writes_it_with_colour_and_one_hot_labels(tmp_path):
    one_hot = {name: np.eye(2)[np.arange(n) % 2] for name, n in (("y_train", 6), ("y_test", 4))}
    np.savez(tmp_path / "a.npz", **arrays(**one_hot))
    data = tfloop.load(str(tmp_path / "a.npz"))
    assert data.image_shape == (4, 4, 3) and data.classes == 2
    assert data.target.kind == "shares"
    assert data.class_numbers(data.train.targets).tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(y_train=np.arange(5)), "6 training images but 5 targets"),
        (
            dict(y_test=np.array([0, 1, 2, 1])),
            "test targets: label 2 is out of range: training labels go from 0 to 1",
        ),
        (
            dict(y_train=np.array([0, 1, 0, -1, 0, 1])),
            "training targets: label -1 in row 3 is not a class number; for values to come close",
        ),
        (
            dict(y_train=np.array([0, 1, 0, np.nan, 0, 1])),
            "training targets: row 3 is NaN or infinite",
        ),
        (dict(y_train=np.array(["a"] * 6)), "training targets: expected numbers, found"),
        (
            dict(y_train=np.eye(3)[[0, 1] * 3], y_test=np.eye(2)[[0, 1] * 2]),
            "3 columns for training and 2 here",
        ),
        (dict(y_train=np.zeros(6, int)), "all labels are 0: nothing to tell apart"),
        (
            dict(x_train=np.full((6, 4, 4, 3), np.nan)),
            "training inputs: image 0 has a pixel that is NaN or infinite",
        ),
        (
            dict(x_test=np.full((4, 4, 4, 3), 1e300)),
            "test inputs: image 0 has a pixel that is NaN or infinite",
        ),
        (
            dict(x_test=np.zeros((4, 5, 4, 3), np.uint8)),
            "training images are 4×4×3 uint8, test images 5×4×3 uint8",
        ),
        (dict(x_train=np.zeros((6, 4))), "training inputs are 4 float32, test inputs 4×4×3 uint8"),
        (
            dict(x_train=np.zeros((0, 4, 4, 3), np.uint8), y_train=np.zeros(0, int)),
            "there are no training images",
        ),
        (dict(x_train=np.array([object()] * 6)), "not an .npz of plain arrays"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, changed, message):
    np.savez(tmp_path / "a.npz", **arrays(**changed))
    with pytest.raises(UserError, match=message):
        tfloop.load(str(tmp_path / "a.npz"))


def test_an_array_whose_header_promises_more_than_the_file_holds_takes_no_memory(
    tmp_path,
):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 28, 28)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x_train.npy", header.getvalue() + bytes(1000))
    with pytest.raises(
        UserError, match="a.npz: damaged: x_train.npy promises more data than the file can hold"
    ):
        tfloop.load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense", b"\x93NUMPY"])
def test_a_file_that_is_no_npz_is_named(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match="a.npz: damaged or not an .npz"):
        tfloop.load(str(tmp_path / "a.npz"))


def test_one_hot_columns_count_as_classes_even_where_training_has_none(tmp_path):
    np.savez(
        tmp_path / "a.npz", **arrays(y_train=np.eye(5)[[0, 1] * 3], y_test=np.eye(5)[[0, 4] * 2])
    )
    assert tfloop.load(str(tmp_path / "a.npz")).classes == 5


def test_standardizer_is_scikit_learns_over_the_training_images_only(digits):
    flat = digits.train.inputs.reshape(len(digits.train), -1).astype(np.float64)
    scaler = StandardScaler().fit(flat)
    np.testing.assert_allclose(digits.standardizer.mean.ravel(), scaler.mean_, rtol=1e-6)
    np.testing.assert_allclose(digits.standardizer.scale.ravel(), scaler.scale_, rtol=1e-6)


def test_a_pixel_that_never_varies_stays_finite():
    images = np.full((10, 2, 2, 1), 7, np.uint8)
    fit = Standardizer.fit(images)
    np.testing.assert_array_equal((images - fit.mean) / fit.scale, 0)


def test_shuffled_joins_and_cuts_again_by_seed(digits):
    one, again, other = (tfloop.load("digits", split="shuffled", seed=seed) for seed in (1, 1, 2))
    assert len(one.train) == len(digits.train) and len(one.test) == len(digits.test)
    np.testing.assert_array_equal(one.test.inputs, again.test.inputs)
    assert (one.test.targets != other.test.targets).any()

    def pool(data):
        return sorted(map(bytes, np.concatenate([data.train.inputs, data.test.inputs])))

    assert pool(one) == pool(digits)


def test_validation_is_stratified_and_taken_from_training_only(digits):
    data = tfloop.load("digits", validation_size=200)
    assert len(data.validation) == 200 and len(data.train) == len(digits.train) - 200
    np.testing.assert_array_equal(data.test.inputs, digits.test.inputs)
    expected = 200 * np.bincount(digits.train.targets) / len(digits.train)
    assert np.abs(np.bincount(data.validation.targets) - expected).max() <= 1


@pytest.mark.parametrize(
    "size, message", [(1437, "leaves nothing to train on"), (5, "proportions of the classes")]
)
def test_a_validation_size_that_cannot_be_cut_is_named(size, message):
    with pytest.raises(UserError, match=f"validation_size={size}.*{message}"):
        tfloop.load("digits", validation_size=size)


def test_an_npz_that_does_not_fit_into_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    images, labels = np.zeros((200, 64, 64), np.uint8), np.arange(200) % 3
    path = tmp_path / "a.npz"
    arrays = dict(x_train=images, y_train=labels, x_test=images, y_test=labels)
    np.savez_compressed(path, **arrays, other=np.zeros(1 << 24, np.uint8))
    monkeypatch.setattr(readers, "_free_memory", lambda: 2 << 20)
    assert len(tfloop.load(str(path)).train) == 200  # what is not asked for does not count
    monkeypatch.setattr(readers, "_free_memory", lambda: 1 << 20)
    with pytest.raises(UserError, match=r"a.npz: holds 0.0 GiB, 0.0 GiB of memory are free"):
        tfloop.load(str(path))


@pytest.mark.parametrize(
    "y, other, message",
    [
        (np.eye(3)[np.arange(12) % 3], np.zeros((12, 3)), "shares from 0 to 1 that add up to 1"),
        (np.eye(3)[np.arange(12) % 3], 5 * np.eye(3)[np.arange(12) % 3] - 1, "row 0 holds other"),
        (
            np.arange(36).reshape(12, 3) % 2,
            np.full((12, 3), -1),
            "row 0 holds other numbers than 0",
        ),
    ],
    ids=["shares of 0", "other shares", "labels of -1"],
)
def test_targets_of_a_test_are_like_those_of_the_training(y, other, message):
    x = np.zeros((12, 4))
    for part in (dict(x_test=x, y_test=other), dict(validation=(x, other))):
        with pytest.raises(UserError, match=message):
            tfloop.from_arrays(x, y, **part)


def test_whole_numbers_are_values_where_those_of_the_training_are():
    x = np.zeros((4, 2))
    data = tfloop.from_arrays(x, np.arange(4) / 3, x, np.arange(4))
    assert data.test.targets.dtype == np.float32 and data.test.targets.tolist() == [0, 1, 2, 3]


class Table(np.ndarray):
    """As a data frame: columns with names, and a selection of them by name."""

    def __new__(cls, values, columns):
        table = np.asarray(values).view(cls)
        table.columns = columns
        return table

    def __getitem__(self, key):
        if isinstance(key, list) and key and isinstance(key[0], str):
            return np.asarray(self)[:, [self.columns.index(name) for name in key]]
        return super().__getitem__(key)


def test_columns_with_names_are_matched_by_them(random):
    x, y = random.normal(size=(6, 2)).astype(np.float32), np.arange(6) % 2
    train, test = Table(x, ["a", "b"]), Table(x[:, ::-1], ["b", "a"])
    data = tfloop.from_arrays(train, y, test, y, standardize=False)
    np.testing.assert_array_equal(data.train.inputs, data.test.inputs)
    with pytest.raises(UserError, match="the columns are b,c, those of the training a,b"):
        tfloop.from_arrays(train, y, Table(x, ["b", "c"]), y)


def test_masked_values_are_named():
    x = np.ma.masked_array(np.zeros((4, 2)), np.eye(4, 2))
    with pytest.raises(UserError, match="holds masked values"):
        tfloop.from_arrays(x, np.arange(4) % 2)


@pytest.mark.parametrize(
    "low, high, is_noted", [(-1, 1, True), (0, 16, True), (0, 2, False), (0, 1, False)]
)
def test_a_part_of_another_scale_is_noted(random, low, high, is_noted):
    x, y = random.uniform(size=(50, 4)), np.arange(50) % 2
    notes = tfloop.from_arrays(x, y, low + (high - low) * x, y).notes
    assert ("are they scaled otherwise?" in "".join(notes)) == is_noted


@pytest.mark.parametrize(
    "change, note",
    [
        ({"x": lambda x: np.moveaxis(np.stack([x] * 3, -1), -1, 1)}, "channels come first"),
        ({"x": lambda x: np.stack([x[:, :6]] * 3, 1)}, "channels come first"),
        ({"y": lambda y: y + 1}, "no training example has class 0"),
        ({}, ""),
    ],
    ids=["channels first", "channels first, not square", "classes from 1", "nothing"],
)
def test_what_looks_as_if_it_was_meant_otherwise_is_noted(change, note):
    x, y = np.zeros((12, 8, 8), np.uint8), np.arange(12) % 3
    x, y = change.get("x", lambda x: x)(x), change.get("y", lambda y: y)(y)
    notes = tfloop.from_arrays(x, y, x, y).notes
    assert len(notes) == bool(note) and note in "".join(notes)


def test_validation_examples_in_an_npz_are_those_of_the_run(tmp_path):
    x, y = np.zeros((12, 8, 8), np.uint8), np.arange(12) % 3
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_val=x[:6], y_val=y[:6], x_test=x, y_test=y)
    assert len(tfloop.load(str(tmp_path / "a.npz")).validation) == 6


def npz(path, arrays):
    images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
    labels = np.array([0, 1, 0, 1])
    np.savez(path, **{name: images if name[0] in "xX" else labels for name in arrays})
    return str(path)


@pytest.mark.parametrize(
    "names, found",
    [
        ("x_train y_train x_test y_test", (4, 0, 4)),
        ("X_train y_train X_dev y_dev X_test y_test", (4, 4, 4)),
        ("x_training y_training x_val y_val", (4, 0, 4)),
    ],
)
def test_the_arrays_of_an_npz_have_the_names_that_people_give_the_parts(tmp_path, names, found):
    data = tfloop.load(npz(tmp_path / "a.npz", names.split()))
    assert tuple(map(len, (data.train, data.validation, data.test))) == found
    assert bool(data.notes) == ("test" not in names)  # then the validation is the test


@pytest.mark.parametrize(
    "names, message",
    [
        ("x_train y_train x_test y_test x_val", "has no y_val"),
        ("x_train y_train x_test y_test x_val y_val x_dev y_dev", "x_val stands beside x_dev"),
        ("x_train y_train", "has no x_test, y_test"),
    ],
)
def test_half_a_part_and_one_that_is_there_twice_are_refused(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        tfloop.load(npz(tmp_path / "a.npz", names.split()))


def test_arrays_that_are_left_out_and_other_scales_are_said(tmp_path):
    images = np.arange(4 * 64, dtype=np.float32).reshape(4, 8, 8)
    parts = dict(x_train=images, y_train=[0, 2, 0, 2], x_test=images / 255, y_test=[0, 2, 0, 2])
    np.savez(tmp_path / "a.npz", **parts, sample_weight=np.ones(4))
    assert tfloop.load(str(tmp_path / "a.npz")).notes == (
        "left out: sample_weight",
        "no training example has class 1: class numbers are counted from 0 on, so the model has 3 "
        "classes",
        "test: the inputs go from 0 to 1, in training from 0 to 255; are they scaled otherwise?",
    )
