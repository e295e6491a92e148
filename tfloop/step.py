"""One training step, top to bottom: losses → forward_and_backward → train_step.

It serves every mode: compiled, under XLA, eager in a debugger, on a part of a batch, benchmarked. It returns tensors and
touches nothing but the state.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from tfloop import models, penalties
from tfloop.errors import UserError
from tfloop.optimizers import Vector, select
from tfloop.pipelines import Batch
from tfloop.state import TrainState


class Loss(NamedTuple):
    """total = data + l1 + l2 + custom + model, each a float32 scalar."""

    total: tf.Tensor
    data: tf.Tensor  # mean over the batch of the loss of each example
    l1: tf.Tensor  # l1 · Σ|w| over the penalised kernels
    l2: tf.Tensor  # l2 · Σw²
    custom: tf.Tensor  # the user's own penalties
    model: tf.Tensor  # what the model's own layers add


def example_losses(state: TrainState, labels: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """[batch] float32: the loss of each example, from the model's outputs."""
    if state.loss is not None:
        return _checked(state.loss(labels, outputs), labels.shape, "the loss function", "a value for each example of the batch")
    sigmoid = models.output_activation(state.model) == "sigmoid"
    return cross_entropy(labels, outputs, tf.convert_to_tensor(state.hyper["label_smoothing"]), sigmoid)


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor, smoothing, sigmoid: bool = False) -> tf.Tensor:
    """[batch]: the cross-entropy of each example, from labels [batch] int64 and logits [batch, classes].

    Softmax: -Σ_k t_k · log p_k. Sigmoid: the mean over k of the binary cross-entropy, as Keras has it. The target t is
    one-hot, smoothed to (1 - s) · t + s / classes, or with sigmoid to (1 - s) · t + s / 2.
    """
    classes = logits.shape[-1]
    targets = tf.one_hot(labels, classes, dtype=logits.dtype) * (1.0 - smoothing)
    if sigmoid:
        return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(targets + smoothing / 2.0, logits), axis=-1)
    return tf.nn.softmax_cross_entropy_with_logits(targets + smoothing / classes, logits)


def _checked(tensor: tf.Tensor, shape, what: str, meaning: str) -> tf.Tensor:
    tensor = tf.convert_to_tensor(tensor)
    if not tensor.shape.is_compatible_with(shape):
        raise UserError(f"{what} gives {tensor.shape}, expected {tf.TensorShape(shape)}: {meaning}")
    return tensor


def model_losses(state: TrainState) -> tf.Tensor:
    """What the layers of a user's own model added to the loss in the forward pass just made (Keras's model.losses)."""
    own = getattr(state.model, "losses", [])
    return tf.add_n([tf.reduce_sum(loss) for loss in own]) if own else tf.constant(0.0)


def losses(state: TrainState, data: tf.Tensor, model: tf.Tensor) -> Loss:
    """The loss, term by term, from the mean data loss and the model's own term."""
    l1 = state.hyper["l1"] * penalties.total(penalties.l1, state.kernels)
    l2 = state.hyper["l2"] * penalties.total(penalties.l2, state.kernels)
    custom = penalties.total(lambda kernel: tf.add_n([_checked(penalty(kernel), [], "a penalty", "one number for the kernel")
                                                      for penalty in state.penalties]), state.kernels if state.penalties else [])
    return Loss(data + l1 + l2 + custom + model, data, l1, l2, custom, model)


class Pass(NamedTuple):
    """One way forward through the model and back."""

    loss: Loss
    accuracy: tf.Tensor
    examples: tf.Tensor  # float32, how many the means are over: rows that fill up the batch do not count
    gradients: Vector  # of loss.total, by weight: "conv1/kernel"
    logits: tf.Tensor | None = None  # [batch, classes]; None where a pass was put together from parts


def forward_and_backward(state: TrainState, batch: Batch, forward: Callable = models.logits, part: tf.Tensor | int = 0,
                         parts: int = 1) -> Pass:
    """The loss of a batch, term by term, and its gradients. Changes nothing but moving averages.

    Args:
      state, batch: what is trained, and on what.
      forward: `models.logits`, layer by layer as Keras has it, or its fast twin `ops.logits`.
      part, parts: which part of the step's batch this is, of how many, for its randomness.
    """
    key = state.key(part, parts)
    images = state.inputs(batch.images, key)
    with tf.GradientTape() as tape:
        logits = forward(state.model, images, batch.weights, training=True, key=key)
        each = example_losses(state, batch.labels, logits)
        examples = tf.reduce_sum(batch.weights)
        data_loss = tf.math.divide_no_nan(tf.reduce_sum(batch.weights * each), examples)
        loss = losses(state, data_loss, model_losses(state))
        on_the_way_back = loss.total if state.loss_scale is None else state.loss_scale * loss.total
    gradients = Vector.of(tape.gradient(on_the_way_back, state.weights, unconnected_gradients=tf.UnconnectedGradients.ZERO))
    if state.loss_scale is not None:
        gradients = Vector(gradients.flat / state.loss_scale, state.weights)
    return Pass(loss, hit_rate(batch, logits), examples, gradients, logits)


