"""The layers of a model as a table."""

from collections.abc import Sequence

import keras
import tensorflow as tf

from tfloop.models.program import program_of
from tfloop.models.variables import Model, kept_variables, named_variables


def table(model: Model) -> list[tuple[str, str, str, int]]:
    """(layer, output shape, weight shapes, parameters) for each layer, in the order of the calls.

    A dense kernel is (inputs, units). Weights come with the first call of their layer. Of a model
    that shows no graph it is (weight, "", shape, parameters) for each weight.
    """
    program = program_of(model)
    if program is None:
        weights = named_variables(model)[0].items()
        return [(name, "", _text(w.shape), w.shape.num_elements()) for name, w in weights]
    rows, counted = [], set[int]()
    for call in program.calls:
        layer = call.operation
        variables = kept_variables(layer) if isinstance(layer, keras.layers.Layer) else []
        new = [variable for variable in variables if id(variable) not in counted]
        counted.update(map(id, new))
        shapes = ", ".join(f"{variable.name} {_text(variable.shape)}" for variable in new)
        parameters = sum(tf.TensorShape(variable.shape).num_elements() for variable in new)
        rows.append((call.name, _text(program.shapes[call.outputs[0]][1:]), shapes, parameters))
    return rows


def _text(shape: Sequence[int | None]) -> str:
    """ "(576, 70)", and "(70)" where Python would write "(70,)" """
    return "(" + ", ".join(map(str, shape)) + ")"
