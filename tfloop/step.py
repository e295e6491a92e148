"""One training step, top to bottom: losses → forward_and_backward → train_step.

It serves every mode: compiled, under XLA, eager in a debugger, on a part of a batch, benchmarked.
It returns tensors and touches nothing but the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfloop import models, penalties
from tfloop.data.pipelines import Batch
from tfloop.errors import UserError
from tfloop.metrics import SUMS, Loss
from tfloop.randomness import Part
from tfloop.state import TrainState
from tfloop.user_code import told_in_one_line
from tfloop.vectors import Vector, count_elements, select


def example_losses(state: TrainState, labels: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """[batch] float32: the loss of each example, from the model's outputs."""
    if state.loss is not None:
        meaning = "a value for each example of the batch"
        what = f"the loss function fails on labels int64 {labels.shape} and outputs {outputs.shape}"
        with told_in_one_line(what):
            found = state.loss(labels, outputs)
        return _check_shape(found, labels.shape, "the loss function", meaning)
    sigmoid = models.output_activation(state.model) == "sigmoid"
    smoothing = tf.convert_to_tensor(state.hyper["label_smoothing"])
    return cross_entropy(labels, outputs, smoothing, sigmoid)


def cross_entropy(
    labels: tf.Tensor, logits: tf.Tensor, smoothing: tf.Tensor | float, sigmoid: bool = False
) -> tf.Tensor:
    """[batch]: the cross-entropy of each example.

    Softmax: -Σ_k t_k · log p_k. Sigmoid: the mean over k of the binary cross-entropy, as Keras has
    it. The target t is one-hot, smoothed to (1 - s) · t + s / classes, or with sigmoid to
    (1 - s) · t + s / 2.

    Args:
      labels: [batch] int64.
      logits: [batch, classes].
      smoothing: s, the share of each label spread over all classes.
      sigmoid: one sigmoid for each class, in place of a softmax over all.
    """
    classes = logits.shape[-1]
    targets = tf.one_hot(labels, classes, dtype=logits.dtype) * (1.0 - smoothing)
    if sigmoid:
        targets = targets + smoothing / 2.0
        binary = tf.nn.sigmoid_cross_entropy_with_logits(targets, logits)
        return tf.reduce_mean(binary, axis=-1)
    return tf.nn.softmax_cross_entropy_with_logits(targets + smoothing / classes, logits)


def _check_shape(tensor: Any, shape: Any, what: str, meaning: str) -> tf.Tensor:
    if tensor is None:
        raise UserError(f"{what} gives None, expected {tf.TensorShape(shape)}: {meaning}")
    tensor = tf.convert_to_tensor(tensor)
    if not tensor.shape.is_compatible_with(shape):
        raise UserError(f"{what} gives {tensor.shape}, expected {tf.TensorShape(shape)}: {meaning}")
    return tf.cast(tensor, tf.float32)


def model_losses(state: TrainState) -> tf.Tensor:
    """What the layers of a user's own model added to the loss in the last forward pass.

    Keras's model.losses; a float32 scalar.
    """
    added = models.added_losses(state.model)
    total = [tf.cast(tf.reduce_sum(loss), tf.float32) for loss in added]
    return tf.add_n(total) if total else tf.constant(0.0)


def losses(state: TrainState, data: tf.Tensor, model: tf.Tensor) -> Loss:
    """The loss, term by term, from the mean data loss and the model's own term."""
    kernels = list(state.kernels.values())
    l1 = state.hyper["l1"] * penalties.total(penalties.l1, kernels)
    l2 = state.hyper["l2"] * penalties.total(penalties.l2, kernels)
    custom = custom_penalties(state)
    return Loss(data + l1 + l2 + custom + model, data, l1, l2, custom, model)


