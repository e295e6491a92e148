"""Metrics of a whole evaluation, in NumPy: scikit-learn's as they are, Keras's, a user's own."""

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tfloop.data.targets import Target
from tfloop.errors import UserError
from tfloop.nests import leaves
from tfloop.objective import Objective, Term
from tfloop.own_functions import Negated, inner_metric, is_of_numpy
from tfloop.wording import first_sentence

# Of scikit-learn's metrics with the argument y_pred those that take probabilities in it.
OF_PROBABILITIES = ("log_loss", "d2_log_loss_score")


def scores(objective: Objective, targets: Any, outputs: Any) -> dict[str, float | None]:
    """What each of the objective's whole metrics gives; None, and a warning, where one fails.

    Args:
      objective: has the metrics.
      targets: all targets of the evaluation, a nest of arrays.
      outputs: what the model gives for them, with probabilities in the place of logits.
    """
    found: dict[str, float | None] = {}
    for name, (metric, term) in objective.whole_metrics.items():
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scikit-learn's, of what is not defined
                found[name] = _score(metric, term, targets, outputs)
            if math.isfinite(found[name] or 0.0):
                continue
            reason = f"it is {found[name]}"
        except Exception as error:  # whatever a function of a user's own may raise
            reason = first_sentence(error)
        found[name] = None
        if name not in objective.warned:
            objective.warned.add(name)
            warnings.warn(f"the metric {name} is left out: {reason}", stacklevel=2)
    return found


def _score(metric: Any, term: Term | None, targets: Any, outputs: Any) -> float:
    if term is not None:
        targets, outputs = leaves(targets)[term.places[0]], leaves(outputs)[term.places[1]]
        if not is_of_numpy(metric) and term.target.kind != "values":
            outputs = as_shares(term.target, outputs)
    if isinstance(metric, keras.metrics.Metric):
        metric.reset_state()
        metric.update_state(targets, outputs)
        return _one_number(metric.result())
    if is_of_numpy(metric) and term is not None:
        targets, outputs = as_scikit_learn(term.target, targets, outputs, _wants(metric))
    return _one_number(metric(targets, outputs))


def _one_number(found: Any) -> float:
    """A metric's value; the mean of several."""
    if isinstance(found, dict):
        found = list(found.values())
    values = np.asarray(found, np.float64)
    if not values.size:
        raise UserError("it gives nothing")
    return float(values.mean())


def as_shares(target: Target, outputs: np.ndarray) -> np.ndarray:
    """Outputs of classes or labels as probabilities: logits, which leave 0 to 1, are squashed.

    With a loss of one's own a model may give either.
    """
    if not outputs.size or (outputs.min() >= 0 and outputs.max() <= 1):
        return outputs
    wide = outputs.astype(np.float64)
    if target.kind == "labels" or outputs.shape[-1] == 1 or outputs.ndim == 1:
        return 0.5 + 0.5 * np.tanh(0.5 * wide)  # the sigmoid
    shares = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def as_scikit_learn(
    target: Target, targets: np.ndarray, outputs: np.ndarray, wants: str
) -> tuple[np.ndarray, np.ndarray]:
    """(y_true, y_pred or y_score) as scikit-learn takes them.

    Args:
      target: what the targets are.
      targets: [N, …].
      outputs: [N, …], probabilities of classes and labels.
      wants: "guesses" of classes and labels, or "scores" of them.
    """
    if target.kind == "values":
        is_column = outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1
        return targets, outputs[..., 0] if is_column else outputs
    outputs = as_shares(target, outputs)
    if target.kind == "labels":
        return targets, (outputs > 0.5).astype(int) if wants == "guesses" else outputs
    labels = targets.argmax(axis=-1) if target.kind == "shares" else targets
    if labels.ndim > 1:  # of each place
        outputs = outputs.reshape(labels.size, -1)
        labels = labels.reshape(-1)
    is_column = target.classes == 2 and outputs.shape == (*labels.shape, 1)
    if wants == "guesses":
        guesses = outputs[:, 0] > 0.5 if is_column else outputs.argmax(axis=-1)
        return labels, guesses.astype(int)
    if is_column:
        return labels, outputs[:, 0]
    return labels, outputs[:, 1] if target.classes == 2 else outputs


def _wants(metric: Any) -> str:
    """ "guesses" or "scores": as the name of scikit-learn's second argument says."""
    function = inner_metric(metric)
    if function.__name__ in OF_PROBABILITIES:
        return "scores"
    second = list(inspect.signature(function).parameters)[1]
    return "guesses" if second == "y_pred" else "scores"


def named(name: str) -> Callable:
    """A metric by its name: scikit-learn's functions and scorers, or Keras's.

    Raises:
      UserError: there is none.
    """
    import sklearn.metrics

    found = getattr(sklearn.metrics, name, None)
    if callable(found) and inspect.isfunction(inspect.unwrap(found)) and _takes_pairs(found):
        return found
    if name in sklearn.metrics.get_scorer_names():
        scorer = sklearn.metrics.get_scorer(name)
        function = functools.partial(scorer._score_func, **scorer._kwargs)
        return function if scorer._sign > 0 else Negated(function)
    try:
        return keras.metrics.get(name)
    except ValueError:
        pass
    raise UserError(
        f"metrics: neither scikit-learn nor Keras has a metric named {name!r}; names are such as "
        "f1_macro, roc_auc_score, r2_score, or FILE.py:function"
    )


def _takes_pairs(function: Callable) -> bool:
    parameters = list(inspect.signature(function).parameters)
    return len(parameters) > 1 and parameters[0].startswith(("y_true", "labels"))
