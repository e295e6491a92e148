"""What goes through the model in parts of the batch gives what the batch gives as a whole."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfloop import models
from tfloop.models.layer_rules import LAYER_RULES, is_by_example
from tfloop.randomness import Key, seed_of

pytestmark = pytest.mark.quick
SIGNAL, IMAGE, VOLUME = (8, 4), (6, 8, 4), (4, 4, 4, 2)
numpy_ops, nn_ops = keras.src.ops.numpy, keras.src.ops.nn

# A layer of each kind, and the shape of what it is given.
ONE_INPUT = [
    (layers.Dense(3, activation="tanh"), (4,)),
    (layers.Flatten(), IMAGE),
    (layers.Reshape((8, 6, 4)), IMAGE),
    (layers.Permute((2, 1, 3)), IMAGE),
    (layers.RepeatVector(3), (4,)),
    (layers.Identity(), (4,)),
    (layers.Rescaling(0.5, 1.0), IMAGE),
    (layers.ReLU(), IMAGE),
    (layers.LeakyReLU(), IMAGE),
    (layers.ELU(), IMAGE),
    (layers.PReLU(alpha_initializer="ones"), IMAGE),
    (layers.Activation("gelu"), IMAGE),
    (layers.Softmax(), IMAGE),
    (layers.Conv1D(3, 3, activation="relu"), SIGNAL),
    (layers.Conv2D(3, 3, strides=2, padding="same"), IMAGE),
    (layers.Conv3D(3, 2), VOLUME),
    (layers.Conv1DTranspose(3, 3), SIGNAL),
    (layers.Conv2DTranspose(3, 3, strides=2), IMAGE),
    (layers.Conv3DTranspose(3, 2), VOLUME),
    (layers.DepthwiseConv1D(3), SIGNAL),
    (layers.DepthwiseConv2D(3), IMAGE),
    (layers.SeparableConv1D(3, 3), SIGNAL),
    (layers.SeparableConv2D(3, 3), IMAGE),
    (layers.MaxPooling1D(), SIGNAL),
    (layers.MaxPooling2D(), IMAGE),
    (layers.MaxPooling3D(), VOLUME),
    (layers.AveragePooling1D(2), SIGNAL),
    (layers.AveragePooling2D(2), IMAGE),
    (layers.AveragePooling3D(2), VOLUME),
    (layers.GlobalMaxPooling1D(), SIGNAL),
    (layers.GlobalMaxPooling2D(), IMAGE),
    (layers.GlobalMaxPooling3D(), VOLUME),
    (layers.GlobalAveragePooling1D(), SIGNAL),
    (layers.GlobalAveragePooling2D(), IMAGE),
    (layers.GlobalAveragePooling3D(), VOLUME),
    (layers.ZeroPadding1D(), SIGNAL),
    (layers.ZeroPadding2D(), IMAGE),
    (layers.ZeroPadding3D(), VOLUME),
    (layers.Cropping1D(), SIGNAL),
    (layers.Cropping2D(), IMAGE),
    (layers.Cropping3D(), VOLUME),
    (layers.UpSampling1D(), SIGNAL),
    (layers.UpSampling2D(), IMAGE),
    (layers.UpSampling3D(), VOLUME),
    (layers.LayerNormalization(), SIGNAL),
    (layers.LayerNormalization(axis=(1, 2)), SIGNAL),
    (layers.RMSNormalization(), SIGNAL),
    (layers.UnitNormalization(), SIGNAL),
    (layers.GroupNormalization(2), IMAGE),
]
TWO_INPUTS = [
    layers.Add(),
    layers.Subtract(),
    layers.Multiply(),
    layers.Average(),
    layers.Maximum(),
    layers.Minimum(),
    layers.Concatenate(),
    layers.MultiHeadAttention(2, 3),
    numpy_ops.Add(),
    numpy_ops.Subtract(),
    numpy_ops.Multiply(),
    numpy_ops.Divide(),
    numpy_ops.TrueDivide(),
    numpy_ops.Maximum(),
    numpy_ops.Minimum(),
]
OPERATIONS = [
    numpy_ops.Negative(),
    numpy_ops.Absolute(),
    numpy_ops.Square(),
    numpy_ops.Sqrt(),
    numpy_ops.Exp(),
    numpy_ops.Log(),
    numpy_ops.Tanh(),
    nn_ops.Relu(),
    nn_ops.Relu6(),
    nn_ops.LeakyRelu(),
    nn_ops.Elu(),
    nn_ops.Gelu(),
    nn_ops.Silu(),
    nn_ops.Sigmoid(),
]


def kind(value):
    return type(value).__name__


def check(model, inputs, rtol=1e-5):
    """The model's value and gradients in three uneven parts are those of Keras's call."""
    weights = model.trainable_variables

    def found(forward):
        with tf.GradientTape() as tape:
            loss = tf.nn.l2_loss(value := forward(inputs))
        return [value, *tape.gradient(loss, weights)]

    in_parts = found(
        lambda x: models.outputs(model, x, True, Key(seed_of(0, 1)), fast=True, shards=3)
    )
    for value, expected in zip(in_parts, found(lambda x: model(x, training=True)), strict=True):
        value, expected = tf.convert_to_tensor(value), tf.convert_to_tensor(expected)
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(value, expected, atol=rtol * scale)


def behind(x):
    """Something with weights before and after, so that gradients go through."""
    return layers.Dense(2)(layers.Flatten()(x))


@pytest.mark.parametrize(("layer", "shape"), ONE_INPUT, ids=lambda value: kind(value))
def test_a_layer_in_parts(random, layer, shape):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, behind(layer(layers.Dense(shape[-1])(inputs))))
    assert is_by_example(layer, training=True)
    check(model, tf.constant(random.normal(size=(8, *shape)).astype(np.float32)))


@pytest.mark.parametrize("operation", TWO_INPUTS, ids=kind)
def test_a_layer_of_two_inputs_in_parts(random, operation):
    inputs = keras.Input(SIGNAL)
    one = layers.Dense(4, activation="softplus")(inputs)
    other = layers.Dense(4, activation="softplus")(inputs)
    calls_with_list = isinstance(operation, keras.layers.Layer) and not isinstance(
        operation, layers.MultiHeadAttention
    )
    y = operation([one, other]) if calls_with_list else operation(one, other)
    assert is_by_example(operation, training=True)
    check(
        keras.Model(inputs, behind(y)),
        tf.constant(random.normal(size=(8, *SIGNAL)).astype(np.float32)),
    )


@pytest.mark.parametrize("operation", OPERATIONS, ids=kind)
def test_an_operation_of_keras_in_parts(random, operation):
    inputs = keras.Input((5,))
    x = layers.Dense(4, activation="softplus")(inputs)
    assert is_by_example(operation, training=True)
    check(
        keras.Model(inputs, behind(operation(x))),
        tf.constant(random.normal(size=(8, 5)).astype(np.float32)),
    )


def test_words_in_parts_with_their_mask(random):
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layers.GRU(3)(x)))
    check(model, tf.constant(random.integers(0, 9, size=(8, 6)), tf.int32))


def test_every_kind_is_tried_here():
    tried = {type(layer) for layer, _ in ONE_INPUT}
    tried |= {type(operation) for operation in (*TWO_INPUTS, *OPERATIONS)}
    elsewhere = {layers.Embedding, layers.Dropout, layers.BatchNormalization}
    assert set(LAYER_RULES) == tried | elsewhere


def test_operators_between_rows_of_another_rank_see_the_whole_batch(random):
    """[batch, 8, 4] + [batch, 4] would put the rows of one beside the places of the other."""
    inputs = keras.Input(SIGNAL)
    rows = layers.Flatten()(layers.GlobalAveragePooling1D()(inputs))
    model = keras.Model(inputs, behind(layers.Dense(4)(inputs) + layers.Dense(4)(rows)))
    check(model, tf.constant(random.normal(size=(8, *SIGNAL)).astype(np.float32)))


@pytest.mark.parametrize(
    "layer",
    [
        layers.LSTM(3),
        layers.MultiHeadAttention(2, 3, dropout=0.1),
        layers.LayerNormalization(axis=0),
        layers.Dense(3, activity_regularizer="l2"),
        layers.GaussianNoise(0.1),
    ],
    ids=kind,
)
def test_what_draws_loops_or_looks_at_the_batch_goes_whole(layer):
    assert not is_by_example(layer, training=True)