def custom_penalties(state: TrainState) -> tf.Tensor:
    """The user's own penalties, summed over the penalised kernels; a float32 scalar."""

    def penalize(kernel: tf.Tensor) -> tf.Tensor:
        values = [
            _check_shape(penalty(kernel), [], "a penalty", "one number for the kernel")
            for penalty in state.penalties
        ]
        return tf.add_n(values)

    return penalties.total(penalize, list(state.kernels.values()) if state.penalties else [])


class Pass(NamedTuple):
    """One way forward through the model and back."""

    loss: Loss
    accuracy: tf.Tensor
    examples: tf.Tensor  # float32, Σ sample_weight: how many the means are over
    gradients: Vector  # of loss.total, by weight: "conv1/kernel"
    logits: tf.Tensor | None = None  # [batch, classes]; None where it was put together from parts


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
    key = state.key(part)
    images = state.inputs(batch.images, key)
    examples = tf.reduce_sum(batch.sample_weight)
    with models.counting(examples):
        with tf.GradientTape() as tape:
            tape.watch(list(state.weights.values()))  # one that was made frozen, too
            logits = state.forward(images, forward, training=True, key=key)
            each = example_losses(state, batch.labels, logits)
            data, model = weighted_mean(each, batch.sample_weight), model_losses(state)
            scaled = data + model
            if state.loss_scale is not None:
                scaled = state.loss_scale * scaled
        found = state.connected(tape.gradient(scaled, state.weights))
    if state.loss_scale is not None:
        found = {name: _divided(gradient, state.loss_scale) for name, gradient in found.items()}
    loss, of_penalties = with_penalties(state, data, model)
    for name, gradient in of_penalties.items():
        found[name] = found[name] + gradient
    gradients = Vector.of(found)
    return Pass(loss, accuracy(batch, logits), examples, gradients, logits)


def _divided(gradient: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.convert_to_tensor(gradient), tf.float32) / scale


def with_penalties(
    state: TrainState, data: tf.Tensor, model: tf.Tensor
) -> tuple[Loss, dict[str, tf.Tensor]]:
    """The loss with its penalties, and their gradients by weight, for those that they count."""
    with tf.GradientTape() as tape:
        tape.watch(list(state.kernels.values()))
        loss = losses(state, data, model)
        penalty = loss.l1 + loss.l2 + loss.custom
    gradients = tape.gradient(penalty, state.kernels) if state.kernels else {}
    return loss, {name: g for name, g in gradients.items() if g is not None}


