"""Your data. They load at once as they are; put your own in their place."""

import numpy as np


def data(examples: int = 2000, noise: float = 0.1, seed: int = 0) -> tuple:
    """(x_train, y_train, x_test, y_test), here of three spirals in the plane.

    The inputs may be images, tables, tokens, series, or a dict of them; the targets class numbers,
    one-hot rows, 0 and 1 in several columns, floats, or a dict by the model's outputs. A dict of
    tfloop.from_arrays's arguments does, too, with weights and class names; so does a
    tf.data.Dataset, or a pair of them. Arguments are your own: --data_options=noise=0.2.
    """
    random = np.random.default_rng(seed)
    labels = np.arange(examples) % 3
    radius = random.uniform(0.1, 1.0, examples)
    angle = 4.0 * radius + labels * (2 * np.pi / 3) + noise * random.normal(size=examples)
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    cut = examples * 4 // 5
    return points[:cut], labels[:cut], points[cut:], labels[cut:]
