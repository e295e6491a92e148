import warnings

import pytest
import tensorflow as tf

from tfloop.tracing import Traced

pytestmark = pytest.mark.quick


def test_one_trace_serves_tensors_of_one_type():
    double = Traced(lambda x: 2 * x, "doubling")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [int(double.call(tf.constant(i))) for i in range(5)] == [0, 2, 4, 6, 8]
    assert double.traces == 1


@pytest.mark.parametrize(
    "argument, change",
    [
        (tf.constant([1, 2]), r"argument 1 was int32 \(\), is int32 \(2,\)"),
        (tf.constant(1.0), r"argument 1 was int32 \(\), is float32 \(\)"),
        (7, r"argument 1 was int32 \(\), is 7"),
    ],
)
def test_a_second_trace_names_the_argument_that_changed(argument, change):
    double = Traced(lambda x: 2 * x, "doubling")
    double.call(tf.constant(1))
    with pytest.warns(UserWarning, match=f"doubling was traced again: {change}"):
        double.call(argument)
    assert double.traces == 2


def test_eager_is_never_traced():
    double = Traced(lambda x: 2 * x, "doubling", eager=True)
    assert double.call(3) == 6 and double.traces == 0


def test_many_functions_that_are_traced_once_each_are_no_reason_to_warn(caplog):
    for number in range(12):
        Traced(lambda x, number=number: x + number, f"function {number}").call(tf.constant(1))
    assert not caplog.records
