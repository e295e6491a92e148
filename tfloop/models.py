"""The article's CNN from Keras layers, and what the loop needs to know of any model.

A model here is a keras.Model, or a tf.Module that is callable and has trainable variables. A plain stack of layers
(`keras.Sequential`) is run layer by layer in `forward`, so that each activation can be seen and the last softmax or
sigmoid is folded into the loss; any other model is called as it is and must return logits, or what a loss of its own takes.
"""

import inspect

import keras
import numpy as np
import tensorflow as tf

from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.normalization import batch_norm, normalizes
from tfloop.randomness import Key

OUTPUTS = ("softmax", "sigmoid")


def build(config: Config, image_shape: tuple[int, int, int], classes: int) -> keras.Sequential:
    """The CNN that `config` describes: (conv, batch norm, activation, pool)*, flatten, (dense, dropout)*, output.

    With `pool_first` the order is conv, pool, batch norm, activation: the last two then work on the pooled values.

    The weights are those of `initial_weights(model, config.seed)`. With mixed precision all layers but the output
    compute in 16 bits; weights stay float32.

    Raises:
      UserError: a kernel or a pool is larger than what is left of the image at that depth.
    """
    layers = keras.layers
    check_sizes(config, image_shape)
    dtype = config.precision if config.precision.startswith("mixed") else "float32"
    model = keras.Sequential([keras.Input(image_shape)], name="cnn")
    kernels = config.kernel * len(config.conv) if len(config.kernel) == 1 else config.kernel
    pools = config.pool + (1,) * len(config.conv)
    for i, (filters, kernel, pool) in enumerate(zip(config.conv, kernels, pools), start=1):
        early = config.pool_first and pool > 1
        fused = None if config.batch_norm or early else config.conv_activation
        model.add(layers.Conv2D(filters, kernel, padding=config.padding, activation=fused, dtype=dtype, name=f"conv{i}"))
        if early:
            model.add(layers.MaxPooling2D(pool, dtype=dtype, name=f"pool{i}"))
        if config.batch_norm:
            model.add(layers.BatchNormalization(dtype=dtype, name=f"norm{i}"))
        if not fused:
            model.add(layers.Activation(config.conv_activation, dtype=dtype, name=f"activation{i}"))
        if pool > 1 and not early:
            model.add(layers.MaxPooling2D(pool, dtype=dtype, name=f"pool{i}"))
    model.add(layers.Flatten(dtype=dtype, name="flatten"))
    for i, units in enumerate(config.dense, start=1):
        model.add(layers.Dense(units, activation=config.dense_activation, dtype=dtype, name=f"dense{i}"))
        if config.dropout:
            model.add(layers.Dropout(config.dropout, dtype=dtype, name=f"dropout{i}"))
    model.add(layers.Dense(classes, activation=config.output, name="output"))
    values = initial_weights(model, config.seed)
    for layer in model.layers:
        for variable in layer.weights:
            variable.assign(values[f"{layer.name}/{variable.name}"])
    return model


