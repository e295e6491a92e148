"""The layers in a model, and names for its variables.

Keras numbers layers without a name by process: the first Dense is "dense", the second "dense_1", in
whatever model. The same model made twice has other names the second time. Stable names count for
each model by itself, so they are those of a fresh process; checkpoints and digests have them.
"""

import re
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.utils.naming import to_snake_case


def keras_layers(model: Any) -> list[keras.layers.Layer]:
    """Every Keras layer in a model, itself included, once each, in Keras's order.

    A tf.Module does not know of Keras's layers; those that it holds are found in its attributes.
    """
    if isinstance(model, keras.layers.Layer):
        return model._flatten_layers()
    found: dict[int, keras.layers.Layer] = {}
    for held in held_by(model):
        if isinstance(held, keras.layers.Layer):
            found.update((id(layer), layer) for layer in held._flatten_layers())
    return list(found.values())


def held_by(module: Any) -> Iterator[Any]:
    """What a tf.Module, and every tf.Module in it, holds in its attributes, lists included."""
    seen = set[int]()
    waiting = [module]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, tf.Module):
            waiting += reversed(list(vars(item).values()))
        elif isinstance(item, (list, tuple)):
            waiting += reversed(item)
        elif isinstance(item, dict):
            waiting += reversed(list(item.values()))


def variable_names(model: Any, variables: list, stable: bool = False) -> list[str]:
    """A name for each of a model's variables, "conv1/kernel"; one that comes twice is numbered.

    Args:
      model: whose they are.
      variables: Keras's or TensorFlow's.
      stable: give names that are the same for a model that is made again.
    """
    renamed = _stable_names(model, variables) if stable else {}
    root = f"{getattr(model, 'name', '')}/"
    names: list[str] = []
    taken = set[str]()
    for variable in variables:
        path = _path(variable).removeprefix(root)
        name = free = "/".join(renamed.get(part, part) for part in path.split("/"))
        number = 1
        while free in taken:
            free, number = f"{name}_{number}", number + 1
        taken.add(free)
        names.append(free)
    return names


def _path(variable: Any) -> str:
    return getattr(variable, "path", variable.name).split(":")[0]


def _stable_names(model: Any, variables: list) -> dict[str, str]:
    """Each name that Keras may have numbered, of a layer or variable → the name that it has here.

    Variables without a name are "variable", "variable_1" and so on. A Bidirectional puts a word
    before the name of its layer.
    """
    given = [(to_snake_case(type(layer).__name__), layer.name) for layer in keras_layers(model)]
    given += [("variable", _path(variable).split("/")[-1]) for variable in variables]
    by_kind: dict[str, set[tuple[int, str]]] = {}
    for kind, name in given:
        pattern = rf"((?:forward_|backward_)?{re.escape(kind)})(?:_(\d+))?"
        if found := re.fullmatch(pattern, name):
            by_kind.setdefault(found[1], set()).add((int(found[2] or 0), name))
    return {
        name: f"{kind}_{number}" if number else kind
        for kind, numbered in by_kind.items()
        # In the order in which they were made, as in a process that makes nothing else.
        for number, (_, name) in enumerate(sorted(numbered))
    }
