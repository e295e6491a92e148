"""Event files: what is written is what TensorBoard reads, and what others wrote is read."""

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.scalar.summary_v2 import scalar_pb

from tfloop.errors import UserError
from tfloop.inspection import event_files, plots
from tfloop.inspection.event_files import EventFile, read_scalars

pytestmark = pytest.mark.quick


def write(folder, *points):
    file = EventFile(folder)
    for step, value in points:
        file.write(step, scalar_pb("a", value), scalar_pb("b/c", 2 * value))
    file.close()


def test_tensorboard_reads_what_is_written(tmp_path):
    write(tmp_path, (1, 0.5), (3, 0.25))
    events = EventAccumulator(str(tmp_path)).Reload().Tensors("b/c")
    assert [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in events] == [
        (1, 1.0),
        (3, 0.5),
    ]


def test_a_file_can_be_read_while_it_is_written(tmp_path):
    file = EventFile(tmp_path)
    file.write(7, scalar_pb("a", 1.5))
    assert [scalar[:3] + scalar[4:] for scalar in read_scalars(tmp_path)] == [(".", "a", 7, 1.5)]


def test_a_last_record_that_is_cut_off_is_left_out(tmp_path):
    write(tmp_path / "train", (1, 1.0), (2, 2.0))
    path = next((tmp_path / "train").iterdir())
    path.write_bytes(path.read_bytes()[:-5])
    assert [(s.run, s.tag, s.step) for s in read_scalars(tmp_path)] == [
        ("train", "a", 1),
        ("train", "b/c", 1),
    ]


def test_files_of_tensorflow_and_of_its_first_version_are_read(tmp_path):
    with tf.summary.create_file_writer(str(tmp_path / "new")).as_default(step=4):
        tf.summary.scalar("x", 0.5)
        tf.summary.histogram("h", np.arange(9.0))
    with tf.Graph().as_default():
        old = tf.compat.v1.summary.FileWriter(str(tmp_path / "old"))
        old.add_summary(
            tf.compat.v1.Summary(value=[tf.compat.v1.Summary.Value(tag="y", simple_value=2.0)]), 9
        )
        old.close()
    assert [(s.run, s.tag, s.step, s.value) for s in read_scalars(tmp_path)] == [
        ("new", "x", 4, 0.5),
        ("old", "y", 9, 2.0),
    ]


def test_what_is_no_number_is_left_out(tmp_path):
    from tensorboard.util.tensor_util import make_tensor_proto

    value = scalar_pb("a", 1.0).value[0]
    file = EventFile(tmp_path)
    for odd in (np.arange(3.0), np.zeros(0), np.array(b"text", dtype=object)):
        file.write(
            1,
            Summary(
                value=[
                    Summary.Value(tag="a", metadata=value.metadata, tensor=make_tensor_proto(odd))
                ]
            ),
        )
    file.write(2, scalar_pb("a", 5.0))
    assert [(s.step, s.value) for s in read_scalars(tmp_path)] == [(2, 5.0)]


def write_tensor(folder, **fields):
    """A scalar that holds this tensor, and a good one behind it."""
    metadata = scalar_pb("a", 1.0).value[0].metadata
    value = Summary.Value(tag="a", metadata=metadata, tensor=TensorProto(**fields))
    file = EventFile(folder)
    file.write(1, Summary(value=[value]))
    file.write(2, scalar_pb("a", 5.0))
    file.close()


SIZES = [TensorShapeProto.Dim(size=size) for size in (10**9, -1)]


@pytest.mark.parametrize(
    "fields",
    [
        dict(dtype=1, float_val=[1.0], tensor_shape=TensorShapeProto(dim=SIZES[:1] * 2)),
        dict(dtype=1, float_val=[1.0], tensor_shape=TensorShapeProto(dim=SIZES[1:] * 2)),
        dict(dtype=7, tensor_content=b"abcd"),
        dict(dtype=20, tensor_content=b"abcd"),
    ],
    ids=["a huge shape", "a negative shape", "text", "a resource"],
)
def test_a_tensor_of_another_shape_or_kind_is_no_scalar_and_is_not_unpacked(tmp_path, fields):
    write_tensor(tmp_path, **fields)
    assert [(s.step, s.value) for s in read_scalars(tmp_path)] == [(2, 5.0)]


