"""The training loop around `step.train_step`: train_epoch → evaluate → run → fit.

What is not the story (files, plots, checkpoints) consumes the records that `run` yields.
"""

import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfloop import models
from tfloop.config import check_setting
from tfloop.data import pipelines
from tfloop.data.dataset import Dataset, Split
from tfloop.data.pipelines import Batch
from tfloop.errors import DivergenceError, UserError
from tfloop.metrics import Metrics, means
from tfloop.models import fast as fast_pass
from tfloop.state import TrainState
from tfloop.step import (
    Step,
    accumulated,
    example_losses,
    forward_and_backward,
    is_correct,
    losses,
    model_losses,
    no_step,
    train_step,
)
from tfloop.tracing import Traced
from tfloop.vectors import Vector
from tfloop.wording import shape_text

EVALUATION_BATCH = 256
READ_AT_ONCE = 4096  # images that evaluation reads from disk, where they do not lie in memory
# Chosen so that a call lasts about half a second: Ctrl-C waits for its end.
STEPS_PER_CALL = {"CPU": 50, "GPU": 500}


@dataclasses.dataclass(frozen=True)
class Call:
    """What one compiled call did."""

    epoch: int  # counted from 1
    step: int  # global_step after it
    batch_index: int  # of the epoch's next batch, so: steps of the epoch done
    steps: int
    train: Metrics
    learning_rate: float  # of its last step
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
    learning_rate: float
    seconds: float  # of training alone, for `steps` steps
    steps: int  # fewer than the epoch has where the state came from a checkpoint inside it
    # [test images, classes], the logits
    outputs: np.ndarray | None = dataclasses.field(compare=False, repr=False)


@dataclasses.dataclass(eq=False)
class PendingCall:
    """Steps that a loop is ready to make in one compiled call.

    `Loop.make` makes them, or an ensemble does, side by side with those of other loops.
    """

    loop: "Loop"
    source: Any  # what the loop's pipeline takes batches from
    count: int
    last: Step | None = None  # of the steps made, with the sums of all
    waited: float = 0.0  # seconds, of these
    seconds: float = 0.0


