"""Losses and metrics that a user gives, as functions: a callable, a Keras object, or a name."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses.loss import squeeze_or_expand_to_same_rank

from tfloop.cross_entropy import over_places
from tfloop.errors import UserError
from tfloop.nests import named_leaves
from tfloop.user_code import told_in_one_line
from tfloop.wording import names_text

# --- losses


def check_loss(loss: Any) -> None:
    """Raises UserError for what is no loss, whatever the outputs are."""
    if isinstance(loss, Mapping):
        for part in loss.values():
            own = part[0] if isinstance(part, tuple) and part else part
            if own is not None and not isinstance(own, (int, float)):
                check_loss(own)
        return
    if loss is not None:
        as_function(loss)


def as_function(loss: Any) -> functools.partial:
    """(targets, outputs, smoothing) → [batch], of a function, a Keras loss or the name of one.

    Raises:
      UserError: none of these, or a Keras loss with a reduction that is not the mean.
    """
    if isinstance(loss, str):
        loss = _keras_named(loss)
    options = getattr(loss, "_fn_kwargs", None) or getattr(loss, "keywords", None) or {}
    if options.get("ignore_class") is not None or getattr(loss, "ignore_class", None) is not None:
        raise UserError(
            f"loss: {text_of(loss)} has ignore_class, whose places would count in the mean; give "
            "such examples a weight of 0, or a function of your own"
        )
    if isinstance(loss, keras.losses.Loss):
        if loss.reduction not in ("sum_over_batch_size", "mean", "none", None):
            raise UserError(
                f"loss: {type(loss).__name__} has reduction={loss.reduction!r}; the step takes the "
                "mean over the batch: leave it out"
            )
        return functools.partial(of_keras, loss.call)
    if not callable(loss) or isinstance(loss, type):
        shown = f"the class {loss.__name__}" if isinstance(loss, type) else repr(loss)
        raise UserError(
            "loss: expected a function (targets, outputs) that gives a value for each example, a "
            f"Keras loss or the name of one, found {shown}; Keras's are functions such as "
            "keras.losses.sparse_categorical_crossentropy"
        )
    if is_keras_function(loss):
        return functools.partial(of_keras, loss)
    return functools.partial(_of_own, loss)


def _keras_named(name: str) -> Any:
    try:
        found = keras.losses.get(name)
    except ValueError:
        found = None
    if found is None:
        raise UserError(
            f"loss: Keras has no loss named {name!r}; names are such as mse, huber, "
            "binary_crossentropy, or FILE.py:function"
        )
    return found() if isinstance(found, type) else found


def of_keras(loss: Callable, targets: Any, outputs: Any, _: Any) -> tf.Tensor:
    if tf.is_tensor(targets) and tf.is_tensor(outputs):  # as Keras does before it calls a loss
        targets, outputs = squeeze_or_expand_to_same_rank(targets, outputs)
    found = called(loss, targets, outputs, f"the loss {text_of(loss)}")
    rank = getattr(getattr(found, "shape", None), "rank", None)
    return over_places(tf.convert_to_tensor(found)) if rank else found


def _of_own(loss: Callable, targets: Any, outputs: Any, _: Any) -> tf.Tensor:
    return called(loss, targets, outputs, "the loss function")


def by_output(loss: Any, names: Sequence[str]) -> dict[str, tuple[Any, float]]:
    """output → (its loss, or None for that which follows from its targets; its weight)."""
    if not isinstance(loss, Mapping):
        return dict.fromkeys(names, (loss, 1.0))
    unknown = [name for name in loss if name not in names]
    if unknown:
        raise UserError(f"loss: there is no output {unknown[0]!r}; there is {names_text(names)}")
    if missing := [name for name in names if name not in loss]:
        raise UserError(
            f"loss: says nothing of the output {missing[0]!r}; give None for the loss that follows "
            "from its targets, or 0 for none"
        )
    found: dict[str, tuple[Any, float]] = {}
    for name, given in loss.items():
        is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
        pair = given if isinstance(given, tuple) else (None, given) if is_number else (given, 1.0)
        if len(pair) != 2 or isinstance(pair[1], bool) or not isinstance(pair[1], (int, float)):
            raise UserError(f"loss: {name}: expected a loss, a weight, or (loss, weight)")
        found[name] = pair[0], float(pair[1])
    return found


def is_keras_function(loss: Any) -> bool:
    return getattr(loss, "__module__", "").startswith("keras.")


# --- metrics


def named_metrics(metrics: Any) -> dict[str, Any]:
    """name → metric, of a dict or a list of functions and names."""
    if not metrics:
        return {}
    if not isinstance(metrics, Mapping):
        if not isinstance(metrics, (list, tuple)):
            metrics = [metrics]
        named = [text_of(metric) for metric in metrics]
        if twice := [name for name in named if named.count(name) > 1]:
            raise UserError(f"metrics: {twice[0]} comes twice; give a dict with a name for each")
        metrics = dict(zip(named, metrics, strict=True))
    for name, metric in metrics.items():
        if isinstance(metric, Mapping):
            continue  # by output
        if isinstance(metric, type):
            raise UserError(f"metrics: {name}: is the class {metric.__name__}; make one: (…)")
        if callable(metric) and not isinstance(metric, keras.metrics.Metric):
            _check_takes_two(name, metric)
        if not callable(metric):
            raise UserError(
                f"metrics: {name}: expected a function (targets, outputs) or a keras.metrics.Metric"
                f", found {metric!r}"
            )
    return dict(metrics)


def _check_takes_two(name: str, metric: Callable) -> None:
    with contextlib.suppress(ValueError):  # some of C have no signature
        try:
            inspect.signature(metric).bind(None, None)
        except TypeError as error:
            raise UserError(
                f"metrics: {name}: expected a function of (targets, outputs): {error}"
            ) from None


class Negated:
    """A metric whose sign is changed, so that more is better."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, targets: Any, outputs: Any) -> float:
        return -self.function(targets, outputs)


