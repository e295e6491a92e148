"""The training loop around `step.train_step`: train_epoch → evaluate → run → fit.

What is not the story (files, plots, checkpoints) consumes the records that `run` yields.
"""

import contextlib
import dataclasses
import functools
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tfloop import divergence, models, parallelism
from tfloop.compatibility import batch_size_of, check_data, check_fit
from tfloop.config import check_setting
from tfloop.criterion import Criterion, Every, default, given
from tfloop.data import pipelines
from tfloop.data.dataset import Dataset, Split
from tfloop.data.pipelines import Batch
from tfloop.data.tf_data import failure_of
from tfloop.errors import UserError, WithoutGradient
from tfloop.evaluator import Evaluator
from tfloop.keras_optimizers import KerasOptimizer
from tfloop.metrics import Metrics, means
from tfloop.nests import leaves, map_leaves
from tfloop.records import Call, CallPart, Epoch, Evaluation, Record
from tfloop.scores import scores
from tfloop.state import TrainState
from tfloop.step import (
    Step,
    accumulated,
    forward_and_backward,
    no_step,
    rows_of,
    train_step,
)
from tfloop.stopping import Pace, StopAsked, interruptible
from tfloop.tracing import Traced
from tfloop.vectors import Vector
from tfloop.wording import names_text

# Chosen so that a call lasts about half a second: Ctrl-C waits for its end.
STEPS_PER_CALL = {"CPU": 50, "GPU": 500}


