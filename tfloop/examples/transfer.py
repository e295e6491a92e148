"""Transfer learning in two phases: a new last layer alone, then all layers at a low rate.

    .venv/bin/python -m tfloop.examples.transfer

A network learns MNIST, made as small as scikit-learn's digits, 8×8. All but its last layer is then
to help with those, of which there are 30 to train on: first frozen, then unfrozen. `trainable`
counts from the next call on, and weights that were trained before keep the optimizer's slots. All
is done for five choices of the 30 images.
"""

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

import tfloop

CHOICES = 5


def small_mnist(size: int = 10000) -> tfloop.Dataset:
    """MNIST's first images, the middle, each pixel the mean of 3×3, from 0 to 16."""
    train = tfloop.load("mnist").train.take(slice(size))
    middle = train.inputs[:, 2:26, 2:26]
    small = middle.reshape(size, 8, 3, 8, 3, 1).mean(axis=(2, 4)) / 16.0
    return tfloop.from_arrays(small.astype("uint8"), train.targets, standardize=False)


def digits(choice: int) -> tfloop.Dataset:
    """scikit-learn's digits: 30 to train on, the others for the test."""
    bunch = load_digits()
    return tfloop.from_arrays(
        bunch.images.astype("uint8"),
        bunch.target,
        test_size=len(bunch.images) - 30,
        seed=choice,
        standardize=False,
    )


def base_model() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Rescaling(1 / 16),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, "relu"),
        ]
    )


def loop_of(base: keras.Model, data: tfloop.Dataset, rate: float) -> tfloop.Loop:
    state = tfloop.TrainState(keras.Sequential([base, layers.Dense(10)]), "adam", rate)
    return tfloop.Loop(state, data, batch_size=30)


def main(choices: int = CHOICES) -> dict[str, float]:
    """The mean test accuracy over so many choices of the images, by what was trained."""
    keras.utils.set_random_seed(0)
    learnt, found = base_model(), []
    loop_of(learnt, small_mnist(), 0.002).fit(3)
    for choice in range(choices):
        data, base = digits(choice), base_model()
        scratch = loop_of(base_model(), data, 0.002).fit(100).test.accuracy
        base.set_weights(learnt.get_weights())
        base.trainable = False
        loop = loop_of(base, data, 0.002)
        last_layer = loop.fit(100).test.accuracy
        base.trainable = True
        loop.state.hyper["learning_rate"].assign(0.0003)
        found.append([scratch, last_layer, loop.fit(200).test.accuracy])
    names = ("from scratch", "last layer alone", "all layers after it")
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


if __name__ == "__main__":
    for what, accuracy in main().items():
        print(f"{what:20} {100 * accuracy:.1f} %")
