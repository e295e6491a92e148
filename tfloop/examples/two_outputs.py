"""Two outputs: which digit is it, and how much ink does it take?

    ./run.sh train --model=tfloop/examples/two_outputs.py:model \
        --dataset=tfloop/examples/two_outputs.py:data --loss=tfloop/examples/two_outputs.py:LOSS \
        --optimizer=adam --learning_rate=0.003 --epochs=10 --batch_size=32 --name=two

Targets and outputs are dicts with the same names. Each output has the loss that its targets ask
for, cross-entropy and squared error; LOSS says how much each counts.
"""

import keras
from keras import layers
from sklearn.datasets import load_digits

LOSS = {"digit": 1.0, "ink": 0.1}  # a number is a weight; ("huber", 0.1) names a loss, too


def data() -> dict:
    digits = load_digits()
    images = digits.images.astype("uint8")
    ink = digits.images.mean(axis=(1, 2)).astype("float32")
    return {
        "x_train": images[:1400],
        "y_train": {"digit": digits.target[:1400], "ink": ink[:1400]},
        "x_test": images[1400:],
        "y_test": {"digit": digits.target[1400:], "ink": ink[1400:]},
        "class_names": {"digit": [f"a {number}" for number in range(10)]},
    }


def model(input_shape: tuple, targets: dict) -> keras.Model:
    inputs = keras.Input(input_shape)
    x = layers.Conv2D(16, 3, activation="relu")(inputs)
    x = layers.Conv2D(32, 3, activation="relu")(x)
    x = layers.Flatten()(x)
    digit = layers.Dense(targets["digit"].classes)(layers.Dense(32, "relu")(x))
    return keras.Model(inputs, {"digit": digit, "ink": layers.Dense(1)(x)})
