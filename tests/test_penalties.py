import keras
import numpy as np
import pytest
import tensorflow as tf

from tfloop import penalties

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "ours, reference",
    [(penalties.l1, keras.regularizers.L1(1.0)), (penalties.l2, keras.regularizers.L2(1.0))],
    ids=["l1", "l2"],
)
def test_value_and_gradient_are_those_of_keras_regularizers(random, ours, reference):
    kernel = tf.Variable(random.normal(size=(5, 4)).astype(np.float32))
    kernel[0, 0].assign(0.0)
    with tf.GradientTape(persistent=True) as tape:
        mine, theirs = ours(kernel), reference(kernel)
    np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    np.testing.assert_allclose(
        tape.gradient(mine, kernel), tape.gradient(theirs, kernel), rtol=1e-6
    )


def test_worked_by_hand():
    kernel = tf.constant([[1.0, -2.0], [0.0, 3.0]])
    assert float(penalties.l1(kernel)) == 6 and float(penalties.l2(kernel)) == 14
    assert float(penalties.total(penalties.l2, [kernel, kernel])) == 28
    assert float(penalties.total(penalties.l2, [])) == 0
