"""Several models side by side: the steps that their loops are ready to make go into one call.

Each model keeps a loop and a state of its own, so it is trained as it would be alone; only the
calls are shared. In the graph that results nothing of one model waits for another: TensorFlow
computes them at the same time, and each needs no more than one core, so no operation is cut into
parts and no part is waited for (`benchmarks/ensemble.py`).
"""

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfloop.data.dataset import Split
from tfloop.errors import DivergenceError, WithoutGradient
from tfloop.loop import Loop, PendingCall
from tfloop.nests import map_leaves
from tfloop.records import CallPart
from tfloop.step import judged
from tfloop.stopping import Pace, StopAsked
from tfloop.tracing import Traced

Training = Generator[PendingCall, None, dict]  # as `run.Run.train`
End = dict | DivergenceError | None  # of a training: its result, or what it diverged of


class SideBySide:
    """Makes the steps of several loops in one compiled call.

    The call is traced once, whichever of the loops take part.
    """

    def __init__(self, loops: Sequence[Loop]) -> None:
        self.loops, self.is_warm = list(loops), False
        self._pace = Pace(1)
        self._sources: dict[Loop, Any] = {}
        name = "the training step of several models"
        self.compiled = Traced(self._steps, name, **loops[0].options)
        for loop in loops:
            loop.beside = self

    def _steps(self, sources: list, counts: tf.Tensor, so_far: list) -> list:
        pairs = enumerate(zip(self.loops, sources, strict=True))
        return [
            loop.train_steps(source, counts[index], *so_far[index])
            for index, (loop, source) in pairs
        ]

    def make(self, calls: Sequence[PendingCall]) -> None:
        """Make the steps of these calls; a loop that has none makes none.

        Their seconds are shared out by steps.
        """
        self._sources |= {call.loop: call.source for call in calls}
        while (left := [call for call in calls if call.is_open]) and not self.loops[0].stop():
            if not self.is_warm:
                self._warm_up()
            self._make_some(left)

    def _make_some(self, calls: Sequence[PendingCall]) -> None:
        by_loop = {call.loop: call for call in calls}
        counts = {loop: self._pace.next(call.count - call.made) for loop, call in by_loop.items()}
        so_far = [by_loop[loop].so_far if loop in by_loop else None for loop in self.loops]
        steps, seconds = self._call([counts.get(loop, 0) for loop in self.loops], so_far)
        self._pace.note(max(counts.values()), seconds)
        made = dict(zip(self.loops, steps, strict=True))
        for loop, call in by_loop.items():
            last, waited = made[loop]
            spent = seconds * counts[loop] / sum(counts.values())
            loop.seconds["training"] += spent
            if counts[loop]:
                call.add(counts[loop], last, float(waited), spent)

    def _call(self, counts: list[int], so_far: Sequence = ()) -> tuple[list, float]:
        """(what each loop's steps gave, the seconds they took)."""
        for loop in self.loops:
            if loop not in self._sources:  # it took no part yet
                state = loop.state
                self._sources[loop] = loop.pipeline.begin(state.seed, state.epoch, 0)
        started = time.perf_counter()
        try:
            sources = [self._sources[loop] for loop in self.loops]
            nothing = [PendingCall(loop, (), 0, CallPart()).so_far for loop in self.loops]
            pairs = zip(so_far or nothing, nothing, strict=True)
            begun = [tuple(given or none) for given, none in pairs]
            arguments = sources, tf.constant(counts), begun
            if self.is_warm:
                steps = self.compiled.call(*arguments)
            else:
                steps = self.compiled.begin(any(counts), *arguments)
            for last, _ in steps:
                last.sums.numpy()  # waits for the device
        except tf.errors.OpError:
            for loop in self.loops:
                if loop.pipeline.error:
                    raise loop.pipeline.error from None
            raise
        return steps, time.perf_counter() - started

    def _warm_up(self) -> None:
        """Trace and compile: without a step, or by one that is taken back, as `Loop.warm_up`."""
        sources, self._sources = self._sources, {}
        for loop in self.loops:
            state = loop.state
            index = int(state.batch_index)
            self._sources[loop] = loop.pipeline.begin(state.seed, state.epoch, index)
        # One may be at an epoch's end.
        counts = [loop.steps_to_compile() for loop in self.loops]
        with contextlib.ExitStack() as entered:
            for loop in self.loops:
                entered.enter_context(loop.state.looking())
            seconds = self._trace(counts)
        self.is_warm, self._sources = True, sources
        for loop in self.loops:
            loop.seconds["tracing"] += seconds / len(self.loops)

    def _trace(self, counts: list[int]) -> float:
        by_state = {id(loop.state): loop for loop in self.loops}
        while True:  # each model may have weights without a gradient
            with contextlib.ExitStack() as kept:
                for loop in self.loops:
                    kept.enter_context(loop.taken_back())
                try:
                    return self._call(counts)[1]
                except WithoutGradient as found:
                    state, names = found.state, found.names
            by_state[id(state)].leave_out(names)


