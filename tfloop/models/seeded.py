"""Models whose first weights follow from a seed, whoever builds them."""

import collections
import contextlib
import random
from collections.abc import Iterator

import keras
import numpy as np
from keras.src.backend.common import global_state

NAMES = "object_name_uids"  # where Keras counts the layers of a kind


@contextlib.contextmanager
def seeded(seed: int, precision: str = "float32") -> Iterator[None]:
    """In this block Python's, NumPy's, TensorFlow's and Keras's random numbers follow from a seed.

    Python's and NumPy's go on afterwards as before. Keras's layers compute in this precision, where
    it is a mixed one. Layers are named as in a process that makes no others.
    """
    before, policy = (random.getstate(), np.random.get_state()), keras.config.dtype_policy()
    names = global_state.get_global_attribute(NAMES)
    global_state.set_global_attribute(NAMES, collections.defaultdict(int))
    keras.utils.set_random_seed(seed % 2**32)
    if precision.startswith("mixed"):
        keras.config.set_dtype_policy(precision)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        keras.config.set_dtype_policy(policy)
        global_state.set_global_attribute(NAMES, names)
