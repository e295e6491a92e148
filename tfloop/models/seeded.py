"""Models whose first weights follow from a seed, whoever builds them."""

import contextlib
import random
from collections.abc import Iterator

import keras
import numpy as np


@contextlib.contextmanager
def seeded(seed: int, precision: str = "float32") -> Iterator[None]:
    """In this block Python's, NumPy's, TensorFlow's and Keras's random numbers follow from a seed.

    Python's and NumPy's go on afterwards as before. Keras's layers compute in this precision, where
    it is a mixed one.
    """
    before, policy = (random.getstate(), np.random.get_state()), keras.config.dtype_policy()
    keras.utils.set_random_seed(seed % 2**32)
    if precision.startswith("mixed"):
        keras.config.set_dtype_policy(precision)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        keras.config.set_dtype_policy(policy)
