"""What a run wrote down of itself, and where in it something happened. Writes nothing."""

import bisect
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.training import code, folders, manifests
from tfloop.wording import counted

# Settings that have no place where one run is trained again in one process.
ALONE: dict[str, Any] = {
    "strategy": "none",
    "replicas": 0,
    "ensemble": 1,
    "seeds": (),
    "runs": 1,
    "debugger_dump": "",
    "log_device_placement": False,
    "live_plot": False,
}
LOSS, GRADIENT, WORST = "loss/total", "gradient_norm/mean", "loss/worst_step"


class Point(NamedTuple):
    """What the event files hold of one compiled call; means over its steps, rounded to 32 bits."""

    first: int  # the global step before its first step
    last: int  # and after its last
    loss: float
    gradient_norm: float | None
    worst: float  # the largest loss of a step; the mean where nobody wrote it down


class Records:
    """A run's folder: what it says of the run.

    Attributes:
      folder: the run's.
      settings: as stored.
      steps: that were made, as far as is known.
      reached: of the newest checkpoint that is whole, or of result.json.
      machine: what the run was computed by; empty where nobody wrote it down.
      fingerprint: of its data; None where nobody wrote it down.
      steps_per_epoch: None where the run ended before anything was written.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read it.

        Raises:
          UserError: it is no run's folder.
        """
        self.folder = Path(folder)
        self.settings = folders.config_of(self.folder)
        self.result = folders.result(self.folder)
        self._newest_step, manifest = self._newest()
        # A result is there only if it was written after the newest checkpoint.
        self.reached = self.result or manifest.get("reached", {})
        of_result = {name: self.result.get(name) for name in ("device", "cores", "versions")}
        self.machine = manifest.get("machine") or {n: v for n, v in of_result.items() if v}
        self._was = manifest.get("config")
        stored = self.result or manifest
        self.fingerprint = stored.get("fingerprint")
        self.steps_per_epoch: int | None = stored.get("steps_per_epoch")
        self._points: list[Point] | None = None

    def _newest(self) -> tuple[int, dict[str, Any]]:
        """(global step, manifest) of the newest checkpoint that is whole; (0, {}) without one."""
        try:
            path, manifest = manifests.newest(self.folder / "checkpoints")
        except UserError:
            return 0, {}
        return _step_of(path), manifest

    @property
    def steps(self) -> int:
        of_result = self.result.get("steps") or 0
        of_checkpoints = max((step for step, _ in self.checkpoints()), default=0)
        of_events = self.points[-1].last if self.points else 0
        return max(of_result, of_checkpoints, of_events)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(global step, folder) of each checkpoint, from the first; of the last way alone."""
        found = [(_step_of(path), path) for path in manifests.all_in(self.folder / "checkpoints")]
        kept: list[tuple[int, Path]] = []
        for step, path in found:  # newest first: one that was gone back behind comes to nothing
            if not kept or step < kept[-1][0]:
                kept.append((step, path))
        return kept[::-1]

    def digests(self) -> dict[int, str]:
        """Global step → SHA-256 of the weights and moving averages, of each evaluation."""
        entries = [*self.reached.get("epochs", ()), *self.reached.get("evaluations", ())]
        entries += [*self.result.get("epochs", ()), *self.result.get("evaluations", ())]
        found = {e["step"]: e["weights_sha256"] for e in entries if e.get("weights_sha256")}
        if self.result.get("weights_sha256"):
            found[self.result["steps"]] = self.result["weights_sha256"]
        return found

    @property
    def points(self) -> list[Point]:
        """The training curve, from the event files; empty where there are none."""
        if self._points is None:
            self._points = self._read_points()
        return self._points

    def _read_points(self) -> list[Point]:
        from tfloop.inspection.event_files import own_events, read_files

        files = [path for path in own_events(self.folder) if path.parent.name == "train"]
        losses: dict[int, float] = {}
        norms: dict[int, float] = {}
        worst: dict[int, float] = {}
        for scalar in read_files(files, self.folder):
            if scalar.tag == LOSS:
                losses[scalar.step] = scalar.value
            elif scalar.tag == GRADIENT:
                norms[scalar.step] = scalar.value
            elif scalar.tag == WORST:
                worst[scalar.step] = scalar.value
        steps = sorted(losses)
        return [
            Point(before, step, losses[step], norms.get(step), worst.get(step, losses[step]))
            for before, step in zip([0, *steps], steps, strict=False)
        ]

    def point_at(self, step: int) -> Point | None:
        """The recorded call in which the step with this number, from 0 on, was made."""
        place = bisect.bisect_right(self.points, step, key=lambda point: point.last)
        found = self.points[place] if place < len(self.points) else None
        return found if found and found.first <= step else None

    def spike(self) -> Point:
        """The call of which one step's loss lies the most above the mean of the call before it.

        Raises:
          UserError: fewer than two calls are recorded.
        """
        points = [point for point in self.points if point.loss == point.loss]
        if len(points) < 2:
            raise UserError(
                f"{self.folder}: its event files hold {counted(len(points), 'call')}, too few to "
                "find a jump of the loss; name a step: --at=STEP"
            )
        jumps = [after.worst - before.loss for before, after in itertools.pairwise(points)]
        return points[1 + max(range(len(jumps)), key=jumps.__getitem__)]

    def step_of(self, at: str) -> int:
        """The number, from 0 on, of the step that `at` names; for "spike" that of its call's first.

        Args:
          at: a number, "epoch:N" for its first step, "last", "diverged", or "spike".

        Raises:
          UserError: it names none, or one that the run did not make.
        """
        if at == "spike":
            return self.spike().first
        if at == "diverged":
            diverged = self.result.get("diverged")
            if not isinstance(diverged, dict):
                raise UserError(f"--at=diverged: {self.folder} did not diverge; try --at=spike")
            return int(diverged["step"])
        if at == "last":
            step = self.steps - 1
        elif found := re.fullmatch(r"epoch:(\d{1,18})", at):
            if not self.steps_per_epoch:
                raise UserError(f"--at={at}: nothing in {self.folder} says how long an epoch is")
            step = (int(found[1]) - 1) * self.steps_per_epoch
        elif at.isdecimal() and len(at) < 19:
            step = int(at)
        else:
            raise UserError(
                f"--at={at}: expected a step, 0 or more, epoch:N, last, diverged or spike"
            )
        if not 0 <= step < self.steps:
            last = f"its steps are 0 to {self.steps - 1}" if self.steps else "it made no step"
            raise UserError(f"--at={at}: {self.folder} has no step {step}; {last}")
        return step

    def start_for(self, step: int) -> tuple[int, Path | None]:
        """(global step, checkpoint) to go on from to this step; the start of the run is (0, None).

        Raises:
          UserError: the run's settings were changed at a later step than the one to begin at.
        """
        before = [(at, path) for at, path in self.checkpoints() if at <= step]
        start, path = next(
            ((at, path) for at, path in reversed(before) if _is_whole(path)), (0, None)
        )
        if (changed := self.overridden_at()) is not None and start < changed:
            raise UserError(
                f"{self.folder}: --override changed its settings at step {changed}; steps before "
                "that were made with others, which are not known any more, and no checkpoint "
                f"between that and step {step} is left to begin at"
            )
        return start, path

    def overridden_at(self) -> int | None:
        """The global step at which --override last changed its settings; None: at none.

        A run that was stopped soon after has told nobody but its config.json.
        """
        known = list(self.reached.get("overridden_at", ()))
        if self._was and folders.changed(Config.make(**self._was), self.settings):
            known.append(self._newest_step)
        return max(known, default=None)

    def factor_at(self, step: int) -> float:
        """What the learning rate was multiplied by at this step, where the run was rewound."""
        changed = self.overridden_at() or 0  # which sets the rate anew
        rewinds = [at for at in self.reached.get("rewound_to", ()) if at >= changed]
        counts = [number + 1 for number, at in enumerate(rewinds) if at <= step]
        return 0.5 ** max(counts, default=0)

    def seconds_for(self, steps: int) -> float | None:
        """How long so many steps took when the run made them."""
        each = self.result.get("ms_per_step")
        return steps * each / 1000 if each else None

    def trained_by(self, named: dict[str, Any]) -> Config:
        """The settings to train it with again, in one process.

        Args:
          named: settings and functions that were given by name; of these, those that do not change
            the mathematics of the run are taken.

        Raises:
          UserError: code of the user's own that changed or may not be run; a setting that changes
            the run's mathematics.
        """
        given = {name: value for name, value in named.items() if value != ""}
        new = self.settings.replace(**given)
        if names := folders.changed(self.settings, new):
            raise UserError(
                f"{self.folder}: is trained again as it was; leave out --{names[0]}, or begin a "
                "run of its own with it"
            )
        try:
            new = code.trusted(self.folder, new, given, goes_on=True)
        except UserError as error:  # to go on with other code is no way here
            raise UserError(error.as_flags.partition(", or go on with")[0]) from None
        return new.replace(**ALONE, quiet=given.get("quiet", False))


def _step_of(path: Path) -> int:
    """The global step of a checkpoint, by its name."""
    return int(path.name.rpartition("-")[2])


def _is_whole(path: Path) -> bool:
    try:
        manifests.read_manifest(path)
    except UserError:
        return False
    return True
