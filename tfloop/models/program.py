"""A Keras model as a list of calls, in Keras's own order, whatever it is nested of.

A `keras.Sequential` and a functional model are graphs of operations; each may lie in the other, to
any depth. `program_of` writes such a model down flat: one `Call` after the other, each from values
that are there already. The forward passes go through that list. What shows no graph (a subclass
with a `call` of its own, a tf.Module) has no program and is called whole.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src.models import Functional


class Call(NamedTuple):
    """One operation of a model, called once."""

    name: str  # of its layer; a layer that is called again gets a number
    order: int  # how many operations come before it; what it draws at random depends on this
    operation: Callable
    inputs: tuple[int, ...]  # numbers of values
    outputs: tuple[int, ...]
    by_rows: bool  # is each row of the outputs that of one row of the batch?
    arguments: Callable  # the values of the inputs → (args, kwargs) of the operation


class Program(NamedTuple):
    """The calls of a model, from its inputs, the values from 0 on, to its outputs.

    Attributes:
      calls: in their order.
      shapes: of each value, None for the rows of the batch.
      inputs: how many there are.
      enter: a nest of inputs → the values from 0 on.
      outputs: the numbers of the values that the model gives.
      pack: the values of the outputs → the nest that the model gives.
      readers: by value, the places of the calls that read it; an output is read once more.
      squashed: for each output (place, activation) of the call whose softmax or sigmoid it ends in,
        where nothing else reads it; None where it ends in neither.
    """

    calls: tuple[Call, ...]
    shapes: dict[int, tuple]
    inputs: int
    enter: Callable
    outputs: tuple[int, ...]
    pack: Callable
    readers: dict[int, tuple[int, ...]]
    squashed: tuple[tuple[int, str] | None, ...]


def program_of(model: Any) -> Program | None:
    """The program of a model, of any number of inputs and outputs; None where it shows no graph."""
    if graph_of(model) is None:
        return None
    return _write(model)  # anew: a model may have been changed, and one that is kept is never freed


class InputChange:
    """What a model does to its inputs before its first layer: types, and the number of axes."""

    def __init__(self, model: Any, graph: Functional) -> None:
        self._model, self._graph = model, graph

    def __call__(self, inputs: Any) -> list[tf.Tensor]:
        """A nest of inputs → a tensor for each of the model's, in its own order."""
        if self._model._convert_input_args:
            policy = self._model.dtype_policy
            convert = functools.partial(
                policy.convert_input,
                autocast=self._model.autocast,
                dtype=self._model.input_dtype,
            )
            inputs = keras.tree.map_structure(convert, inputs)
        return list(self._graph._standardize_inputs(inputs))


def graph_of(model: Any) -> Functional | None:
    """The graph that calling the model goes through; None where its `call` is its own.

    Nor where the model as a whole adds to the loss.
    """
    if getattr(model, "activity_regularizer", None) is not None:
        return None
    if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        return model._functional
    if isinstance(model, Functional) and type(model).call is Functional.call:
        return model
    return None


def _write(model: Any) -> Program:
    graph = graph_of(model)
    assert graph is not None
    writer = _Writer([x.shape for x in graph.inputs])
    outputs = writer.inline(model, list(range(len(graph.inputs))))
    calls = tuple(writer.calls)
    readers: dict[int, list[int]] = {}
    for place, call in enumerate(calls):
        for value in call.inputs:
            readers.setdefault(value, []).append(place)
    for output in outputs:
        readers.setdefault(output, []).append(len(calls))
    by_value = {value: tuple(places) for value, places in readers.items()}
    squashed = [_find_squashed(calls, output, by_value) for output in outputs]
    return Program(
        calls,
        writer.shapes,
        len(graph.inputs),
        _entering(model, graph),
        tuple(outputs),
        functools.partial(_packed, graph._outputs_struct),
        by_value,
        tuple(squashed),
    )


def _entering(model: Any, graph: Functional) -> Callable:
    """(a nest of inputs) → a tensor for each of the model's.

    One tensor that goes to one input is left as it is; a call of its own changes it where the model
    does.
    """

    def enter(inputs: Any) -> list[tf.Tensor]:
        if len(graph.inputs) == 1 and tf.is_tensor(inputs):
            return [inputs]
        return InputChange(model, graph)(inputs)

    return enter


def _packed(struct: Any, values: list[tf.Tensor]) -> Any:
    """What Keras makes of the outputs: one of one is no list."""
    packed = keras.tree.pack_sequence_as(struct, values)
    is_one = isinstance(packed, (list, tuple)) and len(packed) == 1
    return packed[0] if is_one else packed


