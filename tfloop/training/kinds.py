"""Is what was read from a JSON file of the types that a run writes?

A kind is a type, or `Number`; a list with the kind of its entries; a dict with the kinds
of the entries it must have, or may have where the name ends in "?"; `Each`, a dict whose values are
all of one kind; or `Maybe`, where it may be None.
"""

import math
from typing import Any, NamedTuple


class Number(NamedTuple):
    """A whole number or a fraction, and whether NaN and infinity are none."""

    is_finite: bool


NUMBER, ANY_NUMBER = Number(True), Number(False)


class Each(NamedTuple):
    """A dict from texts to values of one kind."""

    kind: Any


class Maybe(NamedTuple):
    """None, or a value of this kind."""

    kind: Any


def is_of(value: Any, kind: Any) -> bool:
    if isinstance(kind, Maybe):
        return value is None or is_of(value, kind.kind)
    if isinstance(kind, Each):
        return isinstance(value, dict) and all(is_of(each, kind.kind) for each in value.values())
    if isinstance(kind, list):
        return isinstance(value, list) and all(is_of(each, kind[0]) for each in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(
            is_of(value[name.rstrip("?")], each) if name.rstrip("?") in value else name[-1] == "?"
            for name, each in kind.items()
        )
    if isinstance(kind, Number):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (math.isfinite(value) or not kind.is_finite)
    is_bool = isinstance(value, bool)
    return isinstance(value, kind) and (not is_bool or kind is bool)


_METRICS = Each(Maybe(NUMBER))
ENTRY = {  # of a result's epochs and evaluations
    "epoch": int,
    "step": int,
    "train?": Maybe(_METRICS),
    "test?": Maybe(_METRICS),
    "validation?": Maybe(_METRICS),
    "weights_sha256?": str,
    "learning_rate?": Maybe(NUMBER),
    "rate?": NUMBER,
    "seconds?": NUMBER,
    "steps?": int,
}
BEST = {
    "epoch": int,
    "step": int,
    "metric?": str,
    "value?": NUMBER,
    "accuracy?": NUMBER,
    "checkpoint?": str,
}


def wrong(content: dict[str, Any], kinds: dict[str, Any]) -> str:
    """The name of the first entry that is there and of another kind; "" where all are right."""
    for name, kind in kinds.items():
        if name in content and not is_of(content[name], kind):
            return name
    return ""
