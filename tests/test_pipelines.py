import numpy as np
import pytest
import tensorflow as tf

from tfloop.data import pipelines
from tfloop.data.dataset import Split
from tfloop.errors import UserError

pytestmark = pytest.mark.quick

NAMES = ("resident", "host", "prefetch")


def epoch(pipeline, seed=0, number=0, first=0):
    source = pipeline.begin(seed, number, first)
    rows = [pipeline.batch_size] * pipeline.full + [pipeline.rest] * bool(pipeline.rest)
    return [
        pipeline.take(source, tf.constant(i, tf.int64), rows[i])
        for i in range(first, pipeline.steps)
    ]


@pytest.fixture
def split(random):
    return Split(random.integers(0, 256, (23, 3, 2, 1), np.uint8), np.arange(23, dtype=np.int32))


def test_order_is_a_permutation_given_by_seed_and_epoch():
    one, again, other_epoch, other_seed = (
        pipelines.order(*key, 1000).numpy() for key in ((1, 2), (1, 2), (1, 3), (2, 2))
    )
    assert sorted(one) == list(range(1000))
    np.testing.assert_array_equal(one, again)
    for other in (other_epoch, other_seed):
        assert (one == other).sum() < 10


def test_order_is_the_same_compiled():
    compiled = tf.function(lambda seed, epoch: pipelines.order(seed, epoch, 1000))
    np.testing.assert_array_equal(
        compiled(tf.constant(1), tf.constant(2)), pipelines.order(1, 2, 1000)
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_holds_every_example_once_and_its_last_batch_is_shorter(split, name):
    batches = epoch(pipelines.make(name, split, 5))
    assert [batch.inputs.shape for batch in batches] == [(5, 3, 2, 1)] * 4 + [(3, 3, 2, 1)]
    labels = np.concatenate([batch.targets.numpy() for batch in batches])
    assert sorted(labels) == list(range(23)) and labels.tolist() != list(range(23))
    assert all((batch.sample_weight.numpy() == 1).all() for batch in batches)
    for batch in batches:
        np.testing.assert_array_equal(batch.inputs, split.inputs[batch.targets])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [0, 3])
def test_every_pipeline_gives_the_batches_of_the_plain_function(split, name, first):
    for index, batch in enumerate(epoch(pipelines.make(name, split, 5), 4, 7, first), start=first):
        for found, expected in zip(batch, pipelines.batch_at(split, 5, 4, 7, index)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["host", "prefetch"])
def test_no_autotuner_keeps_an_iterator_from_being_freed(split, name):
    """It sleeps up to a minute, and now and then misses that it is to end; so long the process
    stood still."""
    assert pipelines.make(name, split, 5).batches(0, 0, 0).options().autotune.enabled is False


def test_an_unknown_pipeline_is_named(split):
    with pytest.raises(UserError, match="pipeline=residant is unknown"):
        pipelines.make("residant", split, 5)


def test_auto_is_resident_where_the_images_fit(split, monkeypatch):
    assert pipelines.make("auto", split, 5).name == "resident"
    monkeypatch.setattr(pipelines, "comfortable_bytes", lambda: split.inputs.nbytes)
    assert pipelines.make("auto", split, 5).name == "prefetch"