def hit_rate(batch: Batch, logits: tf.Tensor) -> tf.Tensor:
    """The share of the batch's examples whose largest output is that of their class."""
    return tf.math.divide_no_nan(tf.reduce_sum(batch.weights * hits(logits, batch.labels)), tf.reduce_sum(batch.weights))


def weighed(found: Pass) -> tf.Tensor:
    """[n + 8] float32: the examples, and the examples times all else that a pass tells. Such vectors can be added up."""
    return found.examples * tf.concat([[1.0], tf.stack([*found.loss, found.accuracy]), found.gradients.flat], axis=0)


def whole(total: tf.Tensor, state: TrainState) -> Pass:
    """The pass over a whole batch, from the sum of its parts' `weighed`.

    All means are over the examples of the whole batch, and a penalty, which every part has, counts once.
    """
    means = tf.math.divide_no_nan(total[1:], total[0])
    terms = len(Loss._fields)
    return Pass(Loss(*tf.unstack(means[:terms])), means[terms], total[0], Vector(means[terms + 1:], state.weights))


def accumulated(differentiate: Callable, times: int) -> Callable:
    """`differentiate`, on a batch that is cut in so many parts, one after the other, in the memory that one part takes.

    The gradient is that of the whole batch, but for layers that look at the batch: batch normalisation sees a part.
    """
    def in_parts(state: TrainState, batch: Batch, part: tf.Tensor | int = 0, parts: int = 1) -> Pass:
        cut = Batch(*(tf.reshape(tensor, [times, -1, *tensor.shape[1:]]) for tensor in batch))

        def body(i, total):
            found = differentiate(state, Batch(*(tensor[i] for tensor in cut)), part=part * times + i, parts=parts * times)
            return i + 1, total + weighed(found)

        size = sum(weight.shape.num_elements() for weight in state.weights.values())
        start = tf.constant(0), tf.zeros([size + len(Loss._fields) + 2])
        return whole(tf.while_loop(lambda i, _: i < times, body, start, parallel_iterations=1)[1], state)

    return in_parts


class Step(NamedTuple):
    """What one step tells; all tensors."""

    sums: tf.Tensor  # float32 [10]: steps, examples, and the sums over the examples of what loop.Metrics names
    learning_rate: tf.Tensor
    gradient: tf.Tensor  # float32 [n], over all weights
    update: tf.Tensor  # float32 [n], what was added to the weights


def train_step(state: TrainState, batch: Batch, differentiate: Callable = forward_and_backward) -> Step:
    """One step: forward, loss, backward, update.

    A step whose loss, gradient or update is not finite changes no weight, slot or counter, and neither does any step after
    it, so that the state is found as it was before: `state.diverged` tells.

    `differentiate` is `forward_and_backward`, or its twin `debug.forward_and_backward`, which goes layer by layer, or either
    on parts of the batch (`accumulated`, `distribution.Replicas.differentiate`), for which it takes `part` and `parts`, too.
    """
    images, labels, weights = batch
    learning_rate = state.schedule(state.schedule_step)
    averages = [tf.identity(variable) for variable in state.moving.values()]
    loss, accuracy, examples, gradients, logits = differentiate(state, batch)
    updates, slots = state.optimizer.updates(gradients, state.weights, learning_rate)

    finite = tf.math.is_finite(loss.total + gradients.norm + updates.norm)  # one test for all that they hold
    overflowed = state.overflowed(loss.total, finite)
    valid = finite & ~state.diverged
    state.optimizer.apply(updates, slots, state.weights, valid)
    for variable, before in zip(state.moving.values(), averages):
        variable.assign(select(valid, variable, before))
    state.keep_average(valid)
    state.advance(valid, overflowed)

    sums = tf.concat([[1.0, examples], examples * tf.stack([*loss, accuracy, gradients.norm])], axis=0)
    return Step(select(valid, sums, tf.zeros_like(sums)), learning_rate, gradients.flat, updates.flat)


def hits(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.equal(tf.argmax(logits, axis=-1), tf.cast(labels, tf.int64)), tf.float32)
