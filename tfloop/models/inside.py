"""What a step computes itself inside a model, wherever the layer lies that it concerns.

Keras calls the layers of a model. Some of them a step answers for: dropout, whose random numbers
come from the position in the data, and batch normalisation, which looks at the rows of all
replicas. Keras's other random layers get their seeds from the position in the data. This holds for
a layer in a graph as for one that a user's own code calls.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import AutocastScope
from keras.src.layers.layer import CallContext

from tfloop.errors import UserError
from tfloop.models.answering import Answers, answering
from tfloop.models.layer_rules import draw_of, over_parts_of
from tfloop.models.names import held_by, keras_layers
from tfloop.models.program import program_of
from tfloop.randomness import Key, Part

# Layers that call others in a loop, once for each place in time. What they draw is left to Keras.
LOOPS = (keras.layers.RNN, keras.layers.TimeDistributed)


_here = threading.local()  # replicas are traced in threads that take turns


class Activation(NamedTuple):
    """What a layer gave."""

    name: str
    layer: Any  # Keras's, or another operation of the graph, or the model
    value: tf.Tensor


class Inside:
    """One forward pass, as the layers in it are computed.

    Attributes:
      at: (order, operation) of the program's call that is being made.
    """

    def __init__(
        self, model: Any, training: bool, key: Key | None, seen: list[Activation] | None = None
    ) -> None:
        self.at: tuple[int, Any] = (0, model)
        self._model, self._training, self._key, self._seen = model, training, key, seen
        self._drawn = 0
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()

    @contextlib.contextmanager
    def entered(self) -> Iterator["Inside"]:
        """In this block the layers of the model are computed as this pass wants it."""
        answers, added = self._answers(), list[tf.Tensor]()

        def add_loss(own: Callable, loss: Any) -> None:
            own(loss)
            added.extend(keras.tree.flatten(loss))

        for layer in keras_layers(self._model):
            answers[layer, "add_loss"] = add_loss
        if self._key:
            self._seed()
        _here.added = added  # of this replica alone; Keras's own list is that of all
        with answering(answers):
            yield self

    def call_whole(self, function: Any, x: Any) -> Any:
        """What a layer or model gives, told whether it is trained where it takes that."""
        if isinstance(function, keras.layers.Layer):
            return function(x, training=self._training)
        call = _untraced(type(function).__call__)
        bound = functools.partial(call, function) if call else function
        if not _takes_training(function):
            return bound(x)
        return _told(bound, self._training, x)

    def _seed(self) -> None:
        """Give Keras's layers their seeds, but for those that this pass draws for."""
        generators = seed_generators(self._model)
        if not generators:
            return
        # What is called whole may loop over a layer, in which Keras draws.
        whole = {
            id(layer) for called in _called_whole(self._model) for layer in keras_layers(called)
        }
        drawn = [
            layer
            for layer in _outside_loops(self._model)
            if draw_of(layer) and id(layer) not in whole
        ]
        left = {id(generator) for layer in drawn for generator in layer._seed_generators}
        for number, generator in enumerate(generators):
            if id(generator) not in left:
                self._seed_one(number, generator)

    @functools.cached_property
    def _kerass(self) -> set[int]:
        """The ids of the generators that Keras's own layers hold."""
        layers = keras_layers(self._model)
        own = [x for x in layers if type(x).__module__.startswith("keras.")]
        return {id(generator) for x in own for generator in x._seed_generators}

    def _seed_one(self, number: int, generator: keras.random.SeedGenerator) -> None:
        """The seed of the model's generator of this number: a function of the step's key."""
        assert self._key is not None
        key = self._key.fold_in(-2)
        if self._key.part and id(generator) not in self._kerass:
            key = key.fold_in(self._key.part.first)  # what draws for a part as if it were all
        bits = key.bits(number)
        generator.state.assign(tf.cast(bits, generator.state.dtype))

    def _answers(self) -> Answers:
        answers: Answers = {}
        noted = self._noted() if self._seen is not None else {}
        for layer in _outside_loops(self._model):
            answer = self._answer(layer) if self._training else None
            if call := _untraced(type(layer).call):
                answer = functools.partial(_as_it_is, functools.partial(call, layer))
            if name := noted.get(layer):
                answer = self._noting(name, layer, answer)
            if answer:
                answers[layer, "call"] = answer
        return answers

    def _answer(self, layer: keras.layers.Layer) -> Callable | None:
        """What stands in for the layer's `call`, given that first; None where nothing does."""
        if over_parts := over_parts_of(layer):

            def normalize(
                call: Callable, inputs: tf.Tensor, training: bool = False, mask: Any = None
            ) -> tf.Tensor:
                if not training:
                    return call(inputs, training=training, mask=mask)
                with AutocastScope(None):
                    return over_parts(layer, [inputs], mask)[0]

            return normalize
        if self._key is None:
            return None
        if draw := draw_of(layer):

            def drop(call: Callable, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
                key = self._key_for(layer)
                if not training or self._is_in_loop():
                    return call(inputs, training=training)
                if _has_rows_of(key.part, inputs):
                    return draw(layer, inputs, key)
                for number, generator in enumerate(seed_generators(self._model)):
                    if generator in layer._seed_generators:
                        self._seed_one(number, generator)
                return call(inputs, training=training)

            return drop
        is_cut = self._key.part is not None and self._key.part.rows != self._key.part.total
        return self._over_whole if is_cut and _draws_itself(layer) else None

    def _is_in_loop(self) -> bool:
        """Is it traced into a loop of the user's own, where one number would do for all turns?"""
        if tf.executing_eagerly() or self._graph is None:
            return False
        return tf.compat.v1.get_default_graph() is not self._graph

    def _key_for(self, layer: keras.layers.Layer) -> Key:
        assert self._key is not None
        order, operation = self.at
        if layer is operation:
            return self._key.fold_in(order)
        self._drawn += 1
        return self._key.fold_in(order, self._drawn)

    def _over_whole(self, call: Callable, *arguments: Any, **options: Any) -> Any:
        """A part's share of what Keras's layer would draw for the whole batch."""
        first = arguments[0] if arguments else next(iter(options.values()), ())
        part, tensors = self._key.part if self._key else None, keras.tree.flatten(first)
        if part is None or not tensors:
            return call(*arguments, **options)
        if not all(tf.is_tensor(x) and _has_rows_of(part, x) for x in tensors):
            return call(*arguments, **options)
        rows, tree = tensors[0].shape[0], keras.tree

        def widen(value: Any) -> Any:
            return _in_whole(part, value) if _is_cut_with(rows, value) else value

        def narrow(value: Any) -> Any:
            if not _is_cut_with(part.total * each, value):
                return value
            first = [part.first * each] + [0] * (len(value.shape) - 1)
            return tf.slice(value, first, [rows, *value.shape[1:]])

        each = rows // part.rows
        arguments, options = tree.map_structure(widen, (arguments, options))
        return tree.map_structure(narrow, call(*arguments, **options))

    def _noted(self) -> dict[Any, str]:
        """The layers inside what the program calls whole, by name."""
        operations = _called_whole(self._model)
        noted: dict[Any, str] = {}
        for operation in operations:
            prefix = "" if operation is self._model else f"{operation.name}/"
            for layer in keras_layers(operation):
                if layer is not operation and is_leaf(layer):
                    noted.setdefault(layer, f"{prefix}{layer.name}")
        return noted

    def _noting(self, name: str, layer: keras.layers.Layer, answer: Callable | None) -> Callable:
        def noted(call: Callable, *arguments: Any, **options: Any) -> Any:
            outputs = answer(call, *arguments, **options) if answer else call(*arguments, **options)
            if tf.is_tensor(outputs) and outputs.dtype.is_floating and self._seen is not None:
                self._seen.append(Activation(name, layer, outputs))
            return outputs

        return noted


def _called_whole(model: Any) -> list[Any]:
    """The operations of a model's program that call layers of their own; or the model."""
    program = program_of(model)
    if program is None:
        return [model]
    layers = (call.operation for call in program.calls)
    return [layer for layer in layers if not is_leaf(layer)]


def is_leaf(layer: Any) -> bool:
    """Does the layer call no others, or only in a loop over time?"""
    return not getattr(layer, "_layers", None) or isinstance(layer, LOOPS)


def _has_rows_of(part: Part | None, x: tf.Tensor) -> bool:
    """Does x have so many rows for each row of the batch, known before it is computed?"""
    if not x.shape.is_fully_defined():
        return False
    return part is None or (part.rows > 0 and x.shape[0] % part.rows == 0)


def _in_whole(part: Part, x: tf.Tensor) -> tf.Tensor:
    """The rows of a part in their place in the whole batch, among zeros."""
    each = x.shape[0] // part.rows
    before = part.first * each
    padding = [[before, (part.total - part.rows) * each - before]] + [[0, 0]] * (len(x.shape) - 1)
    return tf.ensure_shape(tf.pad(x, padding), [part.total * each, *x.shape[1:]])


def _is_cut_with(rows: int, value: Any) -> bool:
    """Is it a tensor with so many rows, such as a mask?"""
    return bool(tf.is_tensor(value) and value.shape.rank and value.shape[0] == rows)


def _outside_loops(model: Any) -> list[keras.layers.Layer]:
    layers = keras_layers(model)
    loops = (layer for layer in layers if isinstance(layer, LOOPS))
    inside = {id(inner) for loop in loops for inner in loop._flatten_layers(include_self=False)}
    return [layer for layer in layers if id(layer) not in inside]


def _draws_itself(layer: keras.layers.Layer) -> bool:
    """Does Keras's layer draw from seeds of its own, or a layer that it calls in a loop?"""
    if not type(layer).__module__.startswith("keras."):
        return False
    layers = layer._flatten_layers() if isinstance(layer, LOOPS) else [layer]
    return any(inner._seed_generators and _may_draw(inner) for inner in layers)


def _may_draw(layer: keras.layers.Layer) -> bool:
    """Not where all its rates are 0, as those of most recurrent cells."""
    rates = [getattr(layer, name, None) for name in ("rate", "dropout", "recurrent_dropout")]
    known = [rate for rate in rates if isinstance(rate, (int, float))]
    return any(known) if known else True


def seed_generators(model: Any) -> list[keras.random.SeedGenerator]:
    """Every SeedGenerator in a model, once, in Keras's order."""
    found: dict[int, keras.random.SeedGenerator] = {}
    for layer in keras_layers(model):
        found.update((id(generator), generator) for generator in layer._seed_generators)
    held = (model, *vars(model).values()) if isinstance(model, keras.Model) else held_by(model)
    found.update((id(x), x) for x in held if isinstance(x, keras.random.SeedGenerator))
    return list(found.values())


@contextlib.contextmanager
def as_one_call(model: Any, training: bool) -> Iterator[None]:
    """Keras takes all calls of layers in this block for parts of one call of the model.

    So what a layer adds to the loss stays when the layer is called again.
    """
    context = CallContext(entry_layer=model)
    context.set_value("training", training)
    for layer in keras_layers(model):
        layer._clear_losses()
    outer = global_state.get_global_attribute("current_call_ctx")
    global_state.set_global_attribute("current_call_ctx", context)
    try:
        yield
    finally:
        global_state.set_global_attribute("current_call_ctx", outer)


def added_losses(model: Any) -> list[tf.Tensor]:
    """What layers added to the loss in this thread's last forward pass, and their regularizers."""
    layers = keras_layers(model)
    weights = {id(v): v for layer in layers for v in layer.trainable_weights if v.regularizer}
    return [*getattr(_here, "added", []), *(v.regularizer(v) for v in weights.values())]


def _told(function: Callable, training: bool, *arguments: Any, **options: Any) -> Any:
    """What the function gives, told of training unless what it hands that on to takes no such."""
    added = getattr(_here, "added", [])
    before = len(added)
    try:
        return function(*arguments, **{"training": training, **options})
    except TypeError as error:
        if "unexpected keyword argument 'training'" not in str(error):
            raise
        del added[before:]
        return function(*arguments, **options)


def _untraced(method: Any) -> Callable | None:
    """The Python behind a method under tf.function, whose trace would keep an older step's numbers.

    None for a method that is no tf.function.
    """
    python = getattr(method, "python_function", None)
    if python is None or tf.executing_eagerly():
        return python
    return tf.autograph.to_graph(python)


def _as_it_is(call: Callable, own: Callable, *arguments: Any, **options: Any) -> Any:
    return call(*arguments, **options)


def _takes_training(function: Any) -> bool:
    """Does a callable that is no Keras layer take `training`, by name or among others?"""
    parameters = inspect.signature(function.__call__).parameters
    return "training" in parameters or _has_others(parameters)


def _has_others(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return inspect.Parameter.VAR_KEYWORD in (p.kind for p in parameters.values())


def check_training(model: Any) -> None:
    """Raises UserError where a model, or a layer in it, has another word for `training`."""
    calls = {type(layer).__name__: type(layer).call for layer in keras_layers(model)}
    if not isinstance(model, keras.layers.Layer):
        calls[type(model).__name__] = type(model).__call__
    for name, call in calls.items():
        parameters = inspect.signature(call).parameters
        if "is_training" in parameters and "training" not in parameters:
            raise UserError(
                f"{name}.{call.__name__} takes is_training; name it training, which is what the "
                "loop tells a model"
            )