def inner_metric(metric: Any) -> Any:
    """The function itself, behind a partial or a sign."""
    while isinstance(metric, (functools.partial, Negated)):
        metric = metric.func if isinstance(metric, functools.partial) else metric.function
    return metric


def is_of_numpy(metric: Any) -> bool:
    """Is it one of scikit-learn's, which take NumPy?"""
    return (getattr(inner_metric(metric), "__module__", None) or "").startswith("sklearn.")


# --- both


def text_of(loss: Any) -> str:
    """What a loss or metric is called in messages."""
    if isinstance(loss, str):
        return loss
    if isinstance(loss, functools.partial):
        return text_of(loss.func)
    if inspect.ismethod(loss):
        loss = loss.__self__
    return getattr(loss, "__name__", None) or getattr(loss, "name", None) or type(loss).__name__


def check_shape(found: Any, shape: Any, what: str, meaning: str) -> tf.Tensor:
    """What a user's function gave, as float32.

    Raises:
      UserError: it has another shape; `what` names the function, `meaning` what it is to give.
    """
    expected = f"expected {tf.TensorShape(shape)}: {meaning}"
    if found is None:
        raise UserError(f"{what} gives None, {expected}")
    found = tf.convert_to_tensor(found)
    if not found.shape.is_compatible_with(shape):
        raise UserError(f"{what} gives {found.shape}, {expected}")
    return tf.cast(found, tf.float32)


def called(function: Any, targets: Any, outputs: Any, what: str) -> Any:
    described = f"targets {_described(targets)} and outputs {_described(outputs)}"
    with told_in_one_line(f"{what} fails on {described}"):
        return function(targets, outputs)


def _described(nest: Any) -> str:
    return ", ".join(
        f"{name} {leaf.dtype.name} {leaf.shape}" if name else f"{leaf.dtype.name} {leaf.shape}"
        for name, leaf in named_leaves(nest)
    )
