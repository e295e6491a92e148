"""Event files: what is written is what TensorBoard reads, and what others wrote is read."""

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.scalar.summary_v2 import scalar_pb

from tfloop.errors import UserError
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
    from tensorboard.compat.proto.summary_pb2 import Summary
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
