"""A model's variables by name, and which of them penalties count."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tfloop.errors import UserError
from tfloop.models.names import keras_layers, variable_names
from tfloop.optimizers import matching
from tfloop.user_code import told_in_one_line

Model: TypeAlias = Any  # a keras.Model, or a tf.Module that can be called; neither has types

# What Keras's own layers add or scale by, whatever its shape: these are no kernels.
OFFSETS_AND_SCALES = ("bias", "beta", "gamma", "alpha")
_layers = keras.layers
_CONVOLUTIONS = (
    _layers.Conv1D,
    _layers.Conv2D,
    _layers.Conv3D,
    _layers.Conv1DTranspose,
    _layers.Conv2DTranspose,
    _layers.Conv3DTranspose,
    _layers.DepthwiseConv1D,
    _layers.DepthwiseConv2D,
    _layers.SeparableConv1D,
    _layers.SeparableConv2D,
)
KINDS = {"dense": (_layers.Dense, _layers.EinsumDense), "conv": _CONVOLUTIONS}


def named_variables(model: Model) -> tuple[dict[str, tf.Variable], dict[str, tf.Variable]]:
    """(trainable, other) variables of a model by name, "conv1/kernel", in the model's order.

    The seeds that Keras draws from are left out: each step sets them from its position in the data.
    """
    trainable: dict[str, tf.Variable] = {}
    other: dict[str, tf.Variable] = {}
    is_trainable = {id(variable) for variable in model.trainable_variables}
    variables = kept_variables(model)
    for name, variable in zip(variable_names(model, variables), variables, strict=True):
        group = trainable if id(variable) in is_trainable else other
        group[name] = as_tf_variable(variable)
    return trainable, other


def stable_names(model: Model) -> dict[str, str]:
    """The name of each variable → the name that it has whatever else was made in the process."""
    variables = kept_variables(model)
    names = variable_names(model, variables)
    return dict(zip(names, variable_names(model, variables, stable=True), strict=True))


def kept_variables(model: Model) -> list:
    """All variables of a model, Keras's or TensorFlow's, but for Keras's seeds."""
    seeds = {
        id(generator.state) for layer in keras_layers(model) for generator in layer._seed_generators
    }
    return [
        variable
        for variable in model.variables
        if id(variable) not in seeds and not _is_seed(variable)
    ]


def _is_seed(variable: Any) -> bool:
    return getattr(variable, "path", variable.name).endswith("seed_generator_state")


def as_tf_variable(variable: Any) -> tf.Variable:
    """The tf.Variable behind a Keras variable, or the variable itself."""
    return variable if isinstance(variable, tf.Variable) else variable._value


def trained_state(model: Model) -> tuple:
    """What of a model says which weights are trained; another value where that was changed."""
    layers = tuple(layer.trainable for layer in keras_layers(model))
    return layers, tuple(id(variable) for variable in model.trainable_variables)


def freeze(model: Model, pattern: str) -> None:
    """Take weights in whose names the regular expression is found out of what is trained.

    A layer all of whose weights are frozen is frozen itself: batch normalisation then goes by its
    averages.

    Raises:
      UserError: it is found in none, or the variables of a tf.Module are to be frozen.
    """
    names = stable_names(model)
    trainable, other = named_variables(model)
    weights = {stable: {**trainable, **other}[name] for name, stable in names.items()}
    frozen = {
        id(weights[name])
        for name, is_found in zip(weights, matching(pattern, list(weights)), strict=True)
        if is_found
    }
    if not keras_layers(model):
        raise UserError(
            f"--freeze={pattern}: a tf.Module's variables cannot be frozen afterwards; make them "
            "with trainable=False"
        )
    for layer in keras_layers(model):
        own = [v for v in layer.weights if not _is_seed(v)]
        if own and all(id(as_tf_variable(v)) in frozen for v in own):
            layer.trainable = False
    for variable in model.trainable_variables:
        if id(as_tf_variable(variable)) in frozen:
            if isinstance(variable, tf.Variable):
                raise UserError(
                    f"--freeze={pattern}: {variable.name} is a tf.Variable, which cannot be frozen "
                    "afterwards; make it with trainable=False"
                )
            variable.trainable = False


Penalize: TypeAlias = "str | Sequence | Callable"


def penalized(model: Model, which: Penalize, weights: dict[str, tf.Variable]) -> dict:
    """The weights that a penalty counts, by name, each once.

    A kernel is what a layer multiplies by: a weight of two or more axes, but for what Keras's own
    layers add or scale by (the bias of attention or of a GRU, gamma and beta of a normalisation).

    Args:
      model: whose weights.
      which: "all": every kernel; "dense", "conv": those of layers of that kind; "none". Or the
        variables or layers themselves, of which layers give their kernels. Or a function of a
        variable, Keras's where it is one, that is true for those to penalise.
      weights: what is trained, by name.

    Raises:
      UserError: a variable or layer that is not the model's, or a name that is unknown.
    """
    chosen = {id(as_tf_variable(variable)) for variable in _chosen(model, which)}
    return {name: weight for name, weight in weights.items() if id(weight) in chosen}


def _chosen(model: Model, which: Penalize) -> Iterable:
    if callable(which):
        return [variable for variable in model.trainable_variables if _asks(which, variable)]
    if not isinstance(which, str):
        return _given(model, which)
    if which == "none":
        return []
    kernels = _kernels(model, model.trainable_variables)
    if which == "all":
        return kernels
    if not keras_layers(model):
        raise UserError(
            f"--penalize={which}: only a Keras model tells its layers apart; use all or none"
        )
    of_kind = [layer for layer in keras_layers(model) if isinstance(layer, KINDS[which])]
    owned = {id(variable) for layer in of_kind for variable in layer.trainable_variables}
    return [kernel for kernel in kernels if id(kernel) in owned]


def _asks(which: Callable, variable: Any) -> bool:
    """What a function of the user's own says of a variable."""
    name = getattr(variable, "path", variable.name)
    with told_in_one_line(f"penalize: the function fails on {name}"):
        return bool(which(variable))


def _kernels(model: Model, variables: Iterable) -> list:
    offsets = {
        id(getattr(layer, name, None))
        for layer in keras_layers(model)
        if type(layer).__module__.startswith("keras.")
        for name in OFFSETS_AND_SCALES
    }
    return [v for v in variables if len(v.shape) > 1 and id(v) not in offsets]


def _given(model: Model, which: Any) -> Iterable:
    """The variables that a list of variables and layers names."""
    known = {id(as_tf_variable(v)) for v in model.variables}
    layers = {id(layer) for layer in keras_layers(model)}
    listed = which if isinstance(which, (list, tuple, set)) else [which]
    found: list = []
    for item in listed:
        is_variable = isinstance(item, (tf.Variable, keras.Variable))
        if isinstance(item, keras.layers.Layer) and id(item) in layers:
            found += _kernels(model, item.trainable_variables)
        elif is_variable and id(as_tf_variable(item)) in known:
            found.append(item)
        else:
            what = getattr(item, "path", None) or getattr(item, "name", item)
            raise UserError(
                f"penalize: {what!r} is no variable or layer of the model; give all, dense, conv, "
                "none, a list of its variables and layers, or a function of a variable"
            )
    return found