class Loop:
    """Trains a state on a data set.

    Example:
      >>> loop = Loop(state, tfloop.load("mnist"))
      >>> for record in loop.run(epochs=5): print(record)
      >>> state.reset()              # in place: the second run repeats the first bit for bit
      >>> loop.fit(epochs=5)         # and nothing is traced again

    Attributes:
      seconds: {"tracing", "training", "evaluation"} so far.
      steps: steps in an epoch.
      graph: that of the compiled step, for TensorBoard; None where nothing is compiled yet, or
        ever.
      single: steps, by the global_step before each, that get a compiled call of their own.
      stop_every: calls end at every multiple of this global_step, for a checkpoint; 0: at none.
      beside: ensemble.SideBySide, where this loop's calls are made together with those of others.
      options: tf.function's, for what makes a whole call.
    """

    def __init__(
        self,
        state: TrainState,
        data: Dataset,
        *,
        batch_size: int = 64,
        pipeline: str = "auto",
        steps_per_call: int = 0,
        jit_compile: bool = False,
        eager: bool = False,
        fast: bool = True,
        shards: int = 1,
        accumulate: int = 1,
        replicas: Any = None,
        grad_fn: Callable | None = None,
        time_input: bool = True,
        check_numerics: bool = False,
    ) -> None:
        """Make one.

        Args:
          state: what to train.
          data: images and labels.
          batch_size: images per step; the last step of an epoch takes what is left.
          pipeline: "auto", "host", "prefetch" or "resident" (see `pipelines`).
          steps_per_call: steps in one compiled call; 0 chooses.
          jit_compile: compile the step with XLA; on a GPU with resident images, all steps of a
            call.
          eager: run the step op by op.
          fast: rearrange the forward pass (see `models.fast`).
          shards: parts of a batch to compute side by side, with `fast`.
          accumulate: parts of a batch to compute one after the other.
          replicas: machine.replicas.Replicas to compute on, in whose scope the model was made; the
            batch is that of all together.
          grad_fn: computes loss and gradients in place of `forward_and_backward`.
          time_input: measure the wait for batches, for which TensorFlow's op determinism leaves no
            operation.
          check_numerics: tf.debugging.enable_check_numerics() is on, which breaks off a step half
            done: one step a call.

        Raises:
          UserError: a batch larger than the data, or a model whose outputs do not fit its classes.
        """
        sizes = {
            "batch_size": batch_size,
            "steps_per_call": steps_per_call,
            "shards": shards,
            "accumulate": accumulate,
        }
        _check_data(data, sizes)
        self._output_shape = _check_fit(state, data)
        if batch_size % accumulate:
            raise UserError(f"--accumulate={accumulate} does not divide --batch_size={batch_size}")
        self.state, self.data = state, data
        self.graph: tf.Graph | None = None
        self.single, self.stop_every = range(0), 0
        self.beside: Any = None
        self._place: tuple[int, int, int] | None = None
        self._source: Any = None
        self._warm = {"train", "evaluate"} if eager else set()  # nothing to trace
        worker = (replicas.worker, replicas.workers) if replicas else (0, 1)
        self.pipeline = pipelines.make(pipeline, data.train, batch_size, *worker)
        self.steps = self.pipeline.steps
        kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
        chosen = steps_per_call or STEPS_PER_CALL[kind]
        self.steps_per_call = 1 if check_numerics else min(chosen, self.steps)
        # On a GPU, XLA compiles all steps of a call into one program. On a CPU it compiles each for
        # itself: convolutions are slow in its loops.
        is_resident = self.pipeline.name == "resident"
        compiles_whole = jit_compile and kind == "GPU" and is_resident and not replicas
        self.options = {"jit_compile": True} if compiles_whole else {}
        # A GPU is not waited for where the images are in its own memory: there a clock could only
        # hold it up.
        self._time_input = time_input and not (kind == "GPU" and is_resident)
        self._check_numerics = check_numerics
        self.seconds = dict.fromkeys(("tracing", "training", "evaluation"), 0.0)
        self.forward = models.logits
        if fast:
            self.forward = functools.partial(fast_pass.logits, shards=shards)
        grad_fn = grad_fn or functools.partial(forward_and_backward, forward=self.forward)
        if accumulate > 1:
            grad_fn = accumulated(grad_fn, accumulate)
        if replicas:
            grad_fn = replicas.grad_fn(grad_fn)
        self._step = functools.partial(train_step, state, grad_fn=grad_fn)
        if jit_compile and not compiles_whole:
            self._step = tf.function(self._step, autograph=False, jit_compile=True)
        self.compiled = Traced(self.train_steps, "the training step", eager, **self.options)
        signature = [
            tf.TensorSpec([None, *data.image_shape], data.train.images.dtype),
            tf.TensorSpec([None], tf.int64),
        ]
        self._evaluate = Traced(
            self._evaluate_all, "the evaluation", eager, input_signature=signature
        )

    @property
    def traces(self) -> dict[str, int]:
        """{"train", "evaluate"}: how often each was traced; 1 each, in a whole process."""
        train = (self.beside or self).compiled.traces
        return {"train": train, "evaluate": self._evaluate.traces}

    def train_steps(self, source: Any, steps: tf.Tensor) -> tuple[Step, tf.Tensor]:
        """`steps` steps in one call: (the last step, with the sums of all; seconds of waiting).

        A count that is a tensor keeps one trace for all counts. The seconds are those spent waiting
        for batches.
        """
        # Read once: on a GPU no step then waits for the one before to tell it.
        first = tf.cast(self.state.batch_index, tf.int32)

        def body(i: tf.Tensor, total: Step, waited: tf.Tensor) -> tuple:
            if not tf.executing_eagerly():
                self.graph = tf.compat.v1.get_default_graph()
            batch, seconds = self._take(source, first + i)
            # TensorBoard's graph then has the layers on top, not inside the loop.
            with tf.compat.v1.name_scope(None):
                step = self._step(batch)
            return i + 1, step._replace(sums=total.sums + step.sums), waited + seconds

        start = (tf.constant(0), no_step(self.state), tf.constant(0.0, tf.float64))
        _, last, waited = tf.while_loop(lambda i, *_: i < steps, body, start, parallel_iterations=1)
        return last, waited

    def _take(self, source: Any, index: tf.Tensor) -> tuple[Batch, tf.Tensor]:
        """(the batch with this index, the seconds it was waited for)."""
        if not self._time_input:
            return self.pipeline.take(source, index), tf.constant(0.0, tf.float64)
        started = tf.timestamp()
        with tf.control_dependencies([started]):
            batch = self.pipeline.take(source, index)
        with tf.control_dependencies(batch):
            return batch, tf.timestamp() - started

    def batch(self, index: int) -> Batch:
        """The batch with this index, from 0 to steps - 1, in the state's epoch, made on its own."""
        if not 0 <= index < self.steps:
            raise UserError(f"batch {index}: an epoch has the batches 0 to {self.steps - 1}")
        size, state = self.pipeline.batch_size, self.state
        return pipelines.batch_at(self.data.train, size, state.seed, state.epoch, index)

    def train_epoch(self) -> Iterator[Call]:
        """The rest of the epoch that the state is in, a record per compiled call."""
        yield from self._alone(self.pending_epoch())

    def _alone(self, items: Iterator) -> Iterator:
        """The records among the items; pending calls are made."""
        for item in items:
            if isinstance(item, PendingCall):
                self.make(item)
            else:
                yield item

    def pending_epoch(self) -> Iterator[PendingCall | Call]:
        """`train_epoch`, where whoever takes a PendingCall makes it before taking more."""
        state = self.state
        while (index := int(state.batch_index)) < self.steps:
            call = PendingCall(self, self._source_at(index), self._call_length(index))
            # Until the call has gone well, what it took of the source is not taken for granted.
            self._place = None
            step = int(state.global_step)
            with tf.profiler.experimental.Trace("train", step_num=step, _r=1):
                yield call  # the trace marks it in a profile
            assert call.last is not None
            last, count = call.last, call.count
            # Of the steps that were made, where it diverged.
            state.totals.assign_add(tf.cast(last.sums, tf.float64))
            if state.diverged:
                raise self._divergence()
            self._place = self._position()
            yield Call(
                int(state.epoch) + 1,
                int(state.global_step),
                index + count,
                count,
                means(last.sums),
                float(last.learning_rate),
                call.seconds,
                call.waited,
                Vector(last.gradient, state.weights),
                Vector(last.update, state.weights),
            )

    def make(self, call: PendingCall) -> None:
        """Make the steps of `call`, in a compiled call of their own."""
        self.warm_up()
        with self._timed("training") as timer:
            last, waited = self.compiled.call(call.source, tf.constant(call.count))
            last.sums.numpy()  # waits for the device: what a call returns, it returns at once
            call.last, call.waited = last, float(waited)
        call.seconds = timer.seconds

    def _call_length(self, index: int) -> int:
        """Steps in the call that begins here. Calls end at fixed places, resumed or not."""
        count = min(self.steps_per_call - index % self.steps_per_call, self.steps - index)
        step = int(self.state.global_step)
        if self.stop_every:
            count = min(count, self.stop_every - step % self.stop_every)
        if step in self.single:
            return 1
        return min(count, self.single.start - step) if step < self.single.start else count

    def _source_at(self, index: int) -> Any:
        """What the pipeline takes batches from: the last one, unless the state was moved."""
        if self._place != self._position():
            self._source = self.pipeline.begin(self.state.seed, self.state.epoch, index)
            self._place = self._position()
        return self._source

    def _position(self) -> tuple[int, int, int]:
        return int(self.state.seed), int(self.state.epoch), int(self.state.batch_index)

    def warm_up(self) -> None:
        """Trace and compile, by one step that is then taken back."""
        if "train" in self._warm:
            return
        state = self.state
        source = self.pipeline.begin(state.seed, state.epoch, int(state.batch_index))
        with self.taken_back(), self._timed("tracing"):
            last, _ = self.compiled.call(source, tf.constant(1))
            last.sums.numpy()  # waits for the device
        self._warm.add("train")

    @contextlib.contextmanager
    def taken_back(self) -> Iterator[None]:
        """After this block the state is what it was before."""
        variables = list(self.state.named().values())
        before = [variable.numpy() for variable in variables]
        try:
            yield
        finally:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)

    def evaluate(self, split: Split) -> Metrics:
        """Means over all of `split`, with the moving average of the weights where one is kept.

        Raises:
          DivergenceError: the loss is not finite.
          UserError: as `evaluate_with_outputs`.
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
        trained_on = self.data.train.images.dtype
        if split.images.dtype != trained_on:
            raise UserError(
                f"images to evaluate are {split.images.dtype}, those of the training {trained_on}"
            )
        if "evaluate" not in self._warm:
            self._evaluate_rows(split, slice(1), "tracing")
            self._warm.add("evaluate")
        in_memory = isinstance(split.images, np.ndarray)
        at_once = len(split) if in_memory else READ_AT_ONCE
        results = []
        with self.state.using_ema():
            for first in range(0, len(split), at_once):
                rows = slice(first, first + at_once)
                results.append(self._evaluate_rows(split, rows, "evaluation"))
        sums = tf.add_n([sums for sums, _ in results])
        metrics = means(sums)._replace(gradient_norm=None)
        if not math.isfinite(metrics.total):
            raise self._held_out_divergence()
        return metrics, np.concatenate([outputs.numpy() for _, outputs in results])

    def _evaluate_rows(self, split: Split, rows: slice, what: str) -> tuple[tf.Tensor, tf.Tensor]:
        """(sums [SUMS], outputs) of some rows; the time counts as `what`, without reading them."""
        images, labels = tf.constant(split.images[rows]), tf.constant(split.labels[rows], tf.int64)
        with self._timed(what):
            sums, outputs = self._evaluate.call(images, labels)
            sums.numpy()  # waits for the device
        return sums, outputs

    def _evaluate_all(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The sums of train_step over all images, in batches of static size, and the outputs."""
        state, size = self.state, tf.shape(labels)[0]
        batches = (size + EVALUATION_BATCH - 1) // EVALUATION_BATCH
        missing = batches * EVALUATION_BATCH - size

        def cut(x: tf.Tensor) -> tf.Tensor:
            """[batches, EVALUATION_BATCH, …]; the last image fills up the last batch."""
            filled = tf.concat([x, tf.repeat(x[-1:], missing, axis=0)], axis=0)
            return tf.reshape(filled, [-1, EVALUATION_BATCH, *x.shape[1:]])

        images, labels = cut(images), cut(labels)

        def body(i: tf.Tensor, sums: tf.Tensor, outputs: tf.TensorArray) -> tuple:
            rows = i * EVALUATION_BATCH + tf.range(EVALUATION_BATCH)
            sample_weight = tf.cast(rows < size, tf.float32)
            logits, truth = state.predict(images[i], self.forward), labels[i]
            values = [
                example_losses(state, truth, logits),
                is_correct(logits, truth),
                tf.fill([EVALUATION_BATCH], model_losses(state)),
            ]
            sums += tf.linalg.matvec(tf.stack(values), sample_weight)
            return i + 1, sums, outputs.write(i, logits)

        shape = [EVALUATION_BATCH, *self._output_shape]
        outputs = tf.TensorArray(tf.float32, batches, element_shape=shape)
        _, sums, outputs = tf.while_loop(
            lambda i, *_: i < batches,
            body,
            (tf.constant(0), tf.zeros([3]), outputs),
            parallel_iterations=1,
        )
        examples = tf.cast(size, tf.float32)
        data, accuracy, model = tf.unstack(sums / examples)
        metrics = tf.stack([*losses(state, data, model), accuracy, 0.0])
        return tf.concat([[1.0, examples], examples * metrics], axis=0), outputs.concat()[:size]

    def run(self, epochs: int) -> Iterator[Call | Epoch]:
        """Train until `epochs` epochs are done: a Call per compiled call, an Epoch per epoch.

        The state moves on only as records are taken, so code between them sees it as the record
        says, and may change it: any variable of `state.hyper`, or `state.reset(...)`.

        Raises:
          DivergenceError: the loss or a gradient is NaN or infinite; the state is that before the
            step.
        """
        yield from self._alone(self.pending(epochs))

    def pending(self, epochs: int) -> Iterator[PendingCall | Call | Epoch]:
        """`run`, where whoever takes a PendingCall makes it before taking more."""
        state = self.state
        state.diverged.assign(False)
        learning_rate = float(state.schedule(tf.maximum(state.schedule_step - 1, 0)))
        while int(state.epoch) < epochs:
            before, first = self.seconds["training"], int(state.batch_index)
            for item in self.pending_epoch():
                if isinstance(item, Call):
                    learning_rate = item.learning_rate
                yield item
            train = means(state.totals)
            test, outputs, validation = None, None, None
            if len(self.data.test):
                test, outputs = self.evaluate_with_outputs(self.data.test)
            if len(self.data.validation):
                validation = self.evaluate(self.data.validation)
            state.epoch.assign_add(1)
            state.batch_index.assign(0)
            state.totals.assign(tf.zeros_like(state.totals))
            yield Epoch(
                int(state.epoch),
                int(state.global_step),
                train,
                test,
                validation,
                learning_rate,
                self.seconds["training"] - before,
                self.steps - first,
                outputs,
            )

    def fit(self, epochs: int) -> Epoch | None:
        """`run` to its end; the last epoch's record, None where no epoch was left to do."""
        last = None
        for record in self.run(epochs):
            if isinstance(record, Epoch):
                last = record
        return last

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator["_Timer"]:
        """Count this block's seconds, and say what an error of TensorFlow in it means."""
        checked = self.state.non_trainable.values() if self._check_numerics else []
        before = [variable.numpy() for variable in checked]
        timer = _Timer(time.perf_counter())
        try:
            yield timer
        except tf.errors.OpError as error:
            if self.pipeline.error:
                raise self.pipeline.error from None
            # That of tf.debugging.enable_check_numerics().
            found = re.search(r'Infinity or NaN in output \d+ of .*op "(\w+)"', error.message)
            if not found:
                raise
            tf.debugging.disable_check_numerics()  # it has found what it was to find
            for variable, value in zip(checked, before, strict=True):
                variable.assign(value)
            where = f", first in the operation {found[1]}"
            is_training = what != "evaluation"
            diverged = self._divergence if is_training else self._held_out_divergence
            raise diverged(where) from None
        timer.seconds = time.perf_counter() - timer.started
        self.seconds[what] += timer.seconds

    def _held_out_divergence(self, operation: str = "") -> DivergenceError:
        step = int(self.state.global_step)
        message = (
            f"step {step}: the loss on the images held out is NaN or infinite{operation}; try a "
            "lower --learning_rate"
        )
        return DivergenceError(message, step, "loss")

    def _divergence(self, operation: str = "") -> DivergenceError:
        """Do the step that failed once more, layer by layer, to name the first bad value."""
        state, step = self.state, int(self.state.global_step)
        before = [variable.numpy() for variable in state.non_trainable.values()]
        batch = self.batch(int(state.batch_index))
        what, layer = self._first_not_finite(batch)
        for variable, value in zip(state.non_trainable.values(), before, strict=True):
            variable.assign(value)
        where = f"the {what}" if what == layer else f"the {what} of {layer}"
        rate = float(state.schedule(state.schedule_step))
        message = (
            f"step {step}: {where} became NaN or infinite{operation}, at rate {rate:.4g}; the "
            "weights are those before this step. Try a lower --learning_rate"
        )
        return DivergenceError(message, step, layer)

    def _first_not_finite(self, batch: Batch) -> tuple[str, str]:
        """(what, layer): the first of the step's values, in their order, that is not finite."""
        state, key = self.state, self.state.key()
        images = state.inputs(batch.images, key)
        activations = list(models.activations(state.model, images, batch.sample_weight, True, key))
        result = forward_and_backward(state, batch)
        for name, weight in state.weights.items():
            if not _is_finite(weight):
                return "weights", name.split("/")[0]
        for layer, activation in activations:
            if not _is_finite(activation):
                return "activations", layer
        if not _is_finite(result.loss.total):
            return "loss", "loss"
        for name, gradient in result.gradients.items():
            if not _is_finite(gradient):
                return "gradients", name.split("/")[0]
        return "update", "update"


