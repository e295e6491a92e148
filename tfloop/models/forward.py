"""The forward pass of any model.

A model here is a keras.Model, or a tf.Module that is callable and has trainable variables. One that
shows its graph (`program`) is gone through call by call, in Keras's own order, so that each
activation can be seen and the last softmax or sigmoid is folded into the loss. Any other is called
as it is; what its Keras layers give can be seen there, too.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tfloop.models import fast as fast_pass
from tfloop.models import inside
from tfloop.models.inside import Activation, Inside
from tfloop.models.layer_rules import is_by_example, over_parts_of
from tfloop.models.parts import join, mask_of, split, with_masks_of
from tfloop.models.program import CONVOLUTIONS, Call, InputChange, Program, program_of
from tfloop.models.variables import Model
from tfloop.nests import is_leaf, map_leaves
from tfloop.randomness import Key

AsLogits: TypeAlias = "bool | Sequence[bool]"
OUTPUTS = "outputs"  # the name of the last activation, where there are several outputs


def outputs(
    model: Model,
    inputs: Any,
    training: bool = False,
    key: Key | None = None,
    as_logits: AsLogits = True,
    *,
    fast: bool = False,
    shards: int = 1,
) -> Any:
    """[batch, …]: what the model gives, in 32 bits or more; a nest of several outputs.

    Args:
      model: is gone through call by call where it shows its graph, and else called whole.
      inputs: a nest of tensors [batch, …], as the model takes them.
      training: as Keras's argument.
      key: the seed of this step's randomness; needed in training where the model draws.
      as_logits: leave out a last softmax or sigmoid that the graph shows (`output_activations`), of
        all outputs, or a choice for each.
      fast: rearrange what is computed, as `fast` says.
      shards: parts of the batch to compute side by side.
    """
    program, pass_ = program_of(model), Inside(model, training, key)
    with pass_.entered(), _one_call(model, program, training):
        if program is None:
            return _wide_all(pass_.call_whole(model, inputs))
        walk = _Walk(program, pass_, training, as_logits, fast)
        for _ in walk.through(inputs, shards):
            pass
        return _wide_all(walk.result)


def activations(
    model: Model,
    inputs: Any,
    training: bool = False,
    key: Key | None = None,
    as_logits: AsLogits = True,
    *,
    fast: bool = False,
    shards: int = 1,
) -> Iterator[Activation]:
    """Yields what each layer gave, from the first one on.

    A layer that is called again gets a number. Where a model is called whole, its layers come once
    that is done. The last is what `outputs` gives; of several outputs it is their nest, with the
    model as its layer. With `fast`, what a layer gives is left out where it is computed in one
    with the next. Arguments as those of `outputs`.
    """
    taken = set[str]()

    def named(activation: Activation) -> Activation:
        name, number = activation.name, 1
        while name in taken:
            name, number = f"{activation.name}_{number}", number + 1
        taken.add(name)
        return activation._replace(name=name)

    program, seen = program_of(model), list[Activation]()
    pass_ = Inside(model, training, key, seen)
    with pass_.entered(), _one_call(model, program, training):
        if program is None:
            found = pass_.call_whole(model, inputs)
            if not seen or seen[-1].value is not found:
                seen.append(Activation(getattr(model, "name", "model"), model, found))
            last = seen.pop()
            yield from map(named, seen)
        else:
            walk = _Walk(program, pass_, training, as_logits, fast)
            is_one = len(program.outputs) == 1 and is_leaf(program.pack([0]))
            for place, call in walk.through(inputs, shards):
                if call.outputs[0] in walk.merged:
                    continue
                inner, seen[:] = seen[:], []
                own = [walk.activation(call, number) for number in range(len(call.outputs))]
                shown = [a for a in (*inner, *own) if a.value.dtype.is_floating]
                if is_one and place == len(program.calls) - 1:
                    last = shown.pop()
                yield from map(named, shown)
            if not is_one:
                last = Activation(OUTPUTS, model, walk.result)
        yield named(last)._replace(value=_wide_all(last.value))


def call_alone(model: Model, call: Call, values: list[tf.Tensor], key: Key) -> tf.Tensor:
    """The first output of one call of the model's program, in training, from its inputs' values."""
    program, pass_ = program_of(model), Inside(model, True, key)
    assert program is not None
    with pass_.entered(), _one_call(model, program, True):
        return _Walk(program, pass_, True, False).alone(call, values)


def _wide_all(nest: Any) -> Any:
    return map_leaves(_wide, nest)


def _wide(x: Any) -> Any:
    """In 32 bits, where it has 16."""
    is_short = tf.is_tensor(x) and x.dtype in (tf.float16, tf.bfloat16)
    return tf.cast(x, tf.float32) if is_short else x


def _one_call(
    model: Model, program: Program | None, training: bool
) -> contextlib.AbstractContextManager:
    """Makes one call of what happens inside; Keras does for a model whose `call` is its own."""
    if program is None and isinstance(model, keras.layers.Layer):
        return contextlib.nullcontext()
    return inside.as_one_call(model, training)


class _Walk:
    """Goes through a program. Each value is a list of parts, one for each shard; or one whole."""

    def __init__(
        self,
        program: Program,
        pass_: Inside,
        training: bool,
        as_logits: AsLogits,
        fast: bool = False,
    ) -> None:
        self._program, self._pass, self._training = program, pass_, training
        wanted = [as_logits] * len(program.outputs) if isinstance(as_logits, bool) else as_logits
        self._left_out = {
            squashed[0]
            for squashed, is_wanted in zip(program.squashed, wanted, strict=True)
            if squashed and is_wanted
        }
        self._fast = fast
        self._values: dict[int, list[tf.Tensor]] = {}
        self.merged = set[int]()  # values that are never there: computed in one with the next
        self._sizes: list[int] = []

    def through(self, inputs: Any, shards: int = 1) -> Iterator[tuple[int, Call]]:
        """Makes the calls, one after the other; yields each, with its place, when it was made."""
        program = self._program
        values = program.enter(inputs)
        rows = values[0].shape[0]
        count = min(shards, rows or 1)
        size, longer = divmod(rows or 1, count)
        self._sizes = [size + 1] * longer + [size] * (count - longer)
        self._rows = rows
        if self._fast and (used := fast_pass.used_pixels(program)):
            values = [values[0][:, : used[0], : used[1]]]
        for number, value in enumerate(values):
            self._values[number] = self._split(value)
        for place, call in enumerate(program.calls):
            if call.outputs[0] not in self._values:  # else it went first
                with tf.name_scope(call.name):
                    self._call(place, call)
            yield place, call

    def alone(self, call: Call, values: list[tf.Tensor]) -> tf.Tensor:
        """The first output of a call, from values of its inputs."""
        self._pass.at = call.order, call.operation
        return self._result(call, values)[0]

    @property
    def result(self) -> Any:
        """What the model gives."""
        return self._program.pack([join(self._values[value]) for value in self._program.outputs])

    def activation(self, call: Call, number: int) -> Activation:
        """The output of this number of a call that was made."""
        name = f"{call.name}:{number}" if number else call.name
        value = join(self._values[call.outputs[number]])
        return Activation(name, call.operation, value)

    def _call(self, place: int, call: Call) -> None:
        self._pass.at = call.order, call.operation
        operation, inputs = call.operation, [self._values[value] for value in call.inputs]
        if place in self._left_out:
            self._keep(call, [[_without_activation(operation, x) for x in inputs[0]]])
            return
        pool = fast_pass.pool_behind(self._program, call) if self._fast else None
        if pool:
            pooled = [fast_pass.pool_first(operation, pool.operation, x) for x in inputs[0]]
            self._keep(call, [inputs[0]])  # nothing else reads it
            self.merged.add(call.outputs[0])
            self._keep(pool, [pooled])
            return
        are_cut = all(len(parts) == len(self._sizes) for parts in inputs)
        over_parts = over_parts_of(operation) if self._training else None
        if over_parts and len(self._sizes) > 1 and are_cut:
            behind = fast_pass.activation_behind(self._program, call) if self._fast else None
            activation = behind[1] if behind else ""
            parts = over_parts(operation, inputs[0], mask_of(inputs[0]), activation)
            self._keep(call, [with_masks_of(parts, inputs[0])])
            if behind:  # nothing else reads what is kept for the call itself
                self.merged.add(call.outputs[0])
                self._keep(behind[0], [self._values[call.outputs[0]]])
        elif are_cut and self._goes_by_part(call):
            results = [self._result(call, list(part)) for part in zip(*inputs, strict=True)]
            self._keep(call, [list(parts) for parts in zip(*results, strict=True)])
        else:
            whole = self._result(call, [join(parts) for parts in inputs])
            self._keep(call, [self._split(x) if call.by_rows else [x] for x in whole])

    def _goes_by_part(self, call: Call) -> bool:
        if len(self._sizes) == 1:
            return True
        if isinstance(call.operation, InputChange):
            return True
        return call.by_rows and is_by_example(call.operation, self._training)

    def _result(self, call: Call, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """The outputs of a call, from its inputs."""
        arguments, options = call.arguments(values)
        if "training" in getattr(call.operation, "_call_context_args", ()):
            options = {**options, "training": self._training}
        return keras.tree.flatten(call.operation(*arguments, **options))

    def _keep(self, call: Call, outputs: list[list[tf.Tensor]]) -> None:
        self._values.update(zip(call.outputs, outputs, strict=True))

    def _split(self, x: tf.Tensor) -> list[tf.Tensor]:
        if len(self._sizes) == 1 or x.shape[0] != self._rows:
            return [x]
        return split(x, self._sizes)


def _without_activation(operation: Any, x: tf.Tensor) -> tf.Tensor:
    if type(operation) is keras.layers.Dense:
        x = tf.matmul(fast_pass.cast(x, operation), fast_pass.cast(operation.kernel, operation))
        if operation.bias is None:
            return x
        return tf.nn.bias_add(x, fast_pass.cast(operation.bias, operation))
    if type(operation) in CONVOLUTIONS:
        kernel = fast_pass.cast(operation.kernel, operation)
        x = fast_pass.cast(x, operation)
        if operation.padding == "causal":
            padded = keras.ops.pad(x, operation._compute_causal_padding())
            options = {"strides": operation.strides, "dilation_rate": operation.dilation_rate}
            x = keras.ops.conv(padded, kernel, padding="valid", **options)
        else:
            x = operation.convolution_op(x, kernel)
        return x if operation.bias is None else x + fast_pass.cast(operation.bias, operation)
    return x  # an Activation or Softmax of its own
