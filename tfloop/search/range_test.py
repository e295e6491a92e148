"""The learning-rate range test.

The rate grows step by step, and the loss shows where it is too small and where too large.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tfloop.errors import DivergenceError, UserError
from tfloop.loop import Loop

SMOOTHING = 0.95  # decay of the moving average over the losses
TOO_LARGE = 4.0  # the test ends where the smoothed loss is N times its least


class RangeTest(NamedTuple):
    """What a range test found."""

    rates: np.ndarray  # [steps], those that were made
    losses: np.ndarray  # [steps], of each step's batch, before its update
    smoothed: np.ndarray  # [steps]
    # The rate at which the smoothed loss falls fastest, over the rate's logarithm.
    suggestion: float
    least: float  # the rate at which it is least
    diverged: bool  # did the loss become too large, or NaN, before the highest rate?


def range_test(loop: Loop, low: float = 1e-6, high: float = 1.0, steps: int = 300) -> RangeTest:
    """Train `steps` steps at rates from `low` to `high`, each the same factor above the last.

    (Smith, arXiv:1506.01186.) The state is afterwards what it was before, bit for bit.

    Raises:
      UserError: the loop's schedule is not a constant rate, or the loss never fell.
    """
    state = loop.state
    if state.schedule.name != "constant" or float(state.hyper["warmup_steps"]):
        raise UserError(
            "the range test sets the rate of every step: it needs schedule constant without a "
            f"warm-up, not {state.schedule.name}"
        )
    rates = low * (high / low) ** (np.arange(steps) / (steps - 1))
    losses, diverged = _train_at(loop, rates)
    smoothed, tried = smooth(losses), rates[: len(losses)]
    lowest = int(smoothed.argmin()) if len(smoothed) else 0
    if lowest < 2:
        raise UserError(
            f"the loss does not fall anywhere from rate {low:g} to {high:g}; try --low and --high "
            "further down"
        )
    # The first means are of a few losses, and jump.
    settled = min(round(1 / (1 - SMOOTHING)), lowest // 2)
    falling = slice(lowest + 1)
    slope = np.gradient(smoothed[falling], np.log(tried[falling]))[settled:]
    steepest = settled + slope.argmin()
    suggestion, least = float(tried[steepest]), float(tried[lowest])
    return RangeTest(tried, np.array(losses), smoothed, suggestion, least, bool(diverged))


def _train_at(loop: Loop, rates: np.ndarray) -> tuple[list[float], bool]:
    """(the loss at each rate, whether it became too large before the last). The state is kept."""
    state, diverged = loop.state, False
    losses: list[float] = []
    single, loop.single = loop.single, range(2**63 - 1)  # a call for each step
    try:
        with loop.taken_back():
            state.hyper["learning_rate"].assign(rates[0])
            while len(losses) < len(rates) and not diverged:
                for call in loop.train_epoch():
                    losses.append(call.train.total)
                    smoothed = smooth(losses)
                    diverged = smoothed[-1] > TOO_LARGE * smoothed.min()
                    if len(losses) == len(rates) or diverged:
                        break
                    state.hyper["learning_rate"].assign(rates[len(losses)])
                else:
                    state.epoch.assign_add(1)
                    state.batch_index.assign(0)
    except DivergenceError:
        diverged = True
    finally:
        loop.single = single
    return losses, diverged


def smooth(losses: Sequence[float]) -> np.ndarray:
    """The moving average m ← 0.95 · m + 0.05 · loss, divided by 1 - 0.95 ** steps.

    So it is no lower at the start.
    """
    smoothed, mean = [], 0.0
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**count))
    return np.array(smoothed)
