"""Transfer learning in two phases: a new last layer alone, then all layers at a tenth of the rate.

    .venv/bin/python -m tfloop.examples.transfer

A network learns the digits 0 to 4. Its layers are then to tell 5 to 9, from 60 images of them: first
with its convolutions frozen, then with all of it unfrozen. `trainable` counts from the next call on,
and weights that were trained before keep the optimizer's slots.
"""

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

import tfloop


def data() -> tuple[tfloop.Dataset, tfloop.Dataset]:
    """(the digits 0 to 4, those from 5 to 9: 60 to train on, the others for the test)"""
    digits = load_digits()
    images, labels = digits.images.astype("uint8"), digits.target
    low, high = np.flatnonzero(labels < 5), np.flatnonzero(labels >= 5)
    names = [str(number) for number in range(5, 10)]
    rows = high[:60], high[60:]
    few = [(images[part], labels[part] - 5) for part in rows]
    return (
        tfloop.from_arrays(images[low], labels[low], test_size=100, standardize=False),
        tfloop.from_arrays(*few[0], *few[1], standardize=False, class_names=names),
    )


def base() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Rescaling(1 / 16),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Flatten(),
        ],
        name="base",
    )


def train(model: keras.Model, digits: tfloop.Dataset, epochs: int, rate: float) -> float:
    """The test accuracy after so many epochs."""
    state = tfloop.TrainState(model, "adam", rate)
    return tfloop.Loop(state, digits, batch_size=20).fit(epochs).test.accuracy


def main() -> dict[str, float]:
    keras.utils.set_random_seed(0)
    low, high = data()
    learnt = base()
    train(keras.Sequential([learnt, layers.Dense(5)]), low, 10, 0.003)
    learnt.trainable = False
    state = tfloop.TrainState(keras.Sequential([learnt, layers.Dense(5)]), "adam", 0.003)
    loop = tfloop.Loop(state, high, batch_size=20)
    found = {"from scratch": train(keras.Sequential([base(), layers.Dense(5)]), high, 60, 0.003)}
    found["last layer alone"] = loop.fit(40).test.accuracy
    learnt.trainable = True
    state.hyper["learning_rate"].assign(0.0003)
    found["all layers"] = loop.fit(60).test.accuracy
    return found


if __name__ == "__main__":
    for what, accuracy in main().items():
        print(f"{what:18} {100 * accuracy:.1f} %")
