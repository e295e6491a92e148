"""Each augmentation against scipy or hand-worked values; the same images however the batch is
cut."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage
from scipy.interpolate import BSpline

from tfloop.data import augmentation
from tfloop.randomness import Key, Part, seed_of


def key(number=0, **parts):
    return Key(seed_of(number, 7), **parts)


@pytest.fixture
def images(random):
    return tf.constant(random.uniform(1, 9, (300, 9, 7, 2)).astype(np.float32))


@pytest.mark.quick
def test_views_are_the_image_and_it_moved_by_so_many_pixels_in_four_directions(images):
    found = augmentation.shifted(images, 2)
    for view, by in zip(found, [(0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)], strict=True):
        np.testing.assert_array_equal(
            view, [ndimage.shift(image, (*by, 0), order=0) for image in images.numpy()]
        )


@pytest.mark.quick
def test_a_shift_is_by_whole_pixels_all_equally_likely_and_fills_with_0(images):
    found, seen = augmentation.shift(images, key(), 1.0).numpy(), []
    for image, moved in zip(images.numpy(), found):
        wanted = {by: ndimage.shift(image, (*by, 0), order=0) for by in np.ndindex(3, 3)}
        wanted = {by: ndimage.shift(image, (by[0] - 1, by[1] - 1, 0), order=0) for by in wanted}
        seen.append(next(by for by, value in wanted.items() if np.array_equal(value, moved)))
    counts = [seen.count(by) for by in np.ndindex(3, 3)]
    assert min(counts) > 15 and max(counts) < 60  # 300 / 9 = 33, standard deviation 5.4


def resampled(image, rows, columns):
    """SciPy's image at these places, between pixels, 0 beyond the edges."""
    return np.stack(
        [
            ndimage.map_coordinates(channel, [rows, columns], order=1, mode="grid-constant")
            for channel in np.moveaxis(image, -1, 0)
        ],
        axis=-1,
    )


@pytest.mark.quick
@pytest.mark.parametrize("xla", [False, True])
def test_an_image_is_turned_and_scaled_about_its_middle(images, xla):
    warp = tf.function(augmentation.warp, jit_compile=True) if xla else augmentation.warp
    found, draws = (
        warp(images, key(), 30.0, 0.2).numpy(),
        key().uniform([300, 2], -1.0, 1.0).numpy(),
    )
    places = np.indices((9, 7)).reshape(2, -1) - [[4], [3]]
    for image, turned, (angle, size) in list(zip(images.numpy(), found, draws))[:20]:
        a = np.deg2rad(30 * angle)
        # (row, column) of the output → input.
        back = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) / (1 + 0.2 * size)
        rows, columns = (back @ places + [[4], [3]]).reshape(2, 9, 7)
        np.testing.assert_allclose(turned, resampled(image, rows, columns), atol=1e-3)


@pytest.mark.quick
def test_an_image_is_bent_by_cubic_splines_between_the_points_that_are_pulled(images):
    found = augmentation.warp(images, key(), elastic=2.0).numpy()
    pulls = 2.0 * key().fold_in(0).uniform([300, 2, 6, 6], -1.0, 1.0).numpy()

    def at(length):
        return BSpline.design_matrix(
            np.arange(length) * 3 / (length - 1), np.arange(-3, 7), 3
        ).toarray()

    for image, bent, pull in list(zip(images.numpy(), found, pulls))[:20]:
        rows, columns = np.indices((9, 7)) + at(9) @ pull @ at(7).T
        np.testing.assert_allclose(bent, resampled(image, rows, columns), atol=1e-3)


@pytest.mark.quick
def test_what_is_neither_turned_nor_bent_stays_as_it_is(images):
    np.testing.assert_allclose(augmentation.warp(images, key(), elastic=0.0), images, rtol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_a_square_is_cut_out_and_nothing_else(images, side):
    found = augmentation.cut_out(images, key(), float(side)).numpy()
    areas = []
    for image, cut in zip(images.numpy(), found):
        blank = (cut == 0).all(axis=-1)
        np.testing.assert_array_equal(cut[~blank], image[~blank])
        rows, columns = np.flatnonzero(blank.any(axis=1)), np.flatnonzero(blank.any(axis=0))
        assert blank[np.ix_(rows, columns)].all() and blank.sum() == len(rows) * len(columns)
        assert len(rows) <= side and len(columns) <= side
        areas.append(blank.sum())
    assert max(areas) == side**2


@pytest.mark.quick
@pytest.mark.parametrize(
    "apply",
    [
        lambda x, k: augmentation.shift(x, k, 2.0),
        lambda x, k: augmentation.warp(x, k, 15.0, 0.1, 1.0),
        lambda x, k: augmentation.cut_out(x, k, 3.0),
    ],
    ids=["shift", "warp", "cut_out"],
)
def test_the_parts_of_a_batch_are_augmented_as_the_whole_is(images, apply):
    whole = apply(images, key())
    parts = [
        apply(images[first : first + rows], key(part=Part(tf.constant(first), rows, 300)))
        for first, rows in ((0, 100), (100, 150), (250, 50))
    ]
    np.testing.assert_allclose(tf.concat(parts, axis=0), whole, rtol=1e-5)
    assert not np.array_equal(apply(images, key(1)), whole)


def test_augmentation_is_part_of_training_alone_and_repeats(loop):
    settings = dict(
        augment_shift=1, augment_rotate=10, augment_scale=0.1, augment_elastic=1, augment_cutout=2
    )
    one, plain = loop(**settings), loop()
    batch = one.batch(0)
    inputs = one.state.prepared(batch.inputs, one.state.key())
    assert not np.array_equal(inputs, plain.state.prepared(batch.inputs, plain.state.key()))
    first = one.fit(2)
    one.state.reset()
    assert one.fit(2).train == first.train and one.traces["train"] == 1
    assert one.evaluate(one.data.test) == first.test
    one.state.reset()
    one.state.hyper["augment_shift"].assign(0)  # a number is a variable: no retrace
    assert one.fit(2).train != first.train and one.traces["train"] == 1


def test_cutting_the_batch_into_parts_draws_the_same(loop):
    settings = dict(
        augment_shift=1, augment_cutout=3, dropout=0.5, learning_rate=0.01, optimizer="sgd"
    )
    whole, parts = loop(**settings).fit(1), loop(**settings, accumulate=4).fit(1)
    assert parts.train.total == pytest.approx(whole.train.total, rel=1e-5)