class Calls(list[PendingCall]):
    """What several trainings are ready for. In a `with` block of it the steps are made.

    An error in the block is not raised there. It belongs into the trainings that wait for the
    steps, whose files are to be closed, and comes out of them.

    Attributes:
      failure: that error; None while all went well.
    """

    failure: Exception | StopAsked | None = None

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        self.failure = error if isinstance(error, (Exception, StopAsked)) else None
        return self.failure is not None


class Together(Iterator[Calls]):
    """Takes every training to its end; an iterator of the calls that they are ready for.

    Whoever takes Calls makes their steps in a `with` block, before taking more:

      for calls in (group := Together(trainings)):
          with calls:
              make(calls)

    Attributes:
      ends: the end of each training, when all Calls were taken.
    """

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.ends: list[End] = [None] * len(trainings)
        self._live = dict(enumerate(trainings))
        self._calls = self._run()

    def __next__(self) -> Calls:
        return next(self._calls)

    def close(self) -> None:
        """End the trainings that are still going on, so that they close their files."""
        self._calls.close()

    def _run(self) -> Generator[Calls, None, None]:
        failure: Exception | StopAsked | None = None
        try:
            while self._live:
                calls = Calls(self._advance(failure))
                if calls:
                    yield calls
                failure = calls.failure
        finally:
            for training in self._live.values():
                training.close()

    def _advance(self, failure: Exception | StopAsked | None) -> Iterator[PendingCall]:
        """Take each training to its next call, or to its end."""
        for index, training in list(self._live.items()):
            try:
                yield training.throw(failure) if failure else next(training)
            except StopIteration as end:
                self.ends[index] = end.value
                del self._live[index]
            except DivergenceError as error:
                self.ends[index] = error
                del self._live[index]


class Judged(NamedTuple):
    """How several models do together."""

    outputs: Any  # a nest of [examples, …], their mean
    accuracy: float | None  # None where there are no classes
    loss: float  # of the mean outputs, on the data alone
    of: str  # what the mean is of

    def text(self, part: str) -> str:
        if self.accuracy is None:
            return f"{part}loss {self.loss:.4f}"
        return f"{part}accuracy {100 * self.accuracy:.2f} %"

    def to_json(self, prefix: str) -> dict[str, float]:
        if self.accuracy is None:
            return {f"{prefix}loss": self.loss}
        return {f"{prefix}accuracy": self.accuracy}


def judge_together(loops: Sequence[Loop], outputs: Sequence[Any], test: Split) -> Judged:
    """What the mean of several models' outputs gives for the test examples."""
    mean, state = mean_probabilities(loops, outputs), loops[0].state
    targets = map_leaves(tf.constant, test.targets)
    given = state.objective.unsquash(map_leaves(tf.constant, mean))
    each, correct, _ = judged(state, targets, given)
    accuracy = float(np.mean(correct.numpy(), dtype=np.float64)) if loops[0].classifies else None
    are_shares = any(term.as_logits for term in state.objective.terms)
    of = "their probabilities" if are_shares else "what they give"
    return Judged(mean, accuracy, float(np.mean(each.numpy(), dtype=np.float64)), of)


def mean_probabilities(loops: Sequence[Loop], outputs: Sequence[Any]) -> Any:
    """[examples, …] the mean of what several models give, of classes as probabilities.

    Args:
      loops: of the models.
      outputs: of each, as `evaluate_with_outputs` gives them.
    """
    shares = [
        loop.state.probabilities(map_leaves(tf.constant, given))
        for loop, given in zip(loops, outputs, strict=True)
    ]
    return map_leaves(lambda *parts: np.mean([part.numpy() for part in parts], axis=0), *shares)
