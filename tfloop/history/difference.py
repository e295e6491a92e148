"""Two runs, and the first step at which they part.

First what is written is compared: settings, data, machine, curves. Then both are trained again,
each in a process of its own, side by side from the last place where both are known to be equal, and
their weights compared after every call, then after every step of the first call after which they
differ. That one step is looked at part by part.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from tfloop.config import FIELDS
from tfloop.history.records import Point, Records
from tfloop.history.side import Part, Side, both
from tfloop.training import manifests
from tfloop.wording import counted, listed

GROWTH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # steps after the first that differs
CHUNK = 50  # steps between two looks at the weights, where no curve says when calls end
_OF_THE_FOLDER = {"logdir", "name", "quiet", "keep", "summaries", "live_plot"}


@dataclasses.dataclass
class Grown:
    """How far two runs are apart, some steps after they parted."""

    steps: int
    weights: float  # the largest difference of a weight, of the largest weight of all
    losses: tuple[float, float]  # of the last call of each


@dataclasses.dataclass
class Difference:
    """Where two runs part.

    Attributes:
      equal: are they the same, bit for bit, as far as both go?
      compared: how many steps were made side by side until that was known.
      step: the number, from 0 on, of the first step that differs; None where none was found.
      kind, name: the first part of it that does: "activation" of "conv2".
      ulps: by how many units in the last place at most; None where it holds no floats.
      largest: its largest difference, of its largest entry.
      growth: from there on.
    """

    equal: bool = False
    compared: int = 0
    step: int | None = None
    kind: str = ""
    name: str = ""
    ulps: int | None = None
    largest: float = math.nan
    growth: list[Grown] = dataclasses.field(default_factory=list)


def settings_that_differ(first: Records, second: Records) -> list[str]:
    """ "learning_rate: 0.001 | 0.002" of each."""
    pairs = (
        (name, getattr(first.settings, name), getattr(second.settings, name)) for name in FIELDS
    )
    return [
        f"--{name}: {_text(a)} | {_text(b)}"
        for name, a, b in pairs
        if a != b and name not in _OF_THE_FOLDER
    ]


def _text(value: object) -> str:
    return listed(value) if isinstance(value, tuple) else str(value)


def machines_that_differ(first: Records, second: Records) -> list[str]:
    """Device, cores and versions."""

    def flat(machine: dict[str, Any]) -> dict[str, Any]:
        return {**machine, **machine.get("versions", {}), "versions": None}

    a, b = flat(first.machine), flat(second.machine)
    names = dict.fromkeys([*a, *b])
    return [
        f"{name}: {a.get(name)} | {b.get(name)}" for name in names if a.get(name) != b.get(name)
    ]


def curves_that_differ(
    first: Records, second: Records, tolerance: float
) -> tuple[int, tuple[Point, Point] | None, tuple[Point, Point] | None]:
    """(calls that both recorded, the first whose loss differs at all, and by more than that).

    Args:
      first, second: the runs.
      tolerance: of the loss.
    """
    theirs = {(point.first, point.last): point for point in second.points}
    pairs = [(p, theirs[p.first, p.last]) for p in first.points if (p.first, p.last) in theirs]
    any_bit = next((pair for pair in pairs if _differ(*pair, 0.0)), None)
    return len(pairs), any_bit, next((pair for pair in pairs if _differ(*pair, tolerance)), None)


def _differ(a: Point, b: Point, tolerance: float) -> bool:
    if math.isnan(a.loss) or math.isnan(b.loss):
        return math.isnan(a.loss) != math.isnan(b.loss)
    return abs(a.loss - b.loss) > tolerance


def part(
    first: Records,
    second: Records,
    given: dict[str, Any],
    changes: dict[str, Any] | None,
    steps: int,
    say: Callable[[str], None],
) -> Difference:
    """Train both again, side by side, and find the first step and the first part that differ.

    Args:
      first: a run.
      second: another; the same where `changes` make it another.
      given: as of Records.trained_by.
      changes: settings of the second, in place of the first's; None for two runs as they were.
      steps: how many steps after the first that differs the growth is followed.
      say: is told what is found.

    Raises:
      UserError: a run cannot be trained again.
    """
    with ExitStack() as stack:
        folders = (str(first.folder), str(second.folder))
        sides = tuple(
            stack.enter_context(Side(folder, given, own))
            for folder, own in zip(folders, ({}, changes or {}), strict=True)
        )
        assert len(sides) == 2
        return _Search(first, second, sides, changes is not None, say).find(steps)


class _Search:
    def __init__(
        self,
        first: Records,
        second: Records,
        sides: tuple[Side, Side],
        is_changed: bool,
        say: Callable[[str], None],
    ) -> None:
        self._runs, self._sides, self._say = (first, second), sides, say
        self._steps, self._end = 0, 0  # how far growth is followed, and the last step of both
        self._is_changed = is_changed  # the second is the first with other settings: no records

    def find(self, steps: int) -> Difference:
        abouts = both(self._sides, "about")
        if abouts[0]["weights"] != abouts[1]["weights"]:
            names = abouts[0]["weights"].items() ^ abouts[1]["weights"].items()
            name = min(name for name, _ in names)
            self._say(f"the models differ, first in {name}: they are not compared step by step")
            return Difference()
        self._elsewhere = [about["elsewhere"] for about in abouts]
        for run, found in zip(self._runs, self._elsewhere, strict=True):
            if found and not self._is_changed:
                self._say(f"{run.folder}: agrees with the run to rounding only: {'; '.join(found)}")
        self._steps, self._end = steps, self._last(abouts)
        last = self._end
        for at, paths in self._beginnings(last):
            digests = self._begin(at, paths)
            if digests[0] == digests[1] or at == 0:
                break
        if digests[0] != digests[1]:
            return self._looked_at(at)
        return self._follow(at, last)

    def _last(self, abouts: tuple[dict, dict]) -> int:
        """How far both go."""
        first, second = self._runs
        ends = [run.steps for run in (first, second) if run.steps]
        return min(ends, default=abouts[0]["steps_per_epoch"])

    def _beginnings(self, last: int) -> Iterator[tuple[int, tuple[Path | None, Path | None]]]:
        """(step, checkpoints) where both can begin, latest first; at last the start of both."""
        first, second = self._runs
        if not self._is_changed:
            ours, theirs = dict(first.checkpoints()), dict(second.checkpoints())
            parted = curves_that_differ(first, second, 0.0)[1]
            latest = parted[0].first if parted else last
            for at in sorted(ours.keys() & theirs.keys(), reverse=True):
                if at <= latest and at < last:
                    yield at, (ours[at], theirs[at])
        yield 0, (None, None)

    def _begin(self, at: int, paths: tuple[Path | None, Path | None]) -> tuple[str, str]:
        for side, path in zip(self._sides, paths, strict=True):
            side.ask("begin", at, path)
        first, second = (side.answer() for side in self._sides)
        return first, second

    def _follow(self, at: int, last: int) -> Difference:
        """From where both are equal: call by call, then step by step."""
        self._say(f"from step {at} on, where the weights of both are equal, bit for bit")
        first = at
        while at < last:
            end = self._end_of_call(at, last)
            both(self._sides, "mark")
            digests = self._to(end)
            if digests[0] == digests[1]:
                if found := self._against_checkpoints(end, digests[0]):
                    return found
                at = end
                continue
            both(self._sides, "back")
            for step in range(at, end):
                both(self._sides, "mark")
                digests = self._to(step + 1)
                if digests[0] != digests[1]:
                    both(self._sides, "back")
                    return self._looked_at(step)
            break  # step by step they do not differ: they do in how steps are put into calls
        return Difference(equal=True, compared=last - first)

    def _to(self, step: int) -> tuple[str, str]:
        (first, _), (second, _) = both(self._sides, "to", step)
        return first, second

    def _end_of_call(self, at: int, last: int) -> int:
        point = self._runs[0].point_at(at)
        end = point.last if point else at + CHUNK
        return min(end, last)

    def _against_checkpoints(self, step: int, digest: str) -> Difference | None:
        """Is a checkpoint not what its run's steps lead to? Then something changed it there."""
        if self._is_changed:
            return None
        for place, run in enumerate(self._runs):
            path = dict(run.checkpoints()).get(step)
            if path is None:
                continue
            side = self._sides[place]
            side.do("mark")
            expected = side.do("weights")
            if side.do("begin", step, path) != digest:
                return self._changed_there(run, step, expected, side.do("weights"))
            side.do("back")
        return None

    def _changed_there(
        self, run: Records, step: int, expected: dict[str, np.ndarray], found: dict[str, np.ndarray]
    ) -> Difference:
        name = next(name for name in expected if not np.array_equal(expected[name], found[name]))
        difference = _compared(expected[name], found[name])
        path = dict(run.checkpoints())[step]
        reasons = self._elsewhere[self._runs.index(run)] + _computed_otherwise(run, path)
        reason = "; ".join(reasons) or "something changed it there"
        self._say(
            f"{run.folder}: its checkpoint at step {step} is not what its steps lead to here: "
            f"weights {name} differ, by {_ulps_text(difference[0])}; {reason}"
        )
        return Difference(
            step=step,
            kind="weights",
            name=name,
            ulps=difference[0],
            largest=difference[1],
            growth=list(self._growth(step)),
        )

    def _looked_at(self, step: int) -> Difference:
        """The first part of this step that differs, and what becomes of it."""
        parts = both(self._sides, "look")
        found = Difference(step=step)
        for pair in _that_differ(*parts):
            arrays = _common(*both(self._sides, "part", *pair))
            if arrays is not None and np.array_equal(*arrays):
                continue  # of one, pixels were cut off that no output needs
            found.kind, found.name = pair
            if arrays is not None and arrays[0].dtype.kind == "f":
                found.ulps, found.largest = _compared(*arrays)
            break
        found.growth = list(self._growth(step))
        return found

    def _growth(self, step: int) -> Iterator[Grown]:
        for after in (count for count in GROWTH if count <= self._steps):
            if step + after > self._end:
                return
            answers = both(self._sides, "to", step + after)
            losses = [loss for _, loss in answers]
            if any(digest.startswith("diverged") for digest, _ in answers):
                whose = ", ".join(digest for digest, _ in answers if "diverged" in digest)
                self._say(f"{after} steps later one of them has {whose}")
                return
            first, second = both(self._sides, "weights")
            apart = max(_largest(first[name] - second[name]) for name in first)
            scale = max(_largest(value) for value in first.values())
            yield Grown(after, apart / scale if scale else math.nan, (losses[0], losses[1]))