def check_sizes(config: Config, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError where a kernel or a pool is larger than what is left of the image at that depth."""
    size = list(image_shape[:2])
    kernels = config.kernel * len(config.conv) if len(config.kernel) == 1 else config.kernel
    for i, kernel in enumerate(kernels[:len(config.conv)]):
        if config.padding == "valid":
            if kernel > min(size):
                raise UserError(f"--kernel: conv{i + 1} has a {kernel}×{kernel} kernel, larger than its "
                                f"{size[0]}×{size[1]} input; use a smaller kernel, fewer layers or --padding=same")
            size = [side - kernel + 1 for side in size]
        if i < len(config.pool) and config.pool[i] > 1:
            pool = config.pool[i]
            if pool > min(size):
                raise UserError(f"--pool: pool{i + 1} is {pool}×{pool}, larger than its {size[0]}×{size[1]} input; "
                                f"use a smaller pool, fewer pools or --padding=same")
            size = [side // pool for side in size]


def initial_weights(model: keras.Sequential, seed: int) -> dict[str, np.ndarray]:
    """The value of each variable of a stack of layers at the start of a run: a pure function of its shape and the seed.

    Kernels follow their layer's own initializer (Glorot uniform, by default), each from a seed of its own; everything
    else is what its layer begins with: biases 0, moving means 0, moving variances 1.
    """
    constants = {"bias": 0, "beta": 0, "gamma": 1, "moving_mean": 0, "moving_variance": 1}
    values = {}
    for index, layer in enumerate(model.layers):
        for variable in layer.weights:
            if variable.name == "kernel":
                settings = layer.kernel_initializer.get_config()
                settings["seed"] = int(np.random.SeedSequence((seed, index)).generate_state(1)[0] & 0x7FFFFFFF)
                value = np.asarray(type(layer.kernel_initializer).from_config(settings)(variable.shape))
            else:
                value = np.full(variable.shape, constants[variable.name], np.float32)
            values[f"{layer.name}/{variable.name}"] = value
    return values


def named_variables(model) -> tuple[dict[str, tf.Variable], dict[str, tf.Variable]]:
    """(trainable, other) variables of a model by name, "conv1/kernel", in the model's order.

    A name that comes twice gets a number. What Keras keeps for dropout is left out where `forward` makes the dropout
    itself, from the position in the data.
    """
    kept, taken = ({}, {}), set()
    ours = filter(_is_plain_dropout, model.layers) if isinstance(model, keras.Sequential) else ()
    unused = {id(variable) for layer in ours for variable in layer.variables}
    trainable = {id(variable) for variable in model.trainable_variables}
    for variable in model.variables:
        if id(variable) in unused:
            continue
        path = getattr(variable, "path", variable.name).split(":")[0].removeprefix(f"{model.name}/")
        if path.startswith("seed_generator"):  # numbered by process, so not a name to keep
            path = "seed_generator"
        name = next(n for k in range(len(taken) + 1) if (n := f"{path}_{k}" if k else path) not in taken)
        taken.add(name)
        kept[id(variable) not in trainable][name] = _variable(variable)
    return kept


def _variable(variable) -> tf.Variable:
    """The tf.Variable behind a Keras variable, or the variable itself."""
    return variable if isinstance(variable, tf.Variable) else variable.value


def kernels(model, which: str) -> list[tf.Variable]:
    """The kernels that a penalty counts: of the layers with a trainable `kernel`, "dense", "conv" or "all"; "none" is [].

    Of a tf.Module that is no Keras model, "all" is every trainable variable with two or more axes.
    """
    if which == "none":
        return []
    if not isinstance(model, keras.Model):
        if which != "all":
            raise UserError(f"--penalize={which}: only a Keras model tells its layers apart; use all or none")
        return [v for v in model.trainable_variables if len(v.shape) > 1]
    layers = [layer for layer in model._flatten_layers() if getattr(getattr(layer, "kernel", None), "trainable", False)]
    dense = {id(layer) for layer in layers if isinstance(layer, keras.layers.Dense)}
    return [_variable(layer.kernel) for layer in layers
            if which == "all" or (which == "dense") == (id(layer) in dense)]


def output_activation(model) -> str:
    """"softmax" or "sigmoid" where a stack of layers ends in one that `forward` leaves out; "" where it gives what the model does."""
    if not isinstance(model, keras.Sequential) or not model.layers:
        return ""
    last = model.layers[-1]
    known = type(last) in (keras.layers.Dense, keras.layers.Activation, keras.layers.Softmax)
    return _activation_name(last) if known and last.activity_regularizer is None else ""


def last_activation(model) -> str:
    """"softmax" or "sigmoid" where the last operation of a stack or graph of layers is or ends in one, else ""."""
    return _activation_name(_last_operation(model))


def _last_operation(model):
    """That of a stack or graph of layers, or of the one that it ends in; None of any other model, whose layers have no order."""
    last = None
    while isinstance(model, keras.Model) and (
            operations := getattr(model, "layers" if isinstance(model, keras.Sequential) else "operations", None)):
        last = model = operations[-1]
    return last


def check_outputs(model) -> None:
    """Raises UserError for a model whose outputs would be taken for logits and are none."""
    if (activation := last_activation(model)) and not output_activation(model):
        raise UserError(f"the model ends in {activation} ({_last_operation(model).name}); hand in one that returns logits, or a "
                        f"keras.Sequential whose last layer is a Dense, Activation or Softmax, of which the activation is left out")


def _activation_name(layer) -> str:
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    name = getattr(getattr(layer, "activation", None), "__name__", "")
    return name if name in OUTPUTS else ""


def _is_plain_dropout(layer) -> bool:
    return type(layer) is keras.layers.Dropout and layer.noise_shape is None


def forward(model, images: tf.Tensor, weights: tf.Tensor | None = None, training: bool = False, key: Key | None = None):
    """Yields (layer name, activation) from the first layer to the logits.

    Args:
      model: a keras.Sequential is run layer by layer; any other model yields once, what it returns.
      images: [batch, height, width, channels] float32.
      weights: [batch] float32, 0 for the rows that only fill up the batch: batch normalisation leaves them out.
      training: as Keras's argument.
      key: the seed of this step's dropout; needed in training where the model has a Dropout layer.
    """
    if not isinstance(model, keras.Sequential):
        outputs = _call(model, images, training)
        yield getattr(model, "name", "model"), tf.cast(outputs, tf.float32) if tf.is_tensor(outputs) else outputs
        return
    x = images
    for index, layer in enumerate(model.layers):
        with tf.name_scope(layer.name):
            x = apply_layer(model, index, x, weights, training, key)
        yield layer.name, x


def apply_layer(model: keras.Sequential, index: int, x: tf.Tensor, weights, training: bool, key) -> tf.Tensor:
    """The activation of the layer with this index, from the one before; arguments as in `forward`."""
    layer = model.layers[index]
    if _is_plain_dropout(layer):  # stateless in place of Keras's own generator: the mask depends on the position alone
        return dropout(x, layer.rate, key.fold_in(index)) if training else x
    if normalizes(layer, weights, training):
        return batch_norm(layer, [x], weights)[0]
    if index == len(model.layers) - 1 and output_activation(model):
        return _without_activation(layer, x)
    return _call(layer, x, training)


def dropout(x: tf.Tensor, rate: float, key: Key) -> tf.Tensor:
    """x / (1 - rate), or 0 for the share `rate` of all units."""
    return tf.where(key.uniform(x.shape) >= rate, x / tf.cast(1.0 - rate, x.dtype), tf.zeros_like(x))


def logits(model, images, weights=None, training=False, key=None) -> tf.Tensor:
    """The last of what `forward` yields."""
    for _, x in forward(model, images, weights, training, key):
        pass
    return x


def probabilities(model, outputs: tf.Tensor) -> tf.Tensor:
    """The model's output activation over its logits; softmax where it has none. Outputs that it ends in are left as they are."""
    if last_activation(model) and not output_activation(model):
        return outputs
    return tf.sigmoid(outputs) if output_activation(model) == "sigmoid" else tf.nn.softmax(outputs)


def _call(layer, x, training):
    takes_it = isinstance(layer, keras.layers.Layer) or "training" in inspect.signature(layer.__call__).parameters
    return layer(x, training=training) if takes_it else layer(x)


def _without_activation(layer, x):
    if type(layer) is not keras.layers.Dense:
        return x  # an Activation or Softmax layer of its own
    x = tf.matmul(cast(x, layer), cast(layer.kernel, layer))
    return x if layer.bias is None else tf.nn.bias_add(x, cast(layer.bias, layer))


def cast(x, layer) -> tf.Tensor:
    """In the type that the layer computes in: with mixed precision not the one that its weights have."""
    return tf.cast(tf.convert_to_tensor(x), layer.compute_dtype)


def table(model: keras.Model) -> list[tuple[str, str, str, int]]:
    """(layer, output shape, weight shapes, parameters) for each layer. A dense kernel is (inputs, units)."""
    rows = []
    for layer in model.layers:
        shapes = ", ".join(f"{w.name} {_shape(w.shape)}" for w in layer.weights)
        rows.append((layer.name, _shape(layer.output.shape[1:]), shapes, layer.count_params()))
    return rows


def _shape(shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
