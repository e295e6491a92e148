"""The job that contenders share, as files: a process that reads them needs NumPy alone.

    python benchmarks/jobs.py FOLDER '{"batch_size": 64, …}'

The settings are those of a `tfloop.Config`, for the article's network; or `zoo` names a model of
`zoo.py` in its place. The folder then holds images.npy (standardised, float32, in the order of the
first epoch), labels.npy (int64), weights.npz (the first weights, in the model's order and by name)
and job.json.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Of the article's network, which has RMSprop and an L2 penalty; those of the zoo have SGD.
RATE, RHO, EPSILON = 0.001, 0.9, 1e-7
SGD_RATE, MOMENTUM = 0.01, 0.9
ZOO_STEPS = 100  # batches of a zoo's data, so that all calls are of 50 steps


class Job(NamedTuple):
    """What `read` finds in a folder."""

    settings: dict  # as they were asked for
    network: dict  # conv, kernel, pool, dense, l2, …: what the article's network is made of
    images: np.ndarray
    labels: np.ndarray
    weights: dict[str, np.ndarray]

    @property
    def batch_size(self) -> int:
        return self.network["batch_size"]

    @property
    def precision(self) -> str:
        return self.network["precision"]


def read(folder: str) -> Job:
    """The job in a folder; no more than NumPy is imported."""
    path = Path(folder)
    known = json.loads((path / "job.json").read_text())
    with np.load(path / "weights.npz") as found:
        weights = {name: found[name] for name in found.files}
    images, labels = np.load(path / "images.npy"), np.load(path / "labels.npy")
    return Job(known["settings"], known["network"], images, labels, weights)


def config_of(settings: dict) -> Any:
    """The tfloop.Config of a job's settings."""
    from tfloop.config import Config

    own = {key: value for key, value in settings.items() if key not in ("zoo", "cores")}
    return Config.make(**{"l2": 0.001, **own})


def write(settings: dict, folder: str) -> None:
    """Make the files of a job."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    config, path = config_of(settings), Path(folder)
    images, labels, model = _zoo(settings, config) if "zoo" in settings else _article(config)
    from tfloop import models

    trainable, other = models.named_variables(model)
    by_name = {**trainable, **other}
    names = list(models.stable_names(model))
    np.savez(path / "weights.npz", **{name: by_name[name].numpy() for name in names})
    np.save(path / "images.npy", images)
    np.save(path / "labels.npy", labels)
    keys = ("conv", "kernel", "pool", "dense", "padding", "batch_norm", "l2", "batch_size")
    network = {key: getattr(config, key) for key in (*keys, "precision")}
    network |= {"shape": images.shape[1:], "classes": 10}
    known = {"settings": settings, "network": network}
    (path / "job.json").write_text(json.dumps(known, default=list))


def _article(config: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    from tfloop import assembly, models
    from tfloop.data import pipelines

    data = assembly.load_data(config)
    order = pipelines.order(config.seed, 0, len(data.train)).numpy()
    pixels = data.train.inputs[order].astype(np.float32)
    images = (pixels - data.standardizer.mean) / data.standardizer.scale
    model = models.build(config, data.image_shape, data.classes)
    return images.astype(np.float32), data.train.targets[order].astype("int64"), model


def _zoo(settings: dict, config: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """Pixels of random numbers: what they show costs nothing and gains nothing."""
    model, random = zoo_model(settings["zoo"]), np.random.default_rng(0)
    rows = ZOO_STEPS * config.batch_size
    images = random.normal(size=(rows, *model.input_shape[1:])).astype(np.float32)
    return images, random.integers(0, 10, rows), model


def zoo_model(name: str) -> Any:
    """A model of the zoo, with the same weights each time."""
    import keras
    from zoo import MODELS

    keras.utils.set_random_seed(0)
    return MODELS[name]()


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]
    write(json.loads(sys.argv[2]), sys.argv[1])
