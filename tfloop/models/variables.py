"""A model's variables by name, and which of them penalties count."""

from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tfloop.errors import UserError
from tfloop.models.layer_rules import draws_by_position

Model: TypeAlias = Any  # a keras.Model, or a tf.Module that can be called; neither has types


def named_variables(model: Model) -> tuple[dict[str, tf.Variable], dict[str, tf.Variable]]:
    """(trainable, other) variables of a model by name, "conv1/kernel", in the model's order.

    A name that comes twice gets a number. What Keras keeps for dropout is left out where the
    forward pass makes the dropout itself, from the position in the data.
    """
    trainable: dict[str, tf.Variable] = {}
    other: dict[str, tf.Variable] = {}
    unused = _unused(model)
    is_trainable = {id(variable) for variable in model.trainable_variables}
    for variable in model.variables:
        if id(variable) in unused:
            continue
        group = trainable if id(variable) in is_trainable else other
        name = _free_name(_path(model, variable), {*trainable, *other})
        group[name] = as_tf_variable(variable)
    return trainable, other


def _unused(model: Model) -> set[int]:
    """The ids of the variables that nothing reads."""
    if not isinstance(model, keras.Sequential):
        return set()
    ours = filter(draws_by_position, model.layers)
    return {id(variable) for layer in ours for variable in layer.variables}


def _path(model: Model, variable: Any) -> str:
    path = getattr(variable, "path", variable.name).split(":")[0].removeprefix(f"{model.name}/")
    # Keras numbers these by process, so that number is not a name to keep.
    return "seed_generator" if path.startswith("seed_generator") else path


def _free_name(path: str, taken: set[str]) -> str:
    if path not in taken:
        return path
    number = 1
    while f"{path}_{number}" in taken:
        number += 1
    return f"{path}_{number}"


def as_tf_variable(variable: Any) -> tf.Variable:
    """The tf.Variable behind a Keras variable, or the variable itself."""
    return variable if isinstance(variable, tf.Variable) else variable.value


def penalized_kernels(model: Model, which: str) -> list[tf.Variable]:
    """The kernels that a penalty counts: of the layers with a trainable `kernel`.

    Args:
      model: of a tf.Module that is no Keras model, "all" is every trainable variable with two or
        more axes.
      which: "dense", "conv", "all", or "none" for [].
    """
    if which == "none":
        return []
    if not isinstance(model, keras.Model):
        if which != "all":
            raise UserError(
                f"--penalize={which}: only a Keras model tells its layers apart; use all or none"
            )
        return [variable for variable in model.trainable_variables if len(variable.shape) > 1]
    kernels = []
    for layer in model._flatten_layers():
        is_dense = isinstance(layer, keras.layers.Dense)
        is_chosen = which == "all" or (which == "dense") == is_dense
        if is_chosen and getattr(getattr(layer, "kernel", None), "trainable", False):
            kernels.append(as_tf_variable(layer.kernel))
    return kernels