def test_a_scalar_of_16_bits_is_read(tmp_path):
    write_tensor(tmp_path, dtype=14, half_val=[0x3F80])  # bfloat16: the upper half of float32
    assert [s.value for s in read_scalars(tmp_path)] == [1.0, 5.0]


@pytest.mark.parametrize(
    "fields", [dict(dtype=99, tensor_content=b"1234"), dict(dtype=1, tensor_content=b"1")]
)
def test_a_scalar_without_a_number_is_named(tmp_path, fields):
    write_tensor(tmp_path, **fields)
    with pytest.raises(UserError, match="is damaged: a at step 1 holds no number"):
        read_scalars(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        read_scalars(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no event files, here or below"):
        read_scalars(tmp_path)
    write(tmp_path, (1, 1.0))
    path = next(tmp_path.iterdir())
    damaged = bytearray(path.read_bytes())
    damaged[-10] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="tfevents.*: is damaged: corrupted record"):
        read_scalars(tmp_path)
    path.write_bytes(b"no event file at all" * 9)
    with pytest.raises(UserError, match="is damaged"):
        read_scalars(tmp_path)


def points(run, tag, steps, since=0.0):
    return [event_files.Scalar(run, tag, step, since + step, float(step)) for step in steps]


def test_what_keras_measured_belongs_to_the_fit_that_had_begun_then():
    """Its callback writes all fits of a folder into one curve; the first has no validation."""
    scalars = [
        *points("train", "epoch_loss", range(3)),
        *points("train", "epoch_loss", range(2), since=10),
        *points("validation", "epoch_loss", range(2), since=10),
    ]
    assert plots.by_epoch(scalars, "logs") == {
        "fit 1": {"train/loss": ([0, 1, 2], [0, 1, 2])},
        "fit 2": {"train/loss": ([0, 1], [0, 1]), "validation/loss": ([0, 1], [0, 1])},
    }


def test_folders_within_are_fits_of_their_own():
    scalars = [
        *points("a/train", "epoch_loss", [0, 1]),
        *points("b/train", "epoch_loss", [2, 3], since=10),
        *points("b/validation", "epoch_loss", [2, 3], since=10),
    ]
    found = plots.by_epoch(scalars, "logs")
    assert {name: list(series) for name, series in found.items()} == {
        "a": ["train/loss"],
        "b": ["train/loss", "validation/loss"],
    }


def test_an_accuracy_keeps_its_name_and_is_the_accuracy_where_it_is_the_only_one():
    one = points("train", "epoch_sparse_categorical_accuracy", [0])
    names = {"train/sparse_categorical_accuracy", "train/accuracy"}
    assert set(plots.by_epoch(one, "logs")[""]) == names
    two = points("train", "epoch_a_accuracy", [0]) + points("train", "epoch_b_accuracy", [0])
    assert set(plots.by_epoch(two, "logs")[""]) == {"train/a_accuracy", "train/b_accuracy"}


def test_the_folder_of_a_part_is_that_part():
    found = plots.by_epoch(points(".", "epoch_loss", [0]), "logs/validation")
    assert found == {"": {"validation/loss": ([0], [0])}}


@pytest.mark.parametrize("name", ["$10_$20{", "_hidden", "分類"])
def test_names_are_drawn_as_they_are(tmp_path, recwarn, name):
    series = {"train/loss": ([0, 1], [1.0, 2.0])}
    figure = plots.curves({name: series, "other": series})
    plots.save(figure, tmp_path / "curves.png")
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [text.replace("\\$", "$").strip() for text in shown] == [
        f"{name}, train",
        "other, train",
    ]
    assert not recwarn
