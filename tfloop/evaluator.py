"""Evaluation: the means over a part of a data set, and the outputs.

Where that is short it is one compiled call. Otherwise it is several, each of which goes on with the
sums of the one before, so that the result has the same bits, however it is cut.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import tensorflow as tf

from tfloop.data.dataset import Dataset, Split
from tfloop.data.pipelines import Batch
from tfloop.errors import UserError
from tfloop.nests import filled, leaves, map_leaves, named_leaves
from tfloop.state import TrainState
from tfloop.step import judged, losses, model_losses, rows_of
from tfloop.stopping import Pace, StopAsked, interruptible
from tfloop.tracing import Traced

KEPT = 8  # traces of evaluations, for as many sizes of the last batch
READ_AT_ONCE = 4096  # examples that are read from disk, where they do not lie in memory
Timed = Callable[[str], AbstractContextManager]


class Evaluator:
    """Evaluates a state on parts of its data.

    Attributes:
      batch_size: examples that go through the model at once.
    """

    def __init__(
        self,
        state: TrainState,
        data: Dataset,
        batch_size: int,
        forward: Callable,
        outputs: Any,
        timed: Timed,
        eager: bool,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make one.

        Args:
          state: whose model.
          data: that it is trained on.
          batch_size: examples that go through the model at once.
          forward: `models.outputs`, or that with options.
          outputs: a nest of tensors, as the model gives them.
          timed: counts the seconds of a block as "evaluation" or "tracing".
          eager: run op by op.
          stop: asked between compiled calls; where it says true, StopAsked is raised.
        """
        self.batch_size = batch_size
        self._state, self._data, self._forward = state, data, forward
        self._output_shapes = map_leaves(lambda x: x.shape[1:], outputs)
        self._timed, self._eager = timed, eager
        self._made: dict[tuple[bool, int], Traced] = {}
        self._stop, self._pace = stop, Pace(8)

    @property
    def traces(self) -> int:
        """How often the evaluation of one size was traced."""
        return max((made.traces for made in self._made.values()), default=0)

    def forget(self) -> None:
        """Trace anew at the next call."""
        self._made.clear()

    def __call__(self, split: Split) -> tuple[tf.Tensor, Any]:
        """(sums as those of a step, a nest of outputs as arrays [examples, …]).

        Raises:
          UserError: there are no examples, or they are of other types than in training.
        """
        self._check(split)
        size, count = self.batch_size, len(split)
        most = count if split.is_in_memory else max(READ_AT_ONCE // size, 1)
        evaluation = self._evaluation(count)
        results: list[Any] = []
        first, sums, means = 0, tf.zeros([self._sums], tf.float64), None
        with self._state.using_ema():
            while first < count:
                if self._stop():
                    raise StopAsked
                batches = min(most, self._pace.next(-(-(count - first) // size)))
                rows = slice(first, min(first + batches * size, count))
                inputs = self._inputs(split, rows)
                with self._timed("evaluation") as timer:
                    sums, means, outputs = evaluation.call(*inputs, tf.constant(rows.stop), sums)
                    means.numpy()  # waits for the device
                self._pace.note(batches, timer.seconds)
                results.append(outputs)
                first = rows.stop

        def join(*parts: tf.Tensor) -> np.ndarray:
            return np.concatenate([part.numpy() for part in parts])

        return means, map_leaves(join, *results)

    def _check(self, split: Split) -> None:
        trained, noun = self._data.train, self._data.noun
        if not len(split):
            raise UserError(f"there are no {noun} to evaluate")
        for what, ours, theirs in (
            (noun if noun == "images" else "inputs", trained.inputs, split.inputs),
            ("targets", trained.targets, split.targets),
        ):
            expected, found = dict(named_leaves(ours)), dict(named_leaves(theirs))
            if expected.keys() != found.keys():
                raise UserError(
                    f"{what} to evaluate are {', '.join(found) or 'one array'}, those of the "
                    f"training {', '.join(expected) or 'one array'}"
                )
            for name, array in found.items():
                if array.dtype != expected[name].dtype:
                    of = f" of {name}" if name else ""
                    raise UserError(
                        f"{what}{of} to evaluate are {array.dtype}, those of the training "
                        f"{expected[name].dtype}"
                    )
                one, two = tuple(array.shape[1:]), tuple(expected[name].shape[1:])
                pairs = zip(one, two, strict=False)
                if len(one) != len(two) or any(b not in (None, a) for a, b in pairs):
                    of = f" of {name}" if name else ""
                    raise UserError(
                        f"{what}{of} to evaluate are {one}, those of the training {two}"
                    )

    @property
    def _sums(self) -> int:
        """How many sums are kept: of data loss, accuracy, model loss and the user's own metrics."""
        return 3 + len(self._state.objective.extra)

    def _inputs(self, split: Split, rows: slice) -> tuple[Any, Any, tf.Tensor]:
        """(inputs, targets, weight) of some rows."""
        inputs = map_leaves(tf.constant, split.rows(rows))
        targets = map_leaves(lambda array: tf.constant(array[rows]), split.targets)
        weight = tf.ones([leaves(targets)[0].shape[0]])
        if split.sample_weight is not None:
            weight = tf.constant(split.sample_weight[rows])
        return inputs, targets, weight

    def _evaluation(self, rows: int) -> Traced:
        """The compiled evaluation of so many rows in all: one for each size of a last batch."""
        full, rest = divmod(rows, self.batch_size)
        key = full > 0, rest
        if key not in self._made:
            if len(self._made) == KEPT:
                del self._made[next(iter(self._made))]
            function = functools.partial(self._evaluate_all, full=full > 0, rest=rest)
            self._made[key] = Traced(
                function, "the evaluation", self._eager, input_signature=self._signature()
            )
        made = self._made[key]
        if not self._eager and not made.traces:
            with self._timed("tracing"), interruptible():
                made.call.get_concrete_function()
        return made

    def _signature(self) -> list:
        def spec(array: Any) -> tf.TensorSpec:
            kind = tf.string if array.dtype == object else tf.as_dtype(array.dtype)
            return tf.TensorSpec([None, *array.shape[1:]], kind)

        train = self._data.train
        nests = [map_leaves(spec, nest) for nest in (train.inputs, train.targets)]
        scalars = tf.TensorSpec([], tf.int32), tf.TensorSpec([self._sums], tf.float64)
        return [*nests, tf.TensorSpec([None], tf.float32), *scalars]

    def _evaluate_all(
        self,
        inputs: Any,
        targets: Any,
        weight: tf.Tensor,
        count: tf.Tensor,
        sums: tf.Tensor,
        full: bool,
        rest: int,
    ) -> tuple[tf.Tensor, tf.Tensor, Any]:
        """(the sums to go on with, the sums as those of train_step, the outputs).

        Args:
          inputs, targets, weight: of these rows.
          count: rows until here, those before these included.
          sums: to go on with, of the rows before these.
          full: are there full batches?
          rest: rows of the last batch of all, behind those; 0 for none.
        """
        state, size, rows = self._state, self.batch_size, tf.shape(weight)[0]
        batches = rows // size
        everything = Batch(inputs, targets, weight)

        def of_batch(first: tf.Tensor, size: int) -> tuple[tf.Tensor, list[tf.Tensor]]:
            """(Σ over its examples of data loss, accuracy, model loss and more, the outputs)"""
            batch = rows_of(everything, first, size)
            outputs = map_leaves(_as_float32, state.predict(batch.inputs, self._forward))
            each, correct, more = judged(state, batch.targets, outputs)
            common = [
                tf.reduce_sum(batch.sample_weight * each),
                tf.reduce_sum(correct),
                size * model_losses(state),
            ]
            sums = tf.concat([tf.stack(common), tf.reduce_sum(more, axis=0)], axis=0)
            return tf.cast(sums, tf.float64), leaves(outputs)

        def body(i: tf.Tensor, sums: tf.Tensor, outputs: list[tf.TensorArray]) -> tuple:
            new, found = of_batch(i * size, size)
            pairs = zip(outputs, found, strict=True)
            return i + 1, sums + new, [array.write(i, value) for array, value in pairs]

        def last_batch() -> tuple[tf.Tensor, list[tf.Tensor]]:
            return of_batch(batches * size, rest)

        def no_batch() -> tuple[tf.Tensor, list[tf.Tensor]]:
            return tf.zeros_like(sums), [tf.zeros([0, *shape]) for shape in shapes]

        shapes = leaves(self._output_shapes)
        found: list[list[tf.Tensor]] = [[] for _ in shapes]
        if full:
            arrays = [
                tf.TensorArray(tf.float32, batches, element_shape=[size, *shape])
                for shape in shapes
            ]
            begin = tf.constant(0), sums, arrays
            _, sums, arrays = tf.while_loop(
                lambda i, *_: i < batches, body, begin, parallel_iterations=1
            )
            for parts, array in zip(found, arrays, strict=True):
                parts.append(array.concat())
        if rest:
            is_last = rows > batches * size
            new, last = tf.cond(is_last, last_batch, no_batch) if full else last_batch()
            sums = sums + new
            for parts, value in zip(found, last, strict=True):
                parts.append(value)
        examples = tf.cast(count, tf.float64)
        data, accuracy, model, *more = tf.unstack(sums / examples)
        loss = losses(state, tf.cast(data, tf.float32), tf.cast(model, tf.float32))
        metrics = tf.concat(
            [tf.cast(tf.stack(loss), tf.float64), tf.stack([accuracy, 0.0, *more])], axis=0
        )
        whole = [tf.concat(parts, axis=0) if len(parts) > 1 else parts[0] for parts in found]
        means = tf.concat([[1.0, examples], examples * metrics], axis=0)
        return sums, means, filled(self._output_shapes, whole)


def _as_float32(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32)