class _Writer:
    def __init__(self, shapes: list[tuple]) -> None:
        """Make one, for a model whose inputs have these shapes."""
        self.calls: list[Call] = []
        self.shapes: dict[int, tuple] = dict(enumerate(shapes))
        self._taken = set[str]()
        self._values, self._operations = len(shapes), 0

    def inline(self, model: Any, values: list[int], node: Any = None) -> list[int]:
        """Write down the calls of a model; the numbers of its outputs, from those of its inputs.

        Args:
          model: one that shows its graph.
          values: the numbers of its inputs.
          node: of the call in the model around it; None for the batch of a step.
        """
        graph = graph_of(model)
        assert graph is not None
        if _changes_input(model, graph, node):
            values = self._change(model, graph, values, node)
        numbers = {id(x): value for x, value in zip(graph.inputs, values, strict=True)}
        depths = sorted(graph._nodes_by_depth, reverse=True)
        for node in (node for depth in depths for node in graph._nodes_by_depth[depth]):
            tensors = node.arguments.keras_tensors
            if node.is_input or not all(id(x) in numbers for x in tensors):
                continue
            inputs = [numbers[id(x)] for x in tensors]
            inner = graph_of(node.operation)
            if inner is not None and len(inner.inputs) == len(inputs):
                outputs = self.inline(node.operation, inputs, node)
            else:
                outputs = self._add(node, inputs)
            numbers.update(zip(map(id, node.outputs), outputs, strict=True))
        return [numbers[id(x)] for x in graph.outputs]

    def _add(self, node: Any, inputs: list[int]) -> list[int]:
        outputs = [self._values + i for i in range(len(node.outputs))]
        self._values += len(outputs)
        self.shapes.update(zip(outputs, (x.shape for x in node.outputs), strict=True))
        given = node.arguments.keras_tensors
        rows = self.shapes[0][0]  # None, or the batch that the model was built with
        by_rows = all(x.shape and x.shape[0] == rows for x in node.outputs)
        if not isinstance(node.operation, keras.layers.Layer):  # keras.ops: rows go with rows
            by_rows = by_rows and len({len(x.shape) for x in given}) == 1
        ids = [id(x) for x in given]

        def arguments(values: list[tf.Tensor]) -> tuple[tuple, dict]:
            return node.arguments.fill_in(dict(zip(ids, values, strict=True)))

        call = Call(
            self._name(node.operation),
            self._operations,
            node.operation,
            tuple(inputs),
            tuple(outputs),
            by_rows,
            arguments,
        )
        self.calls.append(call)
        self._operations += 1
        return outputs

    def _change(self, model: Any, graph: Functional, values: list[int], node: Any) -> list[int]:
        """A call that changes the inputs as the model does before its first layer."""
        outputs = [self._values + i for i in range(len(graph.inputs))]
        self._values += len(outputs)
        self.shapes.update(zip(outputs, (x.shape for x in graph.inputs), strict=True))
        ids = [id(x) for x in node.arguments.keras_tensors] if node else []

        def arguments(tensors: list[tf.Tensor]) -> tuple[tuple, dict]:
            if not node:
                return (tensors[0],), {}
            args, kwargs = node.arguments.fill_in(dict(zip(ids, tensors, strict=True)))
            return (args[0] if args else kwargs["inputs"],), {}

        change, name = InputChange(model, graph), self._name(model, "input")
        call = Call(name, -1, change, tuple(values), tuple(outputs), True, arguments)
        self.calls.append(call)
        return outputs

    def _name(self, operation: Any, ending: str = "") -> str:
        name = f"{operation.name}/{ending}" if ending else operation.name
        number, free = 1, name
        while free in self._taken:
            free, number = f"{name}_{number}", number + 1
        self._taken.add(free)
        return free


def _changes_input(model: Any, graph: Functional, node: Any) -> bool:
    """May the model change what it is called with: its type, the number of its axes, its order?

    A model of float32 that begins with a float32 input of images changes nothing of images. Of
    several inputs the whole model's are in order already; a call inside it may name them.
    """
    if len(graph.inputs) != 1:
        return node is not None
    given = node.arguments.keras_tensors[0] if node else None
    dtype, axes = (given.dtype, len(given.shape)) if given is not None else ("float32", 4)
    expected = graph.inputs[0]
    casts = model._convert_input_args and model.compute_dtype != dtype
    return casts or expected.dtype != dtype or len(expected.shape) != axes


def _find_squashed(
    calls: tuple[Call, ...], output: int, readers: dict[int, tuple[int, ...]]
) -> tuple[int, str] | None:
    """The call that makes probabilities of logits, behind which nothing more is changed."""
    makers = {value: place for place, call in enumerate(calls) for value in call.outputs}
    while output in makers:
        place = makers[output]
        call = calls[place]
        if len(call.outputs) != 1 or len(readers[output]) != 1:
            return None
        activation = activation_name(call.operation)
        if len(call.inputs) != 1 or getattr(call.operation, "activity_regularizer", None):
            return None
        if activation:
            return place, activation
        if not _changes_nothing(call.operation):
            return None
        output = call.inputs[0]
    return None


_SOFTMAX = (keras.activations.softmax, keras.ops.softmax, tf.nn.softmax)
_SIGMOID = (keras.activations.sigmoid, keras.ops.sigmoid, tf.nn.sigmoid, tf.sigmoid)


CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


def activation_name(operation: Any) -> str:
    """ "softmax", "sigmoid" or "", of an operation of Keras's own that is one or ends in one."""
    layers, ops = keras.layers, keras.src.ops.nn
    if type(operation) in CONVOLUTIONS and operation.data_format != "channels_last":
        return ""
    if type(operation) in (layers.Dense, layers.Activation, *CONVOLUTIONS):
        inner = operation.activation
        if inner in _SIGMOID:
            return "sigmoid"
        is_layer = type(inner) is layers.Softmax and inner.axis == -1
        return "softmax" if inner in _SOFTMAX or is_layer else ""
    if type(operation) in (layers.Softmax, ops.Softmax) and operation.axis == -1:
        return "softmax"
    return "sigmoid" if type(operation) is ops.Sigmoid else ""


def _changes_nothing(operation: Any) -> bool:
    """Is it no more than another type for what it is given?"""
    is_activation = type(operation) is keras.layers.Activation
    is_linear = is_activation and operation.activation is keras.activations.linear
    return is_linear or type(operation) is keras.layers.Identity
