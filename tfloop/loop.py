"""The training loop around `step.train_step`: Loop.train_epoch → Loop.evaluate → Loop.run → Loop.fit.

What is not the story (files, plots, checkpoints) consumes the records that `run` yields.
"""

import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfloop import models, ops, pipelines
from tfloop.config import checked
from tfloop.data import Dataset, Split
from tfloop.errors import DivergenceError, UserError
from tfloop.optimizers import Vector
from tfloop.pipelines import Batch
from tfloop.state import TrainState
from tfloop.step import Step, accumulated, example_losses, forward_and_backward, hits, losses, model_losses, train_step
from tfloop.tracing import Traced

EVALUATION_BATCH = 256
READ_AT_ONCE = 4096  # images that evaluation reads from disk, where they do not lie in memory
STEPS_PER_CALL = {"CPU": 50, "GPU": 500}  # chosen so that a call lasts about half a second: Ctrl-C waits for its end


class Metrics(NamedTuple):
    """Means over the examples of a call, an epoch or a test set."""

    total: float
    data: float
    l1: float
    l2: float
    custom: float
    model: float
    accuracy: float
    gradient_norm: float | None = None  # of training alone


@dataclasses.dataclass(frozen=True)
class Call:
    """What one compiled call did."""

    epoch: int  # counted from 1
    step: int  # global_step after it
    batch: int  # steps of the epoch done after it
    steps: int
    train: Metrics
    rate: float  # of its last step
    seconds: float
    input_seconds: float  # of these, spent waiting for batches
    gradients: Vector = dataclasses.field(compare=False, repr=False)  # of its last step
    updates: Vector = dataclasses.field(compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What one epoch reached."""

    epoch: int
    step: int
    train: Metrics
    test: Metrics | None  # None where the data have no test images
    validation: Metrics | None
    rate: float
    seconds: float  # of training alone, for `steps` steps
    steps: int  # fewer than the epoch has where the state came from a checkpoint inside it
    outputs: np.ndarray | None = dataclasses.field(compare=False, repr=False)  # [test images, classes], the logits


@dataclasses.dataclass(eq=False)
class Ready:
    """Steps that a loop is ready to make in one compiled call: by `make`, or side by side with those of other loops."""

    loop: "Loop"
    source: object  # what the loop's pipeline takes batches from
    count: int
    last: Step | None = None  # of the steps made, with the sums of all
    waited: float = 0.0  # seconds, of these
    seconds: float = 0.0

    def make(self) -> None:
        """Make the steps, in a compiled call of their own."""
        self.loop.warm_up()
        (self.last, waited), self.seconds = self.loop.timed("training", self.loop.compiled, self.source, tf.constant(self.count))
        self.waited = float(waited)


class Loop:
    """Trains a state on a data set.

    Example:
      >>> loop = Loop(state, tfloop.load("mnist"))
      >>> for record in loop.run(epochs=5): print(record)
      >>> state.reset()              # in place: the second run repeats the first bit for bit
      >>> loop.fit(epochs=5)         # and nothing is traced again

    Attributes:
      seconds: {"tracing", "training", "evaluation"} so far.
      traces: {"train", "evaluate"}: how often each was traced; 1 each, in a whole process.
      steps: steps in an epoch.
      graph: that of the compiled step, for TensorBoard; None where nothing is compiled yet, or ever.
      single: steps, by the global_step before each, that get a compiled call of their own.
      stop_every: calls end at every multiple of this global_step, for a checkpoint say; 0: no such places.
      beside: ensemble.SideBySide, where this loop's calls are made together with those of others.
      options: tf.function's, for what makes a whole call.
    """

    def __init__(self, state: TrainState, data: Dataset, *, batch_size: int = 64, pipeline: str = "auto",
                 steps_per_call: int = 0, jit_compile: bool = False, eager: bool = False, fast: bool = True,
                 shards: int = 1, accumulate: int = 1, replicas=None, differentiate: Callable | None = None,
                 time_input: bool = True, check_numerics: bool = False):
        """Args:
          state: what to train.
          data: images and labels.
          batch_size: images per step; the last step of an epoch takes what is left.
          pipeline: "auto", "host", "prefetch" or "resident" (see `pipelines`).
          steps_per_call: steps in one compiled call; 0 chooses.
          jit_compile: compile the step with XLA; on a GPU with resident images, all steps of a call.
          eager: run the step op by op.
          fast: rearrange the forward pass (see `ops`).
          shards: parts of a batch to compute side by side, with `fast`.
          accumulate: parts of a batch to compute one after the other.
          replicas: distribution.Replicas to compute on, in whose scope the model was made; the batch is that of all together.
          differentiate: computes loss and gradients in place of `forward_and_backward`.
          time_input: measure the wait for batches, for which TensorFlow's op determinism leaves no operation.
          check_numerics: tf.debugging.enable_check_numerics() is on, which breaks off a step half done: one step a call.

        Raises:
          UserError: a batch larger than the data, or a model whose outputs do not fit its classes.
        """
        if not isinstance(data, Dataset):
            raise UserError(f"expected a tfloop.Dataset, found {type(data).__name__}; tfloop.from_arrays(…) and tfloop.load(…) make one")
        for name, value in (("batch_size", batch_size), ("steps_per_call", steps_per_call), ("shards", shards), ("accumulate", accumulate)):
            checked(name, value)
        if batch_size > len(data.train):
            raise UserError(f"--batch_size={batch_size} is larger than the {len(data.train)} training images")
        _check_takes(state.model, data.image_shape)
        outputs = models.logits(state.model, state.standardize(data.train.images[:1]))
        if not tf.is_tensor(outputs) or len(outputs.shape) != 2:
            found = f"shape {tuple(outputs.shape)}" if tf.is_tensor(outputs) else type(outputs).__name__
            raise UserError(f"the model gives {found} for a batch of one image; expected one tensor [batch, outputs]")
        if state.loss is None and outputs.shape[1] < data.classes:
            raise UserError(f"the model gives outputs of shape {tuple(outputs.shape[1:])} for an image; the data have "
                            f"{data.classes} classes")
        self.state, self.data, self._output_shape = state, data, outputs.shape[1:]
        self.graph, self.single, self.stop_every, self.beside = None, range(0), 0, None
        self._place, self._source = None, None
        self._warm = {"train", "evaluate"} if eager else set()  # nothing to trace
        part = (replicas.worker, replicas.workers) if replicas else (0, 1)
        self.pipeline = pipelines.make(pipeline, data.train, batch_size, *part)
        self.steps = self.pipeline.steps
        kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
        self.steps_per_call = 1 if check_numerics else min(steps_per_call or STEPS_PER_CALL[kind], self.steps)
        # On a GPU, XLA compiles all steps of a call into one program; on a CPU each for itself: convolutions are slow in its loops.
        whole = jit_compile and kind == "GPU" and self.pipeline.name == "resident" and not replicas
        self.options = {"jit_compile": True} if whole else {}
        # A GPU is not waited for where the images are in its own memory: there a clock could only hold it up.
        self._time_input = time_input and not (kind == "GPU" and self.pipeline.name == "resident")
        self._check_numerics = check_numerics
        self.seconds = dict.fromkeys(("tracing", "training", "evaluation"), 0.0)
        self.forward = functools.partial(ops.logits, shards=shards) if fast else models.logits
        differentiate = differentiate or functools.partial(forward_and_backward, forward=self.forward)
        if accumulate > 1:
            if batch_size % accumulate:
                raise UserError(f"--accumulate={accumulate} does not divide --batch_size={batch_size}")
            differentiate = accumulated(differentiate, accumulate)
        if replicas:
            differentiate = replicas.differentiate(differentiate)
        step = lambda batch: train_step(state, batch, differentiate)
        self._step = tf.function(step, autograph=False, jit_compile=True) if jit_compile and not whole else step
        self.compiled = Traced(self.train_steps, "the training step", eager, **self.options)
        self._evaluate = Traced(self._evaluate_all, "the evaluation", eager, input_signature=[
            tf.TensorSpec([None, *data.image_shape], data.train.images.dtype), tf.TensorSpec([None], tf.int64)])

    @property
    def traces(self) -> dict[str, int]:
        return {"train": (self.beside or self).compiled.traces, "evaluate": self._evaluate.traces}

    def train_steps(self, source, steps: tf.Tensor) -> tuple[Step, tf.Tensor]:
        """`steps` steps in one call, and the seconds spent waiting for batches: the last step, with the sums of all.

        A count that is a tensor keeps one trace for all counts.
        """
        first = tf.cast(self.state.batch, tf.int32)  # read once: on a GPU no step then waits for the one before to tell it

        def body(i, total, waited):
            if not tf.executing_eagerly():
                self.graph = tf.compat.v1.get_default_graph()
            if self._time_input:
                started = tf.timestamp()
                with tf.control_dependencies([started]):
                    batch = self.pipeline.take(source, first + i)
                with tf.control_dependencies(batch):
                    waited += tf.timestamp() - started
            else:
                batch = self.pipeline.take(source, first + i)
            with tf.compat.v1.name_scope(None):  # TensorBoard's graph then has the layers on top, not inside the loop
                step = self._step(batch)
            return i + 1, step._replace(sums=total.sums + step.sums), waited

        size = sum(weight.shape.num_elements() for weight in self.state.weights.values())
        nothing = Step(tf.zeros([len(Metrics._fields) + 2]), tf.constant(0.0), tf.zeros([size]), tf.zeros([size]))
        start = (tf.constant(0), nothing, tf.constant(0.0, tf.float64))
        return tf.while_loop(lambda i, *_: i < steps, body, start, parallel_iterations=1)[1:]

    def batch(self, index: int) -> Batch:
        """The batch with this index, from 0 to steps - 1, in the epoch that the state is in, made on its own."""
        if not 0 <= index < self.steps:
            raise UserError(f"batch {index}: an epoch has the batches 0 to {self.steps - 1}")
        return pipelines.batch_at(self.data.train, self.pipeline.batch_size, self.state.seed, self.state.epoch, index)

    def train_epoch(self) -> Iterator[Call]:
        """The rest of the epoch that the state is in, a record per compiled call."""
        return _alone(self.ready_epoch())

    def ready_epoch(self) -> Iterator[Ready | Call]:
        """`train_epoch`, where each call is made by whoever takes what is ready."""
        state = self.state
        while (batch := int(state.batch)) < self.steps:
            ready = Ready(self, self._source_at(batch), self._call_length(batch))
            self._place = None  # until the call has gone well: what it took of the source is not to be taken for granted
            with tf.profiler.experimental.Trace("train", step_num=int(state.global_step), _r=1):  # marks it in a profile
                yield ready
            last, count = ready.last, ready.count
            state.totals.assign_add(tf.cast(last.sums, tf.float64))  # of the steps that were made, where it diverged
            if state.diverged:
                raise self._divergence()
            self._place = self._position()
            yield Call(int(state.epoch) + 1, int(state.global_step), batch + count, count, _metrics(last.sums),
                       float(last.learning_rate), ready.seconds, ready.waited, Vector(last.gradient, state.weights),
                       Vector(last.update, state.weights))

    def _call_length(self, batch: int) -> int:
        """Steps in the call that begins at this batch. Calls end at fixed places, resumed or not."""
        count = min(self.steps_per_call - batch % self.steps_per_call, self.steps - batch)
        step = int(self.state.global_step)
        if self.stop_every:
            count = min(count, self.stop_every - step % self.stop_every)
        if step in self.single:
            return 1
        return min(count, self.single.start - step) if step < self.single.start else count

    def _source_at(self, batch: int):
        """What the pipeline takes batches from: the last one, unless the state was moved to another place."""
        if self._place != self._position():
            self._source, self._place = self.pipeline.begin(self.state.seed, self.state.epoch, batch), self._position()
        return self._source

    def _position(self) -> tuple[int, int, int]:
        return int(self.state.seed), int(self.state.epoch), int(self.state.batch)

    def warm_up(self) -> None:
        """Trace and compile, by one step that is then taken back, so that later calls do nothing but steps."""
        if "train" in self._warm:
            return
        source = self.pipeline.begin(self.state.seed, self.state.epoch, int(self.state.batch))
        with self.taken_back():
            self.timed("tracing", self.compiled, source, tf.constant(1))
        self._warm.add("train")

    @contextlib.contextmanager
    def taken_back(self) -> Iterator[None]:
        """After this block the state is what it was before."""
        variables = list(self.state.named().values())
        before = [variable.numpy() for variable in variables]
        try:
            yield
        finally:
            for variable, value in zip(variables, before):
                variable.assign(value)

    def evaluate(self, split: Split) -> Metrics:
        """Means over all of `split`, with the moving average of the weights where one is kept.

        Raises:
          DivergenceError: the loss is not finite.
        """
        return self.evaluate_with_outputs(split)[0]

    def evaluate_with_outputs(self, split: Split) -> tuple[Metrics, np.ndarray]:
        """As `evaluate`, and the logits [examples, classes].

        Raises:
          DivergenceError: the loss is not finite.
          UserError: there are no images, or their pixels are of another type than in training.
        """
        if not len(split):
            raise UserError("there are no images to evaluate")
        if split.images.dtype != self.data.train.images.dtype:
            raise UserError(f"images to evaluate are {split.images.dtype}, those of the training {self.data.train.images.dtype}")
        if "evaluate" not in self._warm:
            self.timed("tracing", self._evaluate, tf.constant(split.images[:1]), tf.constant(split.labels[:1], tf.int64))
            self._warm.add("evaluate")
        at_once, found = len(split) if isinstance(split.images, np.ndarray) else READ_AT_ONCE, []
        with self.state.averaged():
            for first in range(0, len(split), at_once):
                part = slice(first, first + at_once)
                images, labels = tf.constant(split.images[part]), tf.constant(split.labels[part], tf.int64)
                found.append(self.timed("evaluation", self._evaluate, images, labels)[0])
        metrics = _metrics(tf.add_n([sums for sums, _ in found]))._replace(gradient_norm=None)
        if not math.isfinite(metrics.total):
            raise self._held_out_divergence()
        return metrics, np.concatenate([outputs.numpy() for _, outputs in found])

    def _evaluate_all(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The sums of train_step over all images, in batches of static size, and the outputs."""
        state, size = self.state, tf.shape(labels)[0]
        batches = (size + EVALUATION_BATCH - 1) // EVALUATION_BATCH
        missing = batches * EVALUATION_BATCH - size  # rows that fill up the last batch, with the last image
        cut = lambda x: tf.reshape(tf.concat([x, tf.repeat(x[-1:], missing, axis=0)], axis=0), [-1, EVALUATION_BATCH, *x.shape[1:]])
        images, labels = cut(images), cut(labels)

        def body(i, sums, outputs):
            weights = tf.cast(i * EVALUATION_BATCH + tf.range(EVALUATION_BATCH) < size, tf.float32)
            logits, truth = state.predict(images[i], self.forward), labels[i]
            means = tf.stack([example_losses(state, truth, logits), hits(logits, truth),
                              tf.fill([EVALUATION_BATCH], model_losses(state))])
            return i + 1, sums + tf.linalg.matvec(means, weights), outputs.write(i, logits)

        outputs = tf.TensorArray(tf.float32, batches, element_shape=[EVALUATION_BATCH, *self._output_shape])
        _, sums, outputs = tf.while_loop(lambda i, *_: i < batches, body, (tf.constant(0), tf.zeros([3]), outputs),
                                         parallel_iterations=1)
        examples = tf.cast(size, tf.float32)
        data, accuracy, model = tf.unstack(sums / examples)
        loss = losses(state, data, model)
        sums = tf.concat([[1.0, examples], examples * tf.stack([*loss, accuracy, 0.0])], axis=0)
        return sums, outputs.concat()[:size]

    def run(self, epochs: int) -> Iterator[Call | Epoch]:
        """Train until `epochs` epochs are done: a Call after each compiled call, an Epoch after each epoch.

        The state moves on only as records are taken, so code between them sees it as the record says, and may change
        it: any variable of `state.hyper`, or `state.reset(...)`.

        Raises:
          DivergenceError: the loss or a gradient is NaN or infinite; the state is that before the step.
        """
        return _alone(self.ready(epochs))

    def ready(self, epochs: int) -> Iterator[Ready | Call | Epoch]:
        """As `run`, but each compiled call is made by whoever takes what is Ready, before taking more."""
        state = self.state
        state.diverged.assign(False)
        rate = float(state.schedule(tf.maximum(state.schedule_step - 1, 0)))
        while int(state.epoch) < epochs:
            before, first = self.seconds["training"], int(state.batch)
            for record in self.ready_epoch():
                rate = record.rate if isinstance(record, Call) else rate
                yield record
            train = _metrics(state.totals)
            test, outputs = self.evaluate_with_outputs(self.data.test) if len(self.data.test) else (None, None)
            validation = self.evaluate(self.data.validation) if len(self.data.validation) else None
            state.epoch.assign_add(1)
            state.batch.assign(0)
            state.totals.assign(tf.zeros_like(state.totals))
            yield Epoch(int(state.epoch), int(state.global_step), train, test, validation, rate,
                        self.seconds["training"] - before, self.steps - first, outputs)

    def fit(self, epochs: int) -> Epoch | None:
        """`run` to its end; the last epoch's record."""
        record = None
        for record in self.run(epochs):
            pass
        return record

    def timed(self, what: str, function, *arguments):
        """(result, seconds): the call, and the wait for the device to finish it."""
        averages = [variable.numpy() for variable in self.state.moving.values()] if self._check_numerics else []
        started = time.perf_counter()
        try:
            result = function(*arguments)
            tf.nest.flatten(result)[0].numpy()  # waits for the device: what a call returns, it returns at once
        except tf.errors.OpError as error:
            if self.pipeline.error:
                raise self.pipeline.error from None
            operation = re.search(r'Infinity or NaN in output \d+ of .*op "(\w+)"', error.message)  # --check_numerics
            if not operation:
                raise
            tf.debugging.disable_check_numerics()  # it has found what it was to find
            for variable, value in zip(self.state.moving.values(), averages):
                variable.assign(value)
            where = f", first in the operation {operation.group(1)}"
            raise (self._divergence(where) if what != "evaluation" else self._held_out_divergence(where)) from None
        seconds = time.perf_counter() - started
        self.seconds[what] += seconds
        return (result, seconds) if what != "tracing" else None

    def _held_out_divergence(self, operation: str = "") -> DivergenceError:
        step = int(self.state.global_step)
        return DivergenceError(f"step {step}: the loss on the images held out is NaN or infinite{operation}; try a lower "
                               f"--learning_rate", step, "loss")

    def _divergence(self, operation: str = "") -> DivergenceError:
        """Do the step that failed once more, layer by layer, to name where the first value is not finite."""
        state, step = self.state, int(self.state.global_step)
        averages = [variable.numpy() for variable in state.moving.values()]
        batch = self.batch(int(state.batch))
        key = state.key()
        activations = models.forward(state.model, state.inputs(batch.images, key), batch.weights, True, key)
        result = forward_and_backward(state, batch)
        found = [("weights", name.split("/")[0], weight) for name, weight in state.weights.items()]
        found += [("activations", name, activation) for name, activation in activations]
        found += [("loss", "loss", result.loss.total)]
        found += [("gradients", name.split("/")[0], gradient)
                  for name, gradient in result.gradients.items()]
        what, layer = next(((what, layer) for what, layer, values in found
                            if not bool(tf.reduce_all(tf.math.is_finite(values)))), ("update", "update"))
        for variable, value in zip(state.moving.values(), averages):
            variable.assign(value)
        where = f"the {what}" if what == layer else f"the {what} of {layer}"
        return DivergenceError(f"step {step}: {where} became NaN or infinite{operation}, at rate "
                               f"{float(state.schedule(state.schedule_step)):.4g}; the weights are those before this "
                               f"step. Try a lower --learning_rate", step, layer)


def _alone(records: Iterator) -> Iterator[Call | Epoch]:
    """The records, where every call is made on its own."""
    for record in records:
        if isinstance(record, Ready):
            record.make()
        else:
            yield record


def _check_takes(model, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError where the model says what images it takes, and they are others."""
    takes = getattr(model, "input_shape", None) if isinstance(model, keras.Model) and model.built else None
    if isinstance(takes, tuple) and len(takes) == 4 and any(side not in (None, found) for side, found in zip(takes[1:], image_shape)):
        raise UserError(f"the model takes images of {'×'.join(map(str, takes[1:]))}, the data have {'×'.join(map(str, image_shape))}")


def _metrics(sums: tf.Tensor) -> Metrics:
    steps, examples, *rest = sums.numpy().tolist()
    return Metrics(*(value / examples if examples else math.nan for value in rest))
