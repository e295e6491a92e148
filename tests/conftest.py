import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # as the commands have it, on every CPU

import numpy as np
import pytest
import tensorflow as tf

import tfloop

SMALL = dict(preset="digits", conv=(4, 6), pool=(2,), dense=(8,), batch_size=100)


def pytest_collection_modifyitems(items):
    if not tf.config.list_physical_devices("GPU"):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="TensorFlow sees no GPU"))


@pytest.fixture(scope="session")
def mnist() -> tfloop.Dataset:
    return tfloop.load("mnist")


@pytest.fixture(scope="session")
def digits() -> tfloop.Dataset:
    return tfloop.load("digits")


@pytest.fixture
def loop():
    """loop(l2=0.1, …): a small Loop on the digits, 15 steps an epoch, the last of 37 images."""
    return lambda **settings: tfloop.make_loop(tfloop.Config.make(**{**SMALL, **settings}))


@pytest.fixture
def random():
    return np.random.default_rng(0)
