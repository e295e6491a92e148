"""Tokens with an Embedding and an LSTM: is a bracket expression balanced?

    ./run.sh train --model=tfloop/examples/tokens.py:model \
        --dataset=tfloop/examples/tokens.py:data --optimizer=adam --learning_rate=0.005 \
        --epochs=6 --batch_size=64 --name=tokens

The data are made here, by a random walk: 1 opens, 2 closes, 0 fills up at the end. Half of the
expressions are balanced; in the others two brackets have changed places, or one is turned round.
Tokens are whole numbers, so they reach the model as they are.
"""

import keras
import numpy as np
from keras import layers

LENGTH, TOKENS = 20, 3


def data(examples: int = 5000, seed: int = 0) -> tuple:
    """(x_train, y_train, x_test, y_test); both numbers may be set with --data_options."""
    random = np.random.default_rng(seed)
    x = np.stack([balanced(random) for _ in range(examples)])
    y = np.arange(examples) % 2
    for row in np.flatnonzero(y == 0):
        spoil(x[row], random)
    cut = examples * 4 // 5
    return x[:cut], y[:cut], x[cut:], y[cut:]


def balanced(random: np.random.Generator) -> np.ndarray:
    """A balanced expression of 6 to LENGTH brackets, filled up with zeros."""
    length, depth = 2 * random.integers(3, LENGTH // 2 + 1), 0
    tokens = np.zeros(LENGTH, np.int64)
    for place in range(length):
        must_close = depth == length - place
        opens = depth == 0 or (not must_close and random.random() < 0.5)
        tokens[place] = 1 if opens else 2
        depth += 1 if opens else -1
    return tokens


def spoil(tokens: np.ndarray, random: np.random.Generator) -> None:
    """Make an expression one that is not balanced."""
    length = np.count_nonzero(tokens)
    if random.random() < 0.5:  # as many of both, in the wrong order
        tokens[[0, length - 1]] = tokens[[length - 1, 0]]
    else:
        place = random.integers(length)
        tokens[place] = 3 - tokens[place]


def model(classes: int, width: int = 32) -> keras.Model:
    inputs = keras.Input((LENGTH,), dtype="int64")
    x = layers.Embedding(TOKENS, 8, mask_zero=True)(inputs)
    x = layers.LSTM(width)(x)
    return keras.Model(inputs, layers.Dense(classes)(x))
