"""The article's CNN from Keras layers."""

from collections.abc import Sequence

import keras
import numpy as np

from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.wording import shape_text


def build(config: Config, image_shape: Sequence[int], classes: int) -> keras.Sequential:
    """The CNN that `config` describes.

    Its layers are (conv, batch norm, activation, pool)*, flatten, (dense, dropout)*, output. With
    `pool_first` the order is conv, pool, batch norm, activation: the last two then work on the
    pooled values.

    The weights are those of `initial_weights(model, config.seed)`. With mixed precision all layers
    but the output compute in 16 bits; weights stay float32.

    Raises:
      UserError: a kernel or a pool is larger than what is left of the image at that depth.
    """
    check_sizes(config, image_shape)
    layers = keras.layers
    dtype = config.precision if config.precision.startswith("mixed") else "float32"
    model = keras.Sequential([keras.Input(image_shape)], name="cnn")
    pools = config.pool + (1,) * len(config.conv)
    for i, (filters, kernel) in enumerate(zip(config.conv, _kernels(config), strict=True), 1):
        for layer in _block(config, i, filters, kernel, pools[i - 1], dtype):
            model.add(layer)
    model.add(layers.Flatten(dtype=dtype, name="flatten"))
    for i, units in enumerate(config.dense, start=1):
        activation = config.dense_activation
        model.add(layers.Dense(units, activation=activation, dtype=dtype, name=f"dense{i}"))
        if config.dropout:
            model.add(layers.Dropout(config.dropout, dtype=dtype, name=f"dropout{i}"))
    model.add(layers.Dense(classes, activation=config.output, name="output"))
    values = initial_weights(model, config.seed)
    for layer in model.layers:
        for variable in layer.weights:
            variable.assign(values[f"{layer.name}/{variable.name}"])
    return model


def _block(
    config: Config, i: int, filters: int, kernel: int, pool: int, dtype: str
) -> list[keras.layers.Layer]:
    """The i-th convolution and what follows it, up to its pool."""
    layers = keras.layers
    pool_layer = layers.MaxPooling2D(pool, dtype=dtype, name=f"pool{i}")
    pools_early = config.pool_first and pool > 1
    fused = None if config.batch_norm or pools_early else config.conv_activation
    block = [
        layers.Conv2D(
            filters,
            kernel,
            padding=config.padding,
            activation=fused,
            dtype=dtype,
            name=f"conv{i}",
        )
    ]
    if pools_early:
        block.append(pool_layer)
    if config.batch_norm:
        block.append(layers.BatchNormalization(dtype=dtype, name=f"norm{i}"))
    if not fused:
        activation = config.conv_activation
        block.append(layers.Activation(activation, dtype=dtype, name=f"activation{i}"))
    if pool > 1 and not pools_early:
        block.append(pool_layer)
    return block


def _kernels(config: Config) -> tuple[int, ...]:
    """The kernel size of each convolution."""
    convolutions = len(config.conv)
    return config.kernel * convolutions if len(config.kernel) == 1 else config.kernel[:convolutions]


def check_sizes(config: Config, image_shape: Sequence[int]) -> None:
    """Raises UserError where a kernel or pool is larger than what is left of the image."""
    size = list(image_shape[:2])
    pools = config.pool + (1,) * len(config.conv)
    for i, kernel in enumerate(_kernels(config)):
        if config.padding == "valid":
            if kernel > min(size):
                raise UserError(
                    f"--kernel: conv{i + 1} has a {kernel}×{kernel} kernel, larger than its "
                    f"{shape_text(size)} input; use a smaller kernel, fewer layers or "
                    "--padding=same"
                )
            size = [side - kernel + 1 for side in size]
        pool = pools[i]
        if pool > min(size):
            raise UserError(
                f"--pool: pool{i + 1} is {pool}×{pool}, larger than its {shape_text(size)} input; "
                "use a smaller pool, fewer pools or --padding=same"
            )
        size = [side // pool for side in size]


_CONSTANTS = {"bias": 0, "beta": 0, "gamma": 1, "moving_mean": 0, "moving_variance": 1}


def initial_weights(model: keras.Sequential, seed: int) -> dict[str, np.ndarray]:
    """The value of each variable of a stack of layers at the start of a run, by name.

    A pure function of the model's shape and the seed. Kernels follow their layer's own initializer
    (Glorot uniform, by default), each from a seed of its own; everything else is what its layer
    begins with: biases 0, moving means 0, moving variances 1.
    """
    values = {}
    for index, layer in enumerate(model.layers):
        for variable in layer.weights:
            if variable.name == "kernel":
                value = _initial_kernel(layer, variable.shape, (seed, index))
            else:
                value = np.full(variable.shape, _CONSTANTS[variable.name], np.float32)
            values[f"{layer.name}/{variable.name}"] = value
    return values


def _initial_kernel(
    layer: keras.layers.Layer, shape: Sequence[int], entropy: tuple[int, int]
) -> np.ndarray:
    settings = layer.kernel_initializer.get_config()
    settings["seed"] = int(np.random.SeedSequence(entropy).generate_state(1)[0] & 0x7FFFFFFF)
    initializer = type(layer.kernel_initializer).from_config(settings)
    return np.asarray(initializer(shape))
