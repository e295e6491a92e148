"""The learning-rate range test: the rate grows step by step, and the loss shows where it is too small and where too large."""

from typing import NamedTuple

import numpy as np

from tfloop.errors import DivergenceError, UserError
from tfloop.loop import Loop

SMOOTHING = 0.95  # decay of the moving average over the losses
TOO_LARGE = 4.0  # the test ends where the smoothed loss is so many times its least


class RangeTest(NamedTuple):
    rates: np.ndarray  # [steps], those that were made
    losses: np.ndarray  # [steps], of each step's batch, before its update
    smoothed: np.ndarray  # [steps]
    suggestion: float  # the rate at which the smoothed loss falls fastest, over the logarithm of the rate
    least: float  # the rate at which it is least
    diverged: bool  # did the loss become too large, or NaN, before the highest rate?


def range_test(loop: Loop, low: float = 1e-6, high: float = 1.0, steps: int = 300) -> RangeTest:
    """Train `steps` steps at rates from `low` to `high`, each the same factor above the last (Smith, arXiv:1506.01186).

    The state is afterwards what it was before, bit for bit.

    Raises:
      UserError: the loop's schedule is not a constant rate, or the loss never fell.
    """
    state = loop.state
    if state.schedule.name != "constant" or float(state.hyper["warmup_steps"]):
        raise UserError(f"the range test sets the rate of every step: it needs schedule constant without a warm-up, not {state.schedule.name}")
    rates, losses, diverged = low * (high / low) ** (np.arange(steps) / (steps - 1)), [], False
    single, loop.single = loop.single, range(2**63 - 1)  # a call for each step
    try:
        with loop.taken_back():
            state.hyper["learning_rate"].assign(rates[0])
            while len(losses) < steps and not diverged:
                for call in loop.train_epoch():
                    losses.append(call.train.total)
                    diverged = smooth(losses)[-1] > TOO_LARGE * smooth(losses).min()
                    if len(losses) == steps or diverged:
                        break
                    state.hyper["learning_rate"].assign(rates[len(losses)])
                else:
                    state.epoch.assign_add(1)
                    state.batch.assign(0)
    except DivergenceError:
        diverged = True
    finally:
        loop.single = single
    losses = np.array(losses)
    smoothed, made = smooth(losses), rates[:len(losses)]
    lowest = int(smoothed.argmin()) if len(smoothed) else 0
    if lowest < 2:
        raise UserError(f"the loss does not fall anywhere from rate {low:g} to {high:g}; try --low and --high further down")
    settled = min(round(1 / (1 - SMOOTHING)), lowest // 2)  # the first means are of a few losses, and jump
    slope = np.gradient(smoothed[:lowest + 1], np.log(made[:lowest + 1]))[settled:]
    return RangeTest(made, losses, smoothed, float(made[settled + slope.argmin()]), float(made[lowest]), bool(diverged))


def smooth(losses) -> np.ndarray:
    """The moving average m ← 0.95 · m + 0.05 · loss, divided by 1 - 0.95 ** steps, so that it is no lower at the start."""
    found, mean = [], 0.0
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**count))
    return np.array(found)