def _computed_otherwise(run: Records, path: Path) -> list[str]:
    """What a checkpoint was computed by that the run's settings do not name any more."""
    was = manifests.read_manifest(path)["config"]
    names = ("device", "shards", "intra_op_threads", "inter_op_threads", "strategy", "replicas")
    now = run.settings
    return [
        f"it was computed with --{name}={was.get(name)}, not {getattr(now, name)}"
        for name in names
        if was.get(name, getattr(now, name)) != getattr(now, name)
    ]


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values.astype(np.float64)).max()) if values.size else 0.0


def _that_differ(first: list[Part], second: list[Part]) -> Iterator[tuple[str, str]]:
    """(kind, name) of the parts that both have and that differ, in the first's order."""
    theirs = {(part.kind, part.name): part.digest for part in second}
    for part in first:
        key = (part.kind, part.name)
        if key in theirs and theirs[key] != part.digest:
            yield key


def _common(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """What both have, from the first entry on along each axis; None where axes are others."""
    if first.ndim != second.ndim or first.dtype != second.dtype:
        return None
    cut = tuple(slice(min(sizes)) for sizes in zip(first.shape, second.shape, strict=True))
    return first[cut], second[cut]


def _compared(first: np.ndarray, second: np.ndarray) -> tuple[int, float]:
    """(units in the last place at most, the largest difference of the largest entry)."""
    from tfloop.inspection.checks import ulps

    scale = _largest(first)
    apart = _largest(first.astype(np.float64) - second.astype(np.float64))
    return int(ulps(first, second).max(initial=0)), apart / scale if scale else math.nan


def _ulps_text(ulps: int | None) -> str:
    return "not in its numbers" if ulps is None else f"{counted(ulps, 'unit')} in the last place"


def lines(found: Difference) -> Iterator[str]:
    """The difference in words, and how it grows as a table."""
    if found.equal:
        steps = counted(found.compared, "step")
        yield f"trained again, side by side, {steps}: equal, bit for bit"
        return
    if found.step is None:
        return
    where = f"step {found.step}"
    if not found.kind:
        yield f"{where} is the first that differs, in nothing that was looked at"
    elif found.ulps is None:
        yield f"{where} is the first that differs: first in its {found.kind} {found.name}"
    else:
        yield (
            f"{where} is the first that differs: first in its {found.kind} {found.name}, by "
            f"{_ulps_text(found.ulps)} ({found.largest:.1e} of its largest entry)"
        )
    if found.growth:
        yield f"{'steps later':>12} {'weights apart':>14} {'loss':>12} {'loss':>12}"
    for grown in found.growth:
        losses = " ".join(f"{loss:12.6g}" for loss in grown.losses)
        yield f"{grown.steps:12} {grown.weights:14.2e} {losses}"
