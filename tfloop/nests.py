"""Inputs, targets and outputs as nests: one array, or dicts and tuples of arrays, to any depth.

The leaves of a nest come in one order everywhere, that of `tf.nest`: dicts by sorted keys. Needs no
TensorFlow.
"""

from collections.abc import Callable, Iterator
from typing import Any


def leaves(nest: Any) -> list[Any]:
    """The leaves, in their order."""
    return [leaf for _, leaf in named_leaves(nest)]


def named_leaves(nest: Any) -> list[tuple[str, Any]]:
    """(name, leaf): keys and places joined by "/"; the name of a nest that is one leaf is ""."""
    return list(_walk(nest, ()))


def _walk(nest: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key, part in _parts(nest):
        if key is None:
            yield "/".join(path), part
        else:
            yield from _walk(part, (*path, str(key)))


def _parts(nest: Any) -> list[tuple[Any, Any]]:
    """(key, part) of a nest; (None, itself) of a leaf."""
    if isinstance(nest, dict):
        return [(key, nest[key]) for key in sorted(nest)]
    if isinstance(nest, (tuple, list)):
        return list(enumerate(nest))
    return [(None, nest)]


def is_leaf(nest: Any) -> bool:
    return not isinstance(nest, (dict, tuple, list))


def map_leaves(function: Callable, nest: Any, *others: Any) -> Any:
    """A nest like `nest` of what the function gives for its leaves and those of `others`."""
    if isinstance(nest, dict):
        return {key: map_leaves(function, nest[key], *(o[key] for o in others)) for key in nest}
    if isinstance(nest, (tuple, list)):
        rows = zip(nest, *others, strict=True)
        made = [map_leaves(function, *row) for row in rows]
        return type(nest)(*made) if hasattr(nest, "_fields") else type(nest)(made)
    return function(nest, *others)


def filled(nest: Any, values: list[Any]) -> Any:
    """A nest like `nest` whose leaves are `values`, in their order."""
    left = {name: value for (name, _), value in zip(named_leaves(nest), values, strict=True)}
    return _fill(nest, (), left)


def _fill(nest: Any, path: tuple[str, ...], values: dict[str, Any]) -> Any:
    if isinstance(nest, dict):
        return {key: _fill(part, (*path, str(key)), values) for key, part in nest.items()}
    if isinstance(nest, (tuple, list)):
        made = [_fill(part, (*path, str(key)), values) for key, part in enumerate(nest)]
        return type(nest)(*made) if hasattr(nest, "_fields") else type(nest)(made)
    return values["/".join(path)]
