"""What a state is trained on and judged by: a loss and metrics for each output of its model.

An `Objective` joins what the user asked for, what the targets are and what the model gives. The
step asks it for the loss of each example, and for what it counts beside it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfloop import models
from tfloop.cross_entropy import binary_cross_entropy, cross_entropy, over_places, squared_error
from tfloop.data.augmentation import mixed
from tfloop.data.targets import Target
from tfloop.errors import UserError
from tfloop.metrics import NAMES
from tfloop.nests import filled, leaves, named_leaves
from tfloop.own_functions import (
    as_function,
    by_output,
    called,
    check_shape,
    is_keras_function,
    is_of_numpy,
    named_metrics,
    of_keras,
    text_of,
)
from tfloop.wording import names_text, shape_text

EACH = "a value for each example of the batch"  # what a loss gives
ONE_CLASS = {"": Target("classes", (), 0)}  # what targets are where nobody has said


class Term(NamedTuple):
    """The part of the loss that one output has.

    Attributes:
      name: of the output; "" where there is one.
      text: what the loss is called.
      loss: (targets, outputs, smoothing) → [batch].
      weight: what it is multiplied by in the loss.
      as_logits: is a last softmax or sigmoid left out of the output?
      activation: what makes probabilities of the output: "softmax", "sigmoid", or "" for nothing.
      accuracy: (targets, outputs) → [batch]; None where there are no classes.
      target: what its targets are.
      places: of its targets and of its output among the leaves of theirs.
      is_default: does the loss follow from the targets?
      is_keras: is it one of Keras's?
    """

    name: str
    text: str
    loss: Callable
    weight: float
    as_logits: bool
    activation: str
    accuracy: Callable | None
    target: Target
    places: tuple[int, int]
    is_default: bool = True
    is_keras: bool = False


class Objective:
    """The loss and the metrics of one model on one kind of targets.

    Attributes:
      terms: by output.
      names: of the outputs.
      is_default: did nobody ask for a loss, so that it follows from the targets?
      extra: the names of what is summed up beside the loss and the accuracy.
      whole_metrics: name → (function of all targets and outputs of an evaluation, as NumPy; the
        output that it looks at, None for all).
      warned: the names of those that have failed.
    """

    def __init__(
        self,
        model: Any,
        loss: Any = None,
        metrics: Any = None,
        kinds: Mapping[str, Target] | None = None,
        outputs: Any = None,
        targets: Any = None,
    ) -> None:
        """Make one.

        Args:
          model: whose outputs.
          loss: None, a function (targets, outputs) → [batch], a Keras loss or its name, or a dict
            of those by output, or of (loss, weight).
          metrics: as of TrainState.
          kinds: what the targets are, by name; None: one class number for each example.
          outputs: a nest of tensors or specs, as the model gives them; None: one row of logits.
          targets: a nest of tensors or specs of the targets.

        Raises:
          UserError: targets and outputs that do not belong together.
        """
        kinds = dict(kinds or ONE_CLASS)
        shapes = None if outputs is None else [tuple(leaf.shape) for leaf in leaves(outputs)]
        self.names = [""] if outputs is None else output_names(model, outputs)
        self._whole = loss if _takes_nests(loss, self.names) else None
        self.is_default = loss is None
        self._widths = [shape[-1] if shape else 0 for shape in shapes or []]
        self.terms: list[Term] = []
        if self._whole is None or len(self.names) == len(kinds) == 1:
            losses = by_output(loss, self.names)
            in_order = isinstance(outputs, (list, tuple))
            activations = models.output_activations(model)
            for name, target, places in _pairs(self.names, kinds, in_order):
                shape = None if shapes is None else shapes[places[1]]
                own, weight = losses[name]
                squashed = activations[places[1]] if activations else ""
                self.terms.append(_term(name, own, weight, target, shape, squashed, places))
        self.extra: list[str] = []
        self._batch_metrics: dict[str, Callable] = {}
        self.whole_metrics: dict[str, tuple[Any, Term | None]] = {}
        self.warned: set[str] = set()
        if len(self.terms) > 1:
            self.extra = [f"{term.name}/loss" for term in self.terms]
            self.extra += [f"{term.name}/accuracy" for term in self.terms if term.accuracy]
        given = named_metrics(metrics)
        for name, metric in given.items() if targets is not None else ():
            self._add_metric(name, metric, targets, outputs)
        taken = ["loss", *NAMES, *self.extra, *self.whole_metrics]
        if twice := [name for name in taken if taken.count(name) > 1]:
            raise UserError(f"metrics: {twice[0]} is there already; give yours another name")

    def _add_metric(self, name: str, metric: Any, targets: Any, outputs: Any) -> None:
        """Scikit-learn's and Keras's look at each output, others at all of them together."""
        if isinstance(metric, Mapping):
            by_name = {term.name: term for term in self.terms}
            if name not in by_name:
                raise UserError(f"metrics: there is no output {name!r}")
            for own, function in named_metrics(metric).items():
                self.whole_metrics[f"{name}/{own}"] = function, by_name[name]
            return
        is_known = is_of_numpy(metric) or is_keras_function(metric)
        if is_known or isinstance(metric, keras.metrics.Metric):
            for term in self.terms:
                own = metric
                if isinstance(metric, keras.metrics.Metric) and len(self.terms) > 1:
                    own = metric.from_config(metric.get_config())  # each has sums of its own
                self.whole_metrics[f"{term.name}/{name}" if term.name else name] = own, term
            if self.terms:
                return
        if _is_by_example(metric, targets, outputs):
            self._batch_metrics[name] = metric
            self.extra.append(name)
        else:
            self.whole_metrics[name] = metric, None

    @property
    def text(self) -> str:
        """ "cross-entropy", or "price: squared error, kind: 0.5 · cross-entropy" """
        if self._whole is not None and not self.terms:
            return text_of(self._whole)
        shown = []
        for term in self.terms:
            weight = "" if term.weight == 1 else f"{term.weight:g} · "
            shown.append(f"{term.name}: {weight}{term.text}" if term.name else weight + term.text)
        return ", ".join(shown)

    @property
    def smooths(self) -> bool:
        """Is there a cross-entropy, which alone smooths labels?"""
        return any(term.is_default and term.target.kind != "values" for term in self.terms)

    @property
    def as_logits(self) -> tuple[bool, ...] | bool:
        """Of each output: is a last softmax or sigmoid left out of it?"""
        if not self.terms:
            return False
        by_place = {term.places[1]: term.as_logits for term in self.terms}
        return tuple(by_place.get(place, False) for place in range(len(self.names)))

    @property
    def term(self) -> Term | None:
        """That of the only output; None where there are several."""
        return self.terms[0] if len(self.terms) == 1 else None

    @property
    def classifies(self) -> bool:
        """Does the only output tell classes, so that accuracy means something?"""
        return self.term is not None and self.term.accuracy is not None

    def with_extra(
        self, targets: Any, outputs: Any, smoothing: Any
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """(losses [batch], accuracies [batch], [batch, extra]), all float32."""
        rows = leaves(targets)[0].shape[0]
        losses, accuracies = [], []
        for term in self.terms:
            given = leaves(outputs)[term.places[1]]
            given = tf.cast(given, tf.float32) if term.is_default else given
            pair = leaves(targets)[term.places[0]], given
            found = term.loss(*pair, smoothing)
            losses.append(check_shape(found, [rows], "the loss function", EACH))
            if term.accuracy:
                accuracies.append(tf.cast(term.accuracy(*pair), tf.float32))
        if self.terms:
            weights = [term.weight for term in self.terms]
            total = tf.add_n(
                [x if w == 1.0 else w * x for w, x in zip(weights, losses, strict=True)]
            )
        else:
            found = called(self._whole, targets, outputs, "the loss function")
            total = check_shape(found, [rows], "the loss function", EACH)
        extra = [*losses, *accuracies] if len(self.terms) > 1 else []
        shares = self.squash(outputs) if self._batch_metrics else None
        for name, metric in self._batch_metrics.items():
            found = called(metric, targets, shares, f"the metric {name}")
            extra.append(tf.cast(found, tf.float32))
        columns = tf.stack(extra, axis=1) if extra else tf.zeros([rows, 0])
        accuracy = accuracies[0] if self.classifies else tf.zeros([rows])
        return total, accuracy, columns

    def squash(self, outputs: Any) -> Any:
        """The outputs with probabilities in the place of logits."""
        values = leaves(outputs)
        for term in self.terms:
            place = term.places[1]
            if term.as_logits:
                is_sigmoid = term.activation == "sigmoid"
                values[place] = (tf.sigmoid if is_sigmoid else tf.nn.softmax)(values[place])
        return filled(outputs, values)

    def unsquash(self, shares: Any) -> Any:
        """The logits of probabilities, as the loss takes them."""
        values = leaves(shares)
        for term in self.terms:
            if term.as_logits:
                place = term.places[1]
                values[place] = logits_of(values[place], term.activation)
        return filled(shares, values)

    def mixed(self, targets: Any, share: tf.Tensor) -> Any:
        """The targets of mixed examples: of classes the shares that each has."""
        values = leaves(targets)
        for term in self.terms:
            place = term.places[0]
            own = values[place]
            if term.target.kind == "classes" and term.loss is not binary_cross_entropy:
                own = tf.one_hot(own, self._widths[term.places[1]])
            values[place] = mixed(tf.cast(own, tf.float32), share)
        return filled(targets, values)

    def check_mixing(self, how: Sequence[str]) -> None:
        """Raises UserError where the loss cannot take the targets of mixed examples."""
        named = ", ".join(how)
        if self._batch_metrics and any(term.target.kind == "classes" for term in self.terms):
            raise UserError(
                f"{named}: makes shares of class numbers, which the metric "
                f"{next(iter(self._batch_metrics))} may not take; leave one of them out"
            )
        if not self.terms:
            raise UserError(f"{named}: {self.text} takes all targets, and mixes none")
        for term in self.terms:
            if term.target.kind == "classes" and not term.is_default:
                raise UserError(
                    f"{named}: makes shares of class numbers, which the loss {term.text} does not "
                    "take; leave the loss out"
                )
            if term.target.shape and term.target.kind == "classes" and "cutmix" in how:
                raise UserError(f"{named}: does not cut the masks that the targets are")


PROBED = (5, 7)  # rows that a metric is tried on


def _is_by_example(metric: Any, targets: Any, outputs: Any) -> bool:
    """Does a metric give a value for each example, from tensors?"""

    def gives_one_for_each(rows: int) -> bool:
        specs = [
            filled(nest, [tf.TensorSpec([rows, *x.shape[1:]], x.dtype) for x in leaves(nest)])
            for nest in (targets, outputs)
        ]
        made = tf.function(metric, autograph=False).get_concrete_function(*specs)
        return [tuple(x.shape) for x in leaves(made.structured_outputs)] == [(rows,)]

    try:
        return all(map(gives_one_for_each, PROBED))
    except Exception:  # whatever a function of NumPy's does with a tensor
        return False


def _term(
    name: str,
    loss: Any,
    weight: float,
    target: Target,
    shape: tuple | None,
    squashed: str,
    places: tuple[int, int],
) -> Term:
    """The part of the loss of one output; `squashed` is the softmax or sigmoid that it ends in."""
    if loss is not None:
        found = as_function(loss)
        if target.kind == "classes" and shape is not None and shape[-1] == target.classes:
            accuracy: Callable | None = class_accuracy
        else:
            accuracy = _accuracy_of_own(loss, target, shape, squashed)
        return Term(
            name,
            text_of(loss),
            found,
            weight,
            False,
            "",
            accuracy,
            target,
            places,
            is_default=False,
            is_keras=found.func is of_keras,
        )
    if target.kind == "values":
        return Term(
            name,
            "squared error",
            lambda targets, outputs, _: squared_error(targets, outputs),
            weight,
            False,
            "",
            None,
            target,
            places,
        )
    is_binary = target.kind == "classes" and target.classes == 2 and _is_one(shape, target)
    if target.kind == "labels" or is_binary:
        return Term(
            name,
            "binary cross-entropy",
            binary_cross_entropy,
            weight,
            squashed != "softmax",
            "sigmoid",
            binary_accuracy,
            target,
            places,
        )
    is_sigmoid = squashed == "sigmoid"
    found = functools.partial(cross_entropy, sigmoid=is_sigmoid)
    text = "binary cross-entropy of each class" if is_sigmoid else "cross-entropy"
    activation, accuracy = squashed or "softmax", class_accuracy
    return Term(name, text, found, weight, True, activation, accuracy, target, places)


def logits_of(shares: tf.Tensor, activation: str) -> tf.Tensor:
    """The logits that the activation makes these probabilities of."""
    shares = tf.clip_by_value(shares, 1e-30, 1.0 - 2.0**-24)
    if activation == "sigmoid":
        return tf.math.log(shares) - tf.math.log1p(-shares)
    return tf.math.log(shares)


def class_accuracy(labels: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """[batch]: 1 where the largest output is that of the class, else 0; the mean over places."""
    guesses = tf.argmax(outputs, axis=-1)
    if len(labels.shape) == len(outputs.shape) and labels.shape[-1] == outputs.shape[-1]:
        labels = tf.argmax(labels, axis=-1)
    labels = tf.reshape(tf.cast(labels, tf.int64), tf.shape(guesses))
    return over_places(tf.cast(tf.equal(guesses, labels), tf.float32))


def binary_accuracy(labels: tf.Tensor, outputs: tf.Tensor, threshold: float = 0.0) -> tf.Tensor:
    """[batch]: the share of an example's labels that lie on the output's side of the threshold."""
    labels = tf.reshape(labels, tf.shape(outputs))
    is_right = tf.equal(outputs > threshold, tf.cast(labels, tf.float32) > 0.5)
    return over_places(tf.cast(is_right, tf.float32))


def output_names(model: Any, outputs: Any) -> list[str]:
    """The names of the outputs, in the order of their leaves."""
    names = [name for name, _ in named_leaves(outputs)]
    given = list(getattr(model, "output_names", None) or [])
    is_flat = isinstance(outputs, (list, tuple)) and len(given) == len(names) > 1
    return given if is_flat else names


def _pairs(
    outputs: Sequence[str], kinds: Mapping[str, Target], in_order: bool
) -> list[tuple[str, Target, tuple[int, int]]]:
    """(output, target, (place of the target, of the output)), in the order of the outputs."""
    targets = list(kinds)
    if len(outputs) == len(targets) == 1:
        return [(outputs[0], kinds[targets[0]], (0, 0))]
    if set(outputs) == set(targets):
        pairs = [(name, name) for name in outputs]
    elif in_order and len(outputs) == len(targets) and all(map(str.isdecimal, targets)):
        pairs = list(zip(outputs, targets, strict=True))
    else:
        raise UserError(
            f"the model gives {_names(outputs)}, the data have {_names(targets, 'targets')}; give "
            "a dict of targets by the names of the outputs, or a loss that takes both as they are"
        )
    return [
        (output, kinds[target], (targets.index(target), outputs.index(output)))
        for output, target in pairs
    ]


def _names(names: Sequence[str], noun: str = "outputs") -> str:
    if len(names) == 1 and not names[0]:
        return f"one array of {noun}" if noun == "targets" else "one output"
    return f"the {noun} {names_text(names)}"


def _is_one(shape: tuple | None, target: Target) -> bool:
    """Is there one output for each place of the target?"""
    return shape is not None and shape[1:] in (target.shape, (*target.shape, 1))


def _takes_nests(loss: Any, names: Sequence[str]) -> bool:
    """Is the loss a function of all targets and outputs together?"""
    is_function = callable(loss) and not isinstance(loss, keras.losses.Loss)
    return is_function and len(names) > 1 and not is_keras_function(loss)


def _accuracy_of_own(
    loss: Any, target: Target, shape: tuple | None, squashed: str
) -> Callable | None:
    """The accuracy with a loss of one's own, where it is plain how its outputs tell classes."""
    if shape is None or target.kind == "values":
        return None
    if target.kind == "shares" and shape[1:] == target.shape:
        return class_accuracy
    is_binary = target.kind == "classes" and target.classes == 2 and _is_one(shape, target)
    is_known = text_of(loss).lower().replace("_", "") in ("binarycrossentropy", "bce")
    if is_known and (is_binary or (target.kind == "labels" and shape[1:] == target.shape)):
        own = getattr(loss, "_fn_kwargs", None) or getattr(loss, "keywords", None) or {}
        from_logits = own.get("from_logits", False)
        return functools.partial(binary_accuracy, threshold=0.0 if from_logits else 0.5)
    return None


def check_outputs(objective: Objective, outputs: Any) -> None:
    """Raises UserError where the default loss cannot compare an output with its targets."""
    for term in objective.terms:
        shape = tuple(leaves(outputs)[term.places[1]].shape[1:])
        target, name = term.target, f" {term.name}" if term.name else ""
        if not term.is_default:
            continue
        per_place = (*target.shape, target.classes)
        if target.kind in ("shares", "labels"):
            fits = shape == target.shape
        elif target.kind == "values":
            fits = shape in (target.shape, (*target.shape, 1)) or (*shape, 1) == target.shape
        else:
            is_binary = target.classes == 2 and _is_one((None, *shape), target)
            is_wide = shape[:-1] == target.shape and shape[-1:] >= (target.classes,)
            fits = is_binary or is_wide
        if fits:
            continue
        found = f"the model gives outputs{name} of shape {shape}"
        if target.kind == "classes" and not target.shape:
            raise UserError(f"{found} for an example; the data have {target.classes} classes")
        expected = per_place if target.kind == "classes" else target.shape
        raise UserError(
            f"{found} for an example; the targets{name} are {shape_text(target.shape) or 'one'} "
            f"{target.kind}, which take {expected}"
        )
