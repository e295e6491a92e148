"""A tf.data pipeline with an augmentation of its own.

    ./run.sh train --model=tfloop/examples/pipeline.py:model \
        --dataset=tfloop/examples/pipeline.py:data --optimizer=adam --learning_rate=0.003 \
        --epochs=10 --name=pipeline

The function gives a training and a test dataset. It is called again wherever reading begins, and
all in it has a seed; so a run that was killed goes on with --resume=auto, in the middle of an epoch
too, and ends with the same bits. Batches are as the dataset makes them: --batch_size is left out.
"""

import keras
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits


def data(batch: int = 32, noise: float = 0.1) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    digits = load_digits()
    images = (digits.images[..., None] / 16.0).astype("float32")
    whole = tf.data.Dataset.from_tensor_slices((images, digits.target))
    numbered = whole.skip(360).shuffle(1437, seed=0).enumerate()

    def augment(number: tf.Tensor, example: tuple) -> tuple:
        image, label = example
        seed = tf.stack([number, tf.cast(label, tf.int64)])
        draws = tf.random.stateless_normal([8, 8, 1], seed)
        by = tf.random.stateless_uniform([2], seed, -1, 2, tf.int64)
        return tf.roll(image, by, axis=[0, 1]) + noise * draws, label

    train = numbered.map(augment).batch(batch)
    return train, whole.take(360).batch(batch)


def model(input_shape: tuple, classes: int) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, "relu"),
            layers.Dense(classes),
        ]
    )
