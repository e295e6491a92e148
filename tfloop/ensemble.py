"""Several models side by side: the steps that their loops are ready to make go into one compiled call.

Each model keeps a loop and a state of its own, so it is trained as it would be alone; only the calls are shared. In the
graph that results nothing of one model waits for another: TensorFlow computes them at the same time, and each needs no
more than one core, so no operation is cut into parts and no part is waited for (`benchmarks/ensemble.py`).
"""

import contextlib
import time
from collections.abc import Callable, Generator, Sequence

import numpy as np
import tensorflow as tf

from tfloop import models
from tfloop.errors import DivergenceError
from tfloop.loop import Loop, Ready
from tfloop.tracing import Traced


class SideBySide:
    """Makes the steps of several loops in one compiled call, which is traced once, whichever of them take part."""

    def __init__(self, loops: Sequence[Loop]):
        self.loops, self._warm, self._sources = list(loops), False, {}
        self.compiled = Traced(self._steps, "the training step of several models", **loops[0].options)
        for loop in loops:
            loop.beside = self

    def _steps(self, sources: list, counts: tf.Tensor) -> list:
        return [loop.train_steps(source, counts[index]) for index, (loop, source) in enumerate(zip(self.loops, sources))]

    def make(self, calls: Sequence[Ready]) -> None:
        """Make the steps of these calls; a loop that has none makes none. Their seconds are shared out by steps."""
        self._sources |= {call.loop: call.source for call in calls}
        if not self._warm:
            self._warm_up()
        counts = {call.loop: call.count for call in calls}
        found, seconds = self._call([counts.get(loop, 0) for loop in self.loops])
        made = dict(zip(self.loops, found))
        for call in calls:
            call.last, call.waited = made[call.loop][0], float(made[call.loop][1])
            call.seconds = seconds * call.count / sum(counts.values())
            call.loop.seconds["training"] += call.seconds

    def _call(self, counts: list[int]) -> tuple[list, float]:
        for loop in self.loops:
            if loop not in self._sources:  # it took no part yet
                self._sources[loop] = loop.pipeline.begin(loop.state.seed, loop.state.epoch, 0)
        started = time.perf_counter()
        try:
            found = self.compiled([self._sources[loop] for loop in self.loops], tf.constant(counts))
            for last, _ in found:
                last.sums.numpy()  # waits for the device
        except tf.errors.OpError:
            for loop in self.loops:
                if loop.pipeline.error:
                    raise loop.pipeline.error from None
            raise
        return found, time.perf_counter() - started

    def _warm_up(self) -> None:
        """Trace and compile, by a step of each that is then taken back."""
        self._warm, sources = True, self._sources
        self._sources = {loop: loop.pipeline.begin(loop.state.seed, loop.state.epoch, int(loop.state.batch)) for loop in self.loops}
        with contextlib.ExitStack() as kept:
            for loop in self.loops:
                kept.enter_context(loop.taken_back())
            _, seconds = self._call([int(int(loop.state.batch) < loop.steps) for loop in self.loops])  # one may be at an epoch's end
        self._sources = sources
        for loop in self.loops:
            loop.seconds["tracing"] += seconds / len(self.loops)


def finish(trainings: Sequence[Generator[Ready, None, dict]], make: Callable[[list[Ready]], None]) -> list[dict | DivergenceError]:
    """Take every training (`Run.train`) to its end: the result of each, or what it diverged of.

    Args: the trainings; what makes the steps that they are ready for.
    """
    ends, live, failure = [None] * len(trainings), dict(enumerate(trainings)), None
    try:
        while live:
            ready = []
            for index, training in list(live.items()):
                try:
                    ready.append(training.throw(failure) if failure else next(training))
                except StopIteration as end:
                    ends[index] = end.value
                    del live[index]
                except DivergenceError as error:
                    ends[index] = error
                    del live[index]
            failure = None
            try:
                if ready:
                    make(ready)
            except Exception as error:  # belongs into the training, whose files are to be closed
                failure = error
    finally:
        for training in live.values():
            training.close()
    return ends


def alone(calls: list[Ready]) -> None:
    """Make the steps of each call on its own."""
    for call in calls:
        call.make()


def mean_probabilities(loops: Sequence[Loop], outputs: Sequence[np.ndarray]) -> np.ndarray:
    """[examples, classes] the mean of several models' probabilities, from the logits of each."""
    return np.mean([models.probabilities(loop.state.model, tf.constant(logits)).numpy() for loop, logits in zip(loops, outputs)], axis=0)
