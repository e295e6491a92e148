"""One training step, top to bottom: losses → forward_and_backward → train_step.

It serves every mode: compiled, under XLA, eager in a debugger, on a part of a batch, benchmarked.
It returns tensors and touches nothing but the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfloop import models, penalties
from tfloop.data.pipelines import Batch
from tfloop.metrics import Loss
from tfloop.nests import map_leaves
from tfloop.own_functions import check_shape
from tfloop.randomness import Part
from tfloop.state import TrainState
from tfloop.vectors import Vector, blocks_of, count_elements, select


def example_losses(state: TrainState, targets: Any, outputs: Any) -> tf.Tensor:
    """[batch] float32: the loss of each example, from the model's outputs."""
    return judged(state, targets, outputs)[0]


def judged(state: TrainState, targets: Any, outputs: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """What each example is judged by: its loss [batch], its accuracy [batch], more [batch, n].

    All float32; `state.objective.extra` names the columns of the last.
    """
    smoothing = tf.convert_to_tensor(state.hyper["label_smoothing"])
    return state.objective.with_extra(targets, outputs, smoothing)


def model_losses(state: TrainState) -> tf.Tensor:
    """What the layers of a user's own model added to the loss in the last forward pass.

    Keras's model.losses; a float32 scalar.
    """
    added = models.added_losses(state.model)
    total = [tf.cast(tf.reduce_sum(loss), tf.float32) for loss in added]
    return tf.add_n(total) if total else tf.constant(0.0)


FORWARD_SCOPE = "forward"  # of what the layers compute, each in its own scope below


def losses(state: TrainState, data: tf.Tensor, model: tf.Tensor) -> Loss:
    """The loss, term by term, from the mean data loss and the model's own term."""
    kernels = list(state.kernels.values())
    l1 = state.hyper["l1"] * penalties.total(penalties.l1, kernels)
    l2 = state.hyper["l2"] * penalties.total(penalties.l2, kernels)
    custom = custom_penalties(state)
    return Loss(data + l1 + l2 + custom + model, data, l1, l2, custom, model)


def custom_penalties(state: TrainState) -> tf.Tensor:
    """The user's own penalties, summed over the penalised kernels; a float32 scalar."""

    kernels = list(state.kernels.values()) if state.penalties else []
    return penalties.total(own_penalty(state), kernels)


def own_penalty(state: TrainState) -> Callable[[tf.Tensor], tf.Tensor]:
    """kernel → the sum of the user's own penalties."""

    def penalize(kernel: tf.Tensor) -> tf.Tensor:
        values = [
            check_shape(penalty(kernel), [], "a penalty", "one number for the kernel")
            for penalty in state.penalties
        ]
        return tf.add_n(values)

    return penalize


class Pass(NamedTuple):
    """One way forward through the model and back."""

    loss: Loss
    accuracy: tf.Tensor  # 0 where there are no classes
    examples: tf.Tensor  # float32, how many the means are over
    gradients: Vector  # of loss.total, by weight: "conv1/kernel"
    more: tf.Tensor  # [n], means of what else is summed up
    outputs: Any = None  # what the loss is given; None where it was put together from parts


def forward_and_backward(
    state: TrainState,
    batch: Batch,
    part: Part | None = None,
    forward: Callable = models.outputs,
) -> Pass:
    """The loss of a batch, term by term, and its gradients. Changes nothing but moving averages.

    Args:
      state: what is trained.
      batch: on what.
      part: which rows of the step's batch these are, for their randomness; None for all of them.
      forward: `models.outputs`, or with `fast=True` its fast twin.
    """
    with tf.name_scope("input/"):
        key = state.key(part)
        inputs = state.prepared(batch.inputs, key)
        examples = tf.reduce_sum(batch.counts)
    with models.counting(examples):
        with tf.GradientTape() as tape:
            tape.watch(list(state.weights.values()))  # one that was made frozen, too
            with tf.name_scope(FORWARD_SCOPE):
                outputs = state.forward(inputs, forward, training=True, key=key)
            with tf.name_scope("loss/"):
                each, correct, more = judged(state, batch.targets, outputs)
                data, model = data_loss(batch, each), model_losses(state)
                scaled = data + model
                if state.loss_scale is not None:
                    scaled = state.loss_scale * scaled
        with tf.name_scope("backward/"):
            found = state.connected(tape.gradient(scaled, state.weights))
            if state.loss_scale is not None:
                found = {name: _divided(g, state.loss_scale) for name, g in found.items()}
    with tf.name_scope("loss/penalties/"):
        loss, found = penalized(state, data, model, found)
    with tf.name_scope("update/"):
        gradients = Vector.of(found)
    with tf.name_scope("loss/"):
        accuracy, more = mean_over(batch, correct), mean_over(batch, more)
    return Pass(loss, accuracy, examples, gradients, more, outputs)


def _divided(gradient: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.convert_to_tensor(gradient), tf.float32) / scale


def penalized(
    state: TrainState, data: tf.Tensor, model: tf.Tensor, gradients: dict[str, tf.Tensor]
) -> tuple[Loss, dict[str, tf.Tensor]]:
    """The loss with its penalties, and the gradients with theirs.

    On a CPU a penalty whose coefficient is 0 is left out when the step runs. A GPU would be waited
    for to ask for it.
    """
    asks = not has_gpu()
    gradients = {name: tf.convert_to_tensor(g) for name, g in gradients.items()}  # not sparse
    l1, gradients = _with(state, state.hyper["l1"], penalties.l1, gradients, asks)
    l2, gradients = _with(state, state.hyper["l2"], penalties.l2, gradients, asks)
    custom = tf.constant(0.0)
    if state.penalties:
        one = tf.constant(1.0)
        custom, gradients = _with(state, one, own_penalty(state), gradients, asks=False)
    return Loss(data + l1 + l2 + custom + model, data, l1, l2, custom, model), gradients


def has_gpu() -> bool:
    """Does TensorFlow compute on a GPU here?"""
    return bool(tf.config.list_logical_devices("GPU"))


def _with(
    state: TrainState,
    coefficient: tf.Tensor,
    penalty: Callable,
    gradients: dict[str, tf.Tensor],
    asks: bool,
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """(coefficient · penalty, the gradients with its own).

    One penalty at a time, of two summands each: in a branch that is not taken, TensorFlow's memory
    optimizer breaks a sum of three (its temporary variable is made all the same).
    """

    def on() -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        with tf.GradientTape() as tape:
            tape.watch(list(state.kernels.values()))
            value = coefficient * penalties.total(penalty, list(state.kernels.values()))
        own = tape.gradient(value, state.kernels)
        sums = {name: gradients[name] + g for name, g in own.items() if g is not None}
        return value, {**gradients, **sums}

    def off() -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        return tf.constant(0.0), gradients

    if not state.kernels:
        return off()
    return tf.cond(tf.not_equal(coefficient, 0.0), on, off) if asks else on()


def data_loss(batch: Batch, each: tf.Tensor) -> tf.Tensor:
    """Σ w · loss / N, over the N examples of the batch that count: as Keras's fit has it.

    Args:
      batch: has the weights w.
      each: [batch] the loss of each example.
    """
    weight = tf.maximum(batch.sample_weight, 0.0)
    return tf.math.divide_no_nan(tf.reduce_sum(weight * each), tf.reduce_sum(batch.counts))


def mean_over(batch: Batch, values: tf.Tensor) -> tf.Tensor:
    """The mean over the examples that count, of [batch] or [batch, n], whatever they weigh."""
    counts = batch.counts if len(values.shape) == 1 else batch.counts[:, None]
    total = tf.reduce_sum(counts * values, axis=0)
    return tf.math.divide_no_nan(total, tf.reduce_sum(batch.counts))


def to_sums(result: Pass) -> tf.Tensor:
    """[n + 8 + more] float32: the examples, and the examples times all else that a pass tells.

    Such vectors of several parts of a batch can be added up.
    """
    terms = tf.stack([*result.loss, result.accuracy])
    parts = [[1.0], terms, result.more, result.gradients.flat]
    return result.examples * tf.concat(parts, axis=0)


def no_pass(state: TrainState) -> Pass:
    """The pass over no rows, which adds nothing to the others'."""
    zero = tf.constant(0.0)
    gradients = tf.zeros([count_elements(state.weights.values())])
    more = tf.zeros([len(state.objective.extra)])
    loss = Loss(*[zero] * len(Loss._fields))
    return Pass(loss, zero, zero, Vector(gradients, state.weights), more)


def from_sums(sums: tf.Tensor, state: TrainState) -> Pass:
    """The pass over a whole batch, from the sum of its parts' `to_sums`.

    All means are over the examples of the whole batch, and a penalty, which every part has, counts
    once.
    """
    means = tf.math.divide_no_nan(sums[1:], sums[0])
    terms, extra = len(Loss._fields), len(state.objective.extra)
    loss, first = Loss(*tf.unstack(means[:terms])), terms + 1 + extra
    more = means[terms + 1 : first]
    return Pass(loss, means[terms], sums[0], Vector(means[first:], state.weights), more)


def rows_of(batch: Batch, first: tf.Tensor | int, size: int) -> Batch:
    """Some of a batch's rows."""

    def cut(tensor: tf.Tensor) -> tf.Tensor:
        start = [first] + [0] * (len(tensor.shape) - 1)
        return tf.slice(tensor, start, [size, *(-1 if n is None else n for n in tensor.shape[1:])])

    return map_leaves(cut, batch)


def accumulated(grad_fn: Callable, parts: int) -> Callable:
    """`grad_fn` on a batch cut into N parts, one after the other, in the memory of one part.

    The gradient is that of the whole batch, but for layers that look at the batch: batch
    normalisation sees a part. The sizes of parts differ by one row at most; of fewer than N rows
    each is a part.

    Args:
      grad_fn: as `forward_and_backward`.
      parts: N.
    """

    def in_parts(state: TrainState, batch: Batch, part: Part | None = None) -> Pass:
        rows = batch.rows
        whole = part or Part(0, rows, rows)
        small, longer = divmod(rows, parts)

        def add_all(start: int, count: int, size: int, sums: tf.Tensor) -> tf.Tensor:
            """The sums with those of `count` parts of one size, which are traced once."""
            if not count or not size:
                return sums

            def in_rows(tensor: tf.Tensor) -> tf.Tensor:
                own = tensor[start : start + count * size]
                return tf.reshape(own, [count, size, *tensor.shape[1:]])

            cut = map_leaves(in_rows, batch)

            def body(i: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                own = Part(whole.first + start + i * size, size, whole.total)
                result = grad_fn(state, map_leaves(lambda tensor: tensor[i], cut), own)
                return i + 1, sums + to_sums(result)

            begin = tf.constant(0), sums
            return tf.while_loop(lambda i, _: i < count, body, begin, parallel_iterations=1)[1]

        size = count_elements(state.weights.values()) + len(state.objective.extra)
        sums = tf.zeros([size + len(Loss._fields) + 2])
        sums = add_all(0, longer, small + 1, sums)
        sums = add_all(longer * (small + 1), parts - longer, small, sums)
        return from_sums(sums, state)

    return in_parts


class Step(NamedTuple):
    """What one step tells; all tensors."""

    # float64 [SUMS + more]: steps, examples, Σ over the examples of each of Metrics
    sums: tf.Tensor
    learning_rate: tf.Tensor
    gradient: list[tf.Tensor]  # float32, over all weights: the blocks of a Vector
    update: list[tf.Tensor]  # float32, what was added to the weights
    worst: tf.Tensor  # float32, the largest loss of a step

    def after(self, before: "Step") -> "Step":
        """This step with the sums, and the worst loss, of those before it."""
        worst = tf.maximum(self.worst, before.worst)
        return self._replace(sums=before.sums + self.sums, worst=worst)


def no_step(state: TrainState) -> Step:
    """What is told before the first step: zeros, with sums that many steps can be added to."""
    sums = tf.zeros(state.totals.shape, tf.float64)
    sizes = [
        sum(state.weights[name].shape.num_elements() for name in block)
        for block in blocks_of(state.weights)
    ]
    zeros = [tf.zeros([size]) for size in sizes]
    return Step(sums, tf.constant(0.0), zeros, zeros, tf.constant(tf.float32.min))


def train_step(
    state: TrainState,
    batch: Batch,
    grad_fn: Callable = forward_and_backward,
    part: Part | None = None,
) -> Step:
    """One step: forward, loss, backward, update.

    A step whose loss, gradient or update is not finite changes no weight, slot or counter, and
    neither does any step after it: the state stays as it was before, and `state.diverged` tells.

    Args:
      state: what is trained.
      batch: on what.
      grad_fn: `forward_and_backward`, or its twin `debugger.forward_and_backward`, which goes layer
        by layer, or either on parts of the batch (`accumulated`, `Replicas.grad_fn`).
      part: which rows of the step's batch these are, where it lies on several workers.
    """
    with tf.name_scope("augmentation/"):
        batch = state.mixed(batch)
    inputs, targets, sample_weight = batch
    with tf.name_scope("update/"):
        learning_rate = state.schedule(state.schedule_step)
    with tf.name_scope("state/"):
        non_trainable = [tf.identity(variable) for variable in state.non_trainable.values()]
    loss, accuracy, examples, gradients, more, outputs = grad_fn(state, batch, part)
    updates, slots = state.optimizer.updates(gradients, state.weights, learning_rate)

    # One test for all the values that the three hold.
    with tf.name_scope("update/"):
        finite = tf.math.is_finite(loss.total + gradients.norm + updates.norm)
        overflowed = state.overflowed(loss.total, finite)
        valid = finite & ~state.diverged
    state.optimizer.apply(updates, slots, state.weights, valid)
    with tf.name_scope("state/"):
        for variable, before in zip(state.non_trainable.values(), non_trainable, strict=True):
            variable.assign(select(valid, variable, before))
        state.update_ema(valid)
        state.advance(valid, overflowed)

        metrics = tf.concat([tf.stack([*loss, accuracy, gradients.norm]), more], axis=0)
        sums = tf.concat([[1.0, examples], examples * metrics], axis=0)
        sums = tf.cast(select(valid, sums, tf.zeros_like(sums)), tf.float64)
        state.totals.assign_add(sums)
        worst = tf.where(valid, loss.total, tf.float32.min)
    return Step(sums, learning_rate, gradients.blocks, updates.blocks, worst)