def weighted_mean(values: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
    """Σ w · x / Σ w, from two vectors [batch]; 0 where all weights are 0."""
    total = tf.reduce_sum(sample_weight * values)
    return tf.math.divide_no_nan(total, tf.reduce_sum(sample_weight))


def is_correct(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """[batch] float32: 1 for each example whose largest output is that of its class, else 0."""
    guesses = tf.argmax(logits, axis=-1)
    return tf.cast(tf.equal(guesses, tf.cast(labels, tf.int64)), tf.float32)


def accuracy(batch: Batch, logits: tf.Tensor) -> tf.Tensor:
    """The share of the batch's examples whose largest output is that of their class.

    0 where the outputs are none of classes; the loop then leaves it out of what it tells.
    """
    if len(logits.shape) != 2 or logits.shape[1] < 2:
        return tf.constant(0.0)
    return weighted_mean(is_correct(logits, batch.labels), batch.sample_weight)


def to_sums(result: Pass) -> tf.Tensor:
    """[n + 8] float32: the examples, and the examples times all else that a pass tells.

    Such vectors of several parts of a batch can be added up.
    """
    terms = tf.stack([*result.loss, result.accuracy])
    return result.examples * tf.concat([[1.0], terms, result.gradients.flat], axis=0)


def no_pass(state: TrainState) -> Pass:
    """The pass over no rows, which adds nothing to the others'."""
    zero = tf.constant(0.0)
    gradients = tf.zeros([count_elements(state.weights.values())])
    return Pass(Loss(*[zero] * len(Loss._fields)), zero, zero, Vector(gradients, state.weights))


def from_sums(sums: tf.Tensor, state: TrainState) -> Pass:
    """The pass over a whole batch, from the sum of its parts' `to_sums`.

    All means are over the examples of the whole batch, and a penalty, which every part has, counts
    once.
    """
    means = tf.math.divide_no_nan(sums[1:], sums[0])
    terms = len(Loss._fields)
    loss = Loss(*tf.unstack(means[:terms]))
    return Pass(loss, means[terms], sums[0], Vector(means[terms + 1 :], state.weights))


def rows_of(batch: Batch, first: tf.Tensor | int, size: int) -> Batch:
    """Some of a batch's rows."""

    def cut(tensor: tf.Tensor) -> tf.Tensor:
        start = [first] + [0] * (len(tensor.shape) - 1)
        return tf.slice(tensor, start, [size, *tensor.shape[1:]])

    return Batch(*(cut(tensor) for tensor in batch))


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
        rows = batch.labels.shape[0]
        whole = part or Part(0, rows, rows)
        small, longer = divmod(rows, parts)

        def add_all(start: int, count: int, size: int, sums: tf.Tensor) -> tf.Tensor:
            """The sums with those of `count` parts of one size, which are traced once."""
            if not count or not size:
                return sums
            cut = [
                tf.reshape(tensor[start : start + count * size], [count, size, *tensor.shape[1:]])
                for tensor in batch
            ]

            def body(i: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                own = Part(whole.first + start + i * size, size, whole.total)
                result = grad_fn(state, Batch(*(tensor[i] for tensor in cut)), own)
                return i + 1, sums + to_sums(result)

            begin = tf.constant(0), sums
            return tf.while_loop(lambda i, _: i < count, body, begin, parallel_iterations=1)[1]

        sums = tf.zeros([count_elements(state.weights.values()) + len(Loss._fields) + 2])
        sums = add_all(0, longer, small + 1, sums)
        sums = add_all(longer * (small + 1), parts - longer, small, sums)
        return from_sums(sums, state)

    return in_parts


class Step(NamedTuple):
    """What one step tells; all tensors."""

    sums: tf.Tensor  # float64 [SUMS]: steps, examples, Σ over the examples of each of Metrics
    learning_rate: tf.Tensor
    gradient: tf.Tensor  # float32 [n], over all weights
    update: tf.Tensor  # float32 [n], what was added to the weights


def no_step(state: TrainState) -> Step:
    """What is told before the first step: zeros, with sums that many steps can be added to."""
    size = count_elements(state.weights.values())
    sums = tf.zeros([SUMS], tf.float64)
    return Step(sums, tf.constant(0.0), tf.zeros([size]), tf.zeros([size]))


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
    images, labels, sample_weight = batch
    learning_rate = state.schedule(state.schedule_step)
    non_trainable = [tf.identity(variable) for variable in state.non_trainable.values()]
    loss, accuracy, examples, gradients, logits = grad_fn(state, batch, part)
    updates, slots = state.optimizer.updates(gradients, state.weights, learning_rate)

    # One test for all the values that the three hold.
    finite = tf.math.is_finite(loss.total + gradients.norm + updates.norm)
    overflowed = state.overflowed(loss.total, finite)
    valid = finite & ~state.diverged
    state.optimizer.apply(updates, slots, state.weights, valid)
    for variable, before in zip(state.non_trainable.values(), non_trainable, strict=True):
        variable.assign(select(valid, variable, before))
    state.update_ema(valid)
    state.advance(valid, overflowed)

    metrics = tf.stack([*loss, accuracy, gradients.norm])
    sums = tf.concat([[1.0, examples], examples * metrics], axis=0)
    sums = tf.cast(select(valid, sums, tf.zeros_like(sums)), tf.float64)
    state.totals.assign_add(sums)
    return Step(sums, learning_rate, gradients.flat, updates.flat)