@dataclasses.dataclass
class _Timer:
    started: float
    seconds: float = 0.0


def _is_finite(values: tf.Tensor) -> bool:
    return bool(tf.reduce_all(tf.math.is_finite(values)))


def _check_data(data: Dataset, sizes: dict[str, int]) -> None:
    """Raises UserError for what is no data set, and sizes that it does not suffice for."""
    if not isinstance(data, Dataset):
        raise UserError(
            f"expected a tfloop.Dataset, found {type(data).__name__}; tfloop.from_arrays(…) and "
            "tfloop.load(…) make one"
        )
    for name, value in sizes.items():
        check_setting(name, value)
    if sizes["batch_size"] > len(data.train):
        raise UserError(
            f"--batch_size={sizes['batch_size']} is larger than the {len(data.train)} training "
            "images"
        )


def _check_fit(state: TrainState, data: Dataset) -> tf.TensorShape:
    """The shape of the model's outputs for one image.

    Raises:
      UserError: the model takes other images, or gives outputs that do not fit the classes.
    """
    _check_takes(state.model, data.image_shape)
    outputs = models.logits(state.model, state.standardize(data.train.images[:1]))
    if not tf.is_tensor(outputs) or len(outputs.shape) != 2:
        is_tensor = tf.is_tensor(outputs)
        found = f"shape {tuple(outputs.shape)}" if is_tensor else type(outputs).__name__
        raise UserError(
            f"the model gives {found} for a batch of one image; expected one tensor [batch, "
            "outputs]"
        )
    if state.loss is None and outputs.shape[1] < data.classes:
        raise UserError(
            f"the model gives outputs of shape {tuple(outputs.shape[1:])} for an image; the data "
            f"have {data.classes} classes"
        )
    return outputs.shape[1:]


def _check_takes(model: Any, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError where the model says what images it takes, and they are others."""
    is_built = isinstance(model, keras.Model) and model.built
    shape = getattr(model, "input_shape", None) if is_built else None
    if not isinstance(shape, tuple) or len(shape) != 4:
        return
    pairs = zip(shape[1:], image_shape, strict=True)
    if any(side not in (None, found) for side, found in pairs):
        raise UserError(
            f"the model takes images of {shape_text(shape[1:])}, the data have "
            f"{shape_text(image_shape)}"
        )
