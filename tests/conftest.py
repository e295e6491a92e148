import gc
import os
import signal
import tempfile
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # as the commands have it, on every CPU
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()  # where is noted which code was named

import numpy as np
import pytest
import tensorflow as tf

import tfloop
from tfloop.data import sources
from tfloop.inspection import dashboards, moments
from tfloop.models import layer_rules
from tfloop.optimizers import OPTIMIZERS
from tfloop.schedules import SCHEDULES

# A shell ignores Ctrl-C for what it starts in the background, and nohup SIGHUP; tfloop would obey.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

SMALL = dict(preset="digits", conv=(4, 6), pool=(2,), dense=(8,), batch_size=100)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="a selection that covers every module")
    parser.addoption("--all_kinds", action="store_true", help="all kinds of inputs × targets")
    parser.addoption("--in_full", action="store_true", help="the slow tests marked in_full, too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("quick"):
        left_out = [item for item in items if not item.get_closest_marker("quick")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.get_closest_marker("quick")]
    if not config.getoption("in_full"):
        for item in items:
            if item.get_closest_marker("in_full"):
                item.add_marker(pytest.mark.skip(reason="slow: --in_full runs it"))
    if not tf.config.list_physical_devices("GPU"):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="TensorFlow sees no GPU"))


@pytest.fixture(autouse=True, scope="module")
def _collected() -> Iterator[None]:
    """TensorFlow keeps graphs with custom gradients for ever; the collector skips what is left."""
    yield
    gc.collect()
    gc.freeze()


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
def registries(monkeypatch):
    """What a test registers is gone after it."""
    for registry in (SCHEDULES, OPTIMIZERS):
        monkeypatch.setattr(registry, "_functions", dict(registry._functions))
    monkeypatch.setattr(layer_rules, "LAYER_RULES", dict(layer_rules.LAYER_RULES))
    assert dashboards.TAGS  # its summaries are registered when it is imported
    summaries, formats = list(moments.REGISTERED), list(sources.SOURCES)
    yield
    moments.REGISTERED[:], sources.SOURCES[:] = summaries, formats


@pytest.fixture
def random():
    return np.random.default_rng(0)