@dataclasses.dataclass(eq=False)
class PendingCall:
    """Steps that a loop is ready to make.

    `Loop.make` makes them, or an ensemble does, side by side with those of other loops: in one
    compiled call where that is short, or in several, each of which goes on with the sums of the one
    before, bit for bit as in one.
    """

    loop: "Loop"
    source: Any  # what the loop's pipeline takes batches from
    count: int
    part: CallPart  # what was made of it in an earlier process
    made: int = 0  # steps, of `count`
    last: Step | None = None  # of the steps made, with the sums of all
    waited: float = 0.0  # seconds, of these
    seconds: float = 0.0

    @property
    def so_far(self) -> tuple[tf.Tensor, tf.Tensor]:
        """What the next steps go on from: (the sums, the largest loss of a step)."""
        if self.last is not None:
            return self.last.sums, self.last.worst
        if self.part.sums:
            return tf.constant(self.part.sums, tf.float64), tf.constant(self.part.worst)
        return tf.zeros(self.loop.state.totals.shape, tf.float64), tf.constant(tf.float32.min)

    @property
    def is_open(self) -> bool:
        """Are there steps to make, and did none diverge?"""
        return self.made < self.count and not (self.made and self.loop.state.diverged)

    def add(self, steps: int, last: Step, waited: float, seconds: float) -> None:
        """So many more steps were made."""
        self.made += steps
        self.last = last
        self.waited += waited
        self.seconds += seconds


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
      shards: parts of a batch that are computed side by side.
      graph: that of the compiled step, for TensorBoard; None where nothing is compiled yet, or
        ever.
      single: steps, by the global_step before each, that get a compiled call of their own.
      stop_every: calls end at every multiple of this global_step, for a checkpoint; 0: at none.
      stop_at: a call ends at this global_step; None: at none more.
      evaluate_every: how often is evaluated.
      criterion: what a schedule that looks at evaluations goes by; None: the validation accuracy,
        or loss.
      beside: ensemble.SideBySide, where this loop's calls are made together with those of others.
      options: tf.function's, for what makes a whole call.
      is_warm: is the step traced and compiled?
      classifies: is there an output for each class, so that accuracy means something?
      grad_fn: computes loss and gradients of a step's batch.
      is_fast: is the forward pass rearranged?
      stop: asked between compiled calls and between batches of an evaluation; where it says true,
        StopAsked is raised.
      part: what was made of the call that comes next; None for none of it.
    """

    def __init__(
        self,
        state: TrainState,
        data: Dataset,
        *,
        batch_size: int = 64,
        evaluation_batch_size: int = 0,
        pipeline: str = "auto",
        steps_per_call: int = 0,
        jit_compile: bool = False,
        eager: bool = False,
        fast: bool = True,
        shards: int = 0,
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
          evaluation_batch_size: images that an evaluation puts through the model at once; 0: as
            many as a part of a training step.
          pipeline: "auto", "host", "prefetch" or "resident" (see `pipelines`).
          steps_per_call: steps in one compiled call; 0 chooses.
          jit_compile: compile the step with XLA; on a GPU with resident images, all steps of a
            call.
          eager: run the step op by op.
          fast: rearrange the forward pass (see `models.fast`).
          shards: parts of a batch to compute side by side, with `fast`; 0 chooses: as many as
            TensorFlow runs operations side by side, where each has one thread, as after
            `tfloop.start()`; else 1.
          accumulate: parts of a batch to compute one after the other.
          replicas: machine.replicas.Replicas to compute on, in whose scope the model was made; the
            batch is that of all together.
          grad_fn: computes loss and gradients in place of `forward_and_backward`; takes the same
            (state, batch, part).
          time_input: measure the wait for batches, for which TensorFlow's op determinism leaves no
            operation.
          check_numerics: tf.debugging.enable_check_numerics() is on, which breaks off a step half
            done: one step a call.

        Raises:
          UserError: a batch larger than the data; a model that does not take the images, or whose
            outputs do not fit the classes or are probabilities where logits are meant.
        """
        if not isinstance(state, TrainState):
            raise UserError(
                f"expected a tfloop.TrainState, found {type(state).__name__}; "
                "tfloop.TrainState(model) makes one"
            )
        batch_size = batch_size_of(data, batch_size)
        sizes = {
            "batch_size": batch_size,
            "steps_per_call": steps_per_call,
            "shards": shards,
            "accumulate": accumulate,
        }
        check_data(data, sizes)
        batch_size, steps_per_call, shards, accumulate = map(int, sizes.values())
        if batch_size % accumulate:
            raise UserError(f"--accumulate={accumulate} does not divide --batch_size={batch_size}")
        check_setting("evaluation_batch_size", evaluation_batch_size)
        self.evaluation_batch_size = evaluation_batch_size or batch_size // accumulate
        outputs = check_fit(state, data, batch_size // accumulate)
        self.classifies = state.objective.classifies
        _check_replicas(state, replicas, accumulate)
        self.state, self.data = state, data
        self.graph: tf.Graph | None = None
        self.single, self.stop_every = range(0), 0
        self.stop_at: int | None = None
        self.evaluate_every = Every(1, 0)
        self.criterion: Criterion | None = None
        self.beside: Any = None
        self._place: tuple[int, int, int] | None = None
        self._source: Any = None
        self._eager, self.is_warm = eager, False
        self.stop: Callable[[], bool] = lambda: False
        self.part: CallPart | None = None
        # Several workers make the same calls: TensorFlow adds up what belongs to one iteration.
        self._pace = Pace(1) if not replicas or replicas.workers == 1 else None
        self._has_replicas = replicas is not None
        worker = (replicas.worker, replicas.workers, replicas.total) if replicas else ()
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
        self.forward = models.outputs
        if not shards:
            parts = accumulate * (replicas.total if replicas else 1)
            is_one = eager or jit_compile or not fast or kind == "GPU"
            shards = 1 if is_one else _shards_for_threads(batch_size // parts)
        self.shards = shards
        if fast:
            self.forward = functools.partial(models.outputs, fast=True, shards=shards)
        grad_fn = grad_fn or functools.partial(forward_and_backward, forward=self.forward)
        if accumulate > 1:
            grad_fn = accumulated(grad_fn, accumulate)
        if replicas:
            grad_fn = replicas.grad_fn(grad_fn)
        self.grad_fn, self.is_fast = grad_fn, fast
        self._evaluator = Evaluator(
            state,
            data,
            self.evaluation_batch_size,
            self.forward,
            outputs,
            self._timed,
            eager,
            lambda: self.stop(),
        )
        self._compiles_steps = jit_compile and not compiles_whole
        self._make_step()
        self.compiled = Traced(self.train_steps, "the training step", eager, **self.options)
        state.follow_model()
        self._changes = state.changes

    @property
    def traces(self) -> dict[str, int]:
        """{"train", "evaluate"}: how often each was traced; 1 each, in a whole process.

        An evaluation is traced once for each number of images that its last batch has.
        """
        train = (self.beside or self).compiled.traces
        return {"train": train, "evaluate": self._evaluator.traces}

    def train_steps(
        self, source: Any, steps: tf.Tensor, sums: tf.Tensor, worst: tf.Tensor
    ) -> tuple[Step, tf.Tensor]:
        """`steps` steps in one call: (the last step, with the sums of all; seconds of waiting).

        A count that is a tensor keeps one trace for all counts. The seconds are those spent waiting
        for batches.

        Args:
          source: what the pipeline takes batches from.
          steps: how many.
          sums, worst: of the steps before these that count with them.
        """
        pipeline = self.pipeline
        # Read once: on a GPU no step then waits for the one before to tell it.
        first = tf.cast(self.state.batch_index, tf.int32)

        def body(i: tf.Tensor, total: Step, waited: tf.Tensor) -> tuple:
            if not tf.executing_eagerly():
                self.graph = tf.compat.v1.get_default_graph()
            batch, seconds = self._take(source, first + i, pipeline.batch_size)
            # TensorBoard's graph then has the layers on top, not inside the loop.
            with tf.compat.v1.name_scope(None):
                step = self._step(batch, part=pipeline.part(pipeline.batch_size))
            return i + 1, step.after(total), waited + seconds

        def last_step() -> tuple:
            batch, seconds = self._take(source, first + full, pipeline.rest)
            step = self._step(batch, part=pipeline.part(pipeline.rest))
            return step.after(total), waited + seconds

        full = tf.clip_by_value(pipeline.full - first, 0, steps)  # of these steps
        before = no_step(self.state)._replace(sums=sums, worst=worst)
        start = (tf.constant(0), before, tf.constant(0.0, tf.float64))
        _, total, waited = tf.while_loop(lambda i, *_: i < full, body, start, parallel_iterations=1)
        if pipeline.rest:  # the epoch's last step has another shape
            total, waited = tf.cond(full < steps, last_step, lambda: (total, waited))
        return total, waited

    def _take(self, source: Any, index: tf.Tensor, rows: int) -> tuple[Batch, tf.Tensor]:
        """(the batch with this index, the seconds it was waited for)."""
        if not self._time_input:
            with tf.name_scope("input/"):
                return self.pipeline.take(source, index, rows), tf.constant(0.0, tf.float64)
        started = tf.timestamp()
        with tf.control_dependencies([started]), tf.name_scope("input/"):
            batch = self.pipeline.take(source, index, rows)
        with tf.control_dependencies(leaves(batch)):
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
            self._follow_model()
            part, self.part = self.part or CallPart(), None
            call = PendingCall(self, self._source_at(index), self._call_length(index), part)
            # Until the call has gone well, what it took of the source is not taken for granted.
            self._place = None
            step = int(state.global_step)
            with tf.profiler.experimental.Trace("train", step_num=step, _r=1):
                yield call  # the trace marks it in a profile
            if call.last is not None:
                self._note_rate()
                if state.diverged:
                    raise divergence.of_step(self.state, self.batch(int(self.state.batch_index)))
            if call.made < call.count or call.last is None:
                self.part = self._part_of(call)
                raise StopAsked
            last, count = call.last, call.count
            self._place = self._position()
            yield Call(
                int(state.epoch) + 1,
                int(state.global_step),
                index + count,
                part.steps + count,
                self._means(last.sums),
                float(last.worst),
                float(last.learning_rate),
                part.seconds + call.seconds,
                part.waited + call.waited,
                Vector(last.gradient, state.weights),
                Vector(last.update, state.weights),
            )

    @staticmethod
    def _part_of(call: PendingCall) -> CallPart | None:
        """What is made of a call that was broken off; None for none of it."""
        before, last = call.part, call.last
        if last is None:
            return before if before.sums else None
        return CallPart(
            before.steps + call.made,
            tuple(last.sums.numpy().tolist()),
            float(last.worst),
            before.seconds + call.seconds,
            before.waited + call.waited,
        )

    def make(self, call: PendingCall) -> None:
        """Make the steps of `call`, in compiled calls of their own, or some where one is to stop.

        Raises:
          StopAsked: while it was traced.
        """
        while call.is_open and not self.stop():
            self.warm_up()
            steps = call.count - call.made
            if self._pace:
                steps = self._pace.next(steps)
            with self._timed("training") as timer:
                last, waited = self.compiled.call(call.source, tf.constant(steps), *call.so_far)
                last.sums.numpy()  # waits for the device: what a call returns, it returns at once
            call.add(steps, last, float(waited), timer.seconds)
            if self._pace:
                self._pace.note(steps, timer.seconds)

    def _call_length(self, index: int) -> int:
        """Steps in the call that begins here. Calls end at fixed places, resumed or not."""
        count = min(self.steps_per_call - index % self.steps_per_call, self.steps - index)
        step = int(self.state.global_step)
        for every in (self.stop_every, self.evaluate_every.steps):
            if every:
                count = min(count, every - step % every)
        if self.stop_at is not None and step < self.stop_at:
            count = min(count, self.stop_at - step)
        if step in self.single:
            return 1
        return min(count, self.single.start - step) if step < self.single.start else count

    def _source_at(self, index: int) -> Any:
        """What the pipeline takes batches from: the last one, unless the state was moved."""
        seed, epoch, _ = position = self._position()
        goes_on = self.pipeline.goes_on and self._place == (seed, epoch - 1, self.steps)
        if self._place != position and not (goes_on and index == 0):
            self._source = self.pipeline.begin(self.state.seed, self.state.epoch, index)
        self._place = position
        return self._source

    def _position(self) -> tuple[int, int, int]:
        return int(self.state.seed), int(self.state.epoch), int(self.state.batch_index)

    def _follow_model(self) -> None:
        """Trace anew where layers were frozen or unfrozen since the last call."""
        if isinstance(self.state.optimizer, KerasOptimizer):
            self.state.optimizer.check_rate()
        self.state.follow_model()
        if self._changes != self.state.changes:
            self.renew("; ".join(self.state.changes[len(self._changes) :]))

    def _note_rate(self) -> None:
        if isinstance(self.state.optimizer, KerasOptimizer):
            self.state.optimizer.note_rate()

    def _make_step(self) -> None:
        self._step: Callable = functools.partial(train_step, self.state, grad_fn=self.grad_fn)
        if self._compiles_steps:
            self._step = tf.function(self._step, autograph=False, jit_compile=True)

    def renew(self, reason: str) -> None:
        """Have the training step traced anew at its next call, and the evaluations."""
        self._changes = self.state.changes
        self._make_step()
        (self.beside or self).compiled.renew(reason)
        (self.beside or self).is_warm = False
        self._evaluator.forget()

    def warm_up(self) -> None:
        """Trace and compile, without a step.

        XLA compiles a single step only when it is made; then it is one that is taken back.
        """
        if self.is_warm:
            return
        with self._timed("tracing"), self.state.looking():
            with self.taken_back():
                missing = self._try_trace()
            if missing:  # its slots are made anew, so they are taken back anew
                self.leave_out(missing)
                with self.taken_back():
                    self._trace()
        self.is_warm = True

    def _try_trace(self) -> list[str]:
        """Trace; the names of weights without a gradient, for which it is to be done again."""
        try:
            self._trace()
        except WithoutGradient as found:
            return found.names
        return []

    def _trace(self) -> None:
        state = self.state
        if self._eager:
            with interruptible():
                _look(state, rows_of(self.batch(int(state.batch_index)), 0, 1))
            return
        source = self.pipeline.begin(state.seed, state.epoch, int(state.batch_index))
        none = PendingCall(self, source, 0, CallPart()).so_far
        steps = self.steps_to_compile()
        # Of several workers, all make their operations in one order, from one thread.
        stays = steps > 0 or self._has_replicas
        last, _ = self.compiled.begin(stays, source, tf.constant(steps), *none)
        last.sums.numpy()  # waits for the device

    def steps_to_compile(self) -> int:
        """Steps that are made and taken back to compile all: one where XLA compiles steps."""
        return int(self._compiles_steps and int(self.state.batch_index) < self.steps)

    def leave_out(self, names: list[str]) -> None:
        """Go on without weights that have no gradient, and say so."""
        self.state.leave_out(names)
        self._evaluator.forget()
        self._changes = self.state.changes
        self._make_step()
        (self.beside or self).compiled.renew()
        warnings.warn(
            f"the loss does not depend on {', '.join(names)}: not trained, decayed or penalised",
            stacklevel=2,
        )

    @contextlib.contextmanager
    def taken_back(self) -> Iterator[None]:
        """After this block the state is what it was before."""
        before = {id(v): (v, v.numpy()) for v in self.state.named().values()}
        part, self.part = self.part, None
        try:
            yield
        finally:
            self.part = part
            for variable in self.state.named().values():  # slots may have been made anew
                if id(variable) in before:
                    variable.assign(before[id(variable)][1])
            self._note_rate()

    def evaluate(self, split: Split) -> Metrics:
        """Means over all of `split`, with the moving average of the weights where one is kept.

        Raises:
          DivergenceError: the loss is not finite.
          UserError: as `evaluate_with_outputs`.
        """
        return self.evaluate_with_outputs(split)[0]

    def evaluate_with_outputs(self, split: Split) -> tuple[Metrics, Any]:
        """As `evaluate`, and the outputs [examples, …]: what the loss is given, logits of classes.

        Raises:
          DivergenceError: the loss is not finite.
          UserError: there are no examples, or they are of other types than in training.
        """
        self._follow_model()
        sums, outputs = self._evaluator(split)
        metrics = self._means(sums)._replace(gradient_norm=None)
        if not math.isfinite(metrics.total):
            raise divergence.held_out(self.state)
        if objective := self.state.objective if self.state.objective.whole_metrics else None:
            shares = map_leaves(
                np.asarray, self.state.probabilities(map_leaves(tf.constant, outputs))
            )
            more = {**metrics.more, **scores(objective, split.targets, shares)}
            metrics = metrics._replace(more=more)
        return metrics, outputs

    def _means(self, sums: tf.Tensor) -> Metrics:
        """The metrics whose sums these are; without accuracy where there are no classes."""
        metrics = means(sums, self.state.objective.extra)
        return metrics if self.classifies else metrics._replace(accuracy=None)

    def run(self, epochs: int) -> Iterator[Record]:
        """Train until `epochs` epochs are done: a Call per compiled call, an Epoch per epoch.

        Where `evaluate_every` counts steps, there is an Evaluation within an epoch, too.

        The state moves on only as records are taken, so code between them sees it as the record
        says, and may change it: any variable of `state.hyper`, or `state.reset(...)`.

        Raises:
          DivergenceError: the loss or a gradient is NaN or infinite; the state is that before the
            step.
        """
        yield from self._alone(self.pending(epochs))

    def pending(self, epochs: int, evaluates: bool = True) -> Iterator[PendingCall | Record]:
        """`run`, where whoever takes a PendingCall makes it before taking more.

        Args:
          epochs: until so many are done.
          evaluates: unset, there are no evaluations, unless the schedule goes by them.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, (int, np.integer)) or epochs < 0:
            raise UserError(f"epochs={epochs!r}: expected a whole number, from 0 on")
        state = self.state
        state.diverged.assign(False)
        evaluates = evaluates or bool(state.schedule.slots)
        learning_rate = float(state.schedule(tf.maximum(state.schedule_step - 1, 0)))
        if self.part and self.part.learning_rate is not None:  # an evaluation is to come
            learning_rate, self.part = self.part.learning_rate, None
            if int(state.epoch) < epochs and int(state.batch_index) < self.steps:
                yield self._evaluation(learning_rate)
        while int(state.epoch) < epochs:
            before, first = self.seconds["training"], int(state.batch_index)
            for item in self.pending_epoch():
                if isinstance(item, Call):
                    learning_rate = item.learning_rate
                yield item
                if evaluates and isinstance(item, Call) and self.evaluates_after(item):
                    yield self._evaluation(learning_rate)
            train = self._means(state.totals)
            is_due = (int(state.epoch) + 1) % self.evaluate_every.epochs == 0
            test, validation, outputs = None, None, None
            if evaluates and (is_due or int(state.epoch) + 1 == epochs):
                test, validation, outputs = self._evaluate_both(train, learning_rate)
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
                state.digest("weights", "moving") if evaluates else "",
            )

    def evaluates_after(self, call: Call) -> bool:
        """Is it time for an evaluation within the epoch?"""
        steps = self.evaluate_every.steps
        return bool(steps) and call.step % steps == 0 and call.batch_index < self.steps

    def _evaluation(self, learning_rate: float) -> Evaluation:
        state = self.state
        train = self._means(state.totals)
        found = self._evaluate_both(train, learning_rate)
        place = int(state.epoch) + 1, int(state.global_step), int(state.batch_index)
        return Evaluation(*place, train, *found, state.digest("weights", "moving"))

    def _evaluate_both(
        self, train: Metrics, learning_rate: float
    ) -> tuple[Metrics | None, Metrics | None, Any]:
        """(test, validation, outputs for the test examples), each None where there are none."""
        test, outputs, validation = None, None, None
        try:
            if len(self.data.test):
                test, outputs = self.evaluate_with_outputs(self.data.test)
            if len(self.data.validation):
                validation = self.evaluate(self.data.validation)
        except StopAsked:
            self.part = CallPart(learning_rate=learning_rate)
            raise
        if self.state.schedule.slots:
            self._note({"train": train, "test": test, "validation": validation})
        return test, validation, outputs

    def _note(self, found: dict[str, Metrics | None]) -> None:
        """Tell the schedule how an evaluation went."""
        entry = {part: metrics.by_name() for part, metrics in found.items() if metrics}
        by = self.criterion or default(entry)
        value = by.of(entry)
        if value is None and by.name in {"loss", *entry.get(by.part, {})}:
            return  # a metric that failed this time, which was said
        if value is None:
            raise UserError(
                f"--schedule={self.state.schedule.name} goes by the {by.text}, which an evaluation "
                f"does not give; it gives {names_text(given(entry))}; see --validation_size and "
                "--choose_by"
            )
        self.state.schedule.note(value, by.is_max)

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
            if reason := failure_of(error.message):
                raise UserError(f"{self.data.name}: {reason}") from None
            # That of tf.debugging.enable_check_numerics().
            found = re.search(r'Infinity or NaN in output \d+ of .*op "(\w+)"', error.message)
            if not found:
                raise
            tf.debugging.disable_check_numerics()  # it has found what it was to find
            for variable, value in zip(checked, before, strict=True):
                variable.assign(value)
            where = f", first in the operation {found[1]}"
            if what == "evaluation":
                raise divergence.held_out(self.state, where) from None
            batch = self.batch(int(self.state.batch_index))
            raise divergence.of_step(self.state, batch, where) from None
        timer.seconds = time.perf_counter() - timer.started
        self.seconds[what] += timer.seconds


@dataclasses.dataclass
class _Timer:
    started: float
    seconds: float = 0.0


def _check_replicas(state: TrainState, replicas: Any, accumulate: int) -> None:
    """Raises UserError for what does not work on several replicas."""
    if replicas is None or replicas.total == 1:
        return
    if replicas.workers > 1 and state.augmentation.mixes:
        raise UserError(
            f"{names_text(state.augmentation.names)}: examples are mixed within a batch, "
            "which lies on several workers; leave mixup and cutmix out"
        )
    if isinstance(state.optimizer, KerasOptimizer):
        raise UserError(
            f"a Keras optimizer ({state.optimizer.name}) does not work on several replicas; take "
            "one of tfloop's rules by name"
        )
    if accumulate > 1 and any(map(models.over_parts_of, models.keras_layers(state.model))):
        raise UserError(
            f"--accumulate={accumulate}: batch normalisation looks at all replicas, which does not "
            "work in parts one after the other; take more replicas or a smaller batch"
        )


def _shards_for_threads(rows: int) -> int:
    """Parts of so many rows that suit the threads which TensorFlow has."""
    threads = tf.config.threading
    if threads.get_intra_op_parallelism_threads() != 1:
        return 1
    return parallelism.shards(rows, threads.get_inter_op_parallelism_threads() or 1)


def _look(state: TrainState, batch: Batch) -> None:
    """Find weights without a gradient without a step: in a trace, or else in a pass that is run.

    Raises:
      WithoutGradient: there are some.
    """
    traced = tf.function(lambda: forward_and_backward(state, batch).loss, autograph=False)
    try:
        traced.get_concrete_function()
    except (WithoutGradient, UserError):
        raise
    except Exception:  # a model that runs op by op alone, whatever it raises
        forward_and_backward(state, batch)
