"""A run taken back to any of its steps: restored from the checkpoint before it, and trained on.

Everything random is a function of (seed, epoch, step), and the state is one object, so the steps
are those of the run, bit for bit, where the same device, threads and versions compute them. The
run's folder is read only.
"""

import functools
import math
import platform
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfloop.assembly import make_loop
from tfloop.config import Config
from tfloop.errors import DivergenceError, UserError
from tfloop.history.records import Point, Records
from tfloop.loop import Loop, PendingCall
from tfloop.records import Call, Record
from tfloop.training import checkpoints, folders
from tfloop.training.run import call_part, scale_rate
from tfloop.version import __version__
from tfloop.wording import counted

NEVER = 1 << 62  # epochs: more than any run has


class OneStep(NamedTuple):
    """What a compiled step gave, which was then taken back."""

    loss: float
    gradient_norm: float


class Replay:
    """A run that is trained again, in memory.

    Attributes:
      records: what the run wrote down.
      loop: what trains; its state is where `to` left it.
      start: the global step that it began at.
      differing: the calls whose loss or gradient norm is not the recorded one, so far.
      compared: how many calls were compared with the recorded ones.
      last_compared: (recorded call, what it gives now) around the step that was gone to.
    """

    def __init__(
        self,
        records: Records,
        config: Config,
        say: Callable[[str], None] = lambda text: None,
        device: str = "",
        is_changed: bool = False,
    ) -> None:
        """Make one.

        Args:
          records: of the run.
          config: `records.trained_by`, as the machine was then set up for.
          say: is told what is being done.
          device: the name of what computes here; "" compares none with the run's.
          is_changed: its settings are not the run's, on purpose, and its data may differ.

        Raises:
          UserError: the data are not those of the run.
        """
        self.records, self.config, self._say = records, config, say
        self._device = device
        self.loop: Loop = make_loop(config)
        known, found = records.fingerprint, self.loop.data.fingerprint
        if not is_changed and known is not None and known != found:
            raise UserError(
                f"{records.folder}: --dataset={config.dataset} does not hold what the run was "
                f"trained on (fingerprint {found:08x}, not {known:08x}); put the data back"
            )
        self.start, self.compared = 0, 0
        self.last_compared: tuple[Point, Call] | None = None
        self.differing: list[tuple[Point, Call]] = []
        self._running: Iterator[PendingCall | Record] | None = None

    @property
    def step(self) -> int:
        """The global step of the state: the number, from 0 on, of the step that comes next."""
        return int(self.loop.state.global_step)

    def begin(self, step: int, path: Any) -> None:
        """Set the state to a checkpoint of the run, or, without one, to its start."""
        state = self.loop.state
        state.begin(self.config.seed)
        self.loop.part = None
        if path is not None:
            manifest = checkpoints.read_manifest(path)
            differs = bool(folders.changed(folders.config_in(manifest, path), self.config))
            checkpoints.restore(state, path, differs)
            self.loop.part = None if differs else call_part(manifest, path, self.loop)
            if differs:
                state.reset(weights=False, slots=False, schedule=False, data=False, hyper=True)
        self.start, self._running = step, None
        self._follow_rewinds()

    def begin_for(self, step: int) -> None:
        """Set the state to where the way to this step is shortest, and say so.

        Raises:
          UserError: the step cannot be reached.
        """
        start, path = self.records.start_for(step)
        self.begin(start, path)
        where = f"from {path}" if path else "from its start, as no earlier checkpoint is kept"
        length = step - start
        seconds = self.records.seconds_for(length)
        takes = f", {seconds:.0f} s of training" if seconds and seconds >= 1 else ""
        self._say(f"step {step}: {length} steps {where}{takes}")

    def to(self, step: int) -> None:
        """Train on until this is the next step. Calls end where the run's ended."""
        for _ in self.calls(step):
            pass

    def calls(self, step: int) -> Iterator[Call]:
        """The calls until this is the next step; each is compared with the recorded one."""
        for record in self.items(step):
            if isinstance(record, Call):
                yield record

    def items(self, step: int, evaluates: bool = False) -> Iterator[Record]:
        """All records until this is the next step.

        Raises:
          DivergenceError: as Loop.run.
        """
        loop, state, last = self.loop, self.loop.state, None
        while self.step < step:
            loop.stop_at = min([at for at in self._rewinds() if at > self.step] + [step])
            first = self.step
            if self._running is None:
                epochs = self.config.epochs if evaluates else NEVER
                self._running = loop.pending(max(epochs, int(state.epoch) + 1), evaluates)
            record = next(self._running, None)
            if isinstance(record, PendingCall):
                loop.make(record)
                record = next(self._running)
            if record is None:
                return
            assert not isinstance(record, PendingCall)
            last = record if isinstance(record, Call) else None
            if isinstance(record, Call):
                self._compare(first, record)
                self._follow_rewinds()
            yield record
        # What belongs to the last call: an evaluation that the schedule may go by, the epoch's end.
        is_due = last is not None and loop.evaluates_after(last)
        if is_due and self._running and (evaluates or state.schedule.slots):
            record = next(self._running)
            assert not isinstance(record, PendingCall)
            yield record
        while int(state.batch_index) == loop.steps and self._running is not None:
            record = next(self._running, None)
            if record is None or isinstance(record, PendingCall):
                break
            yield record
        self._running = None

    def _rewinds(self) -> list[int]:
        return self.records.reached.get("rewound_to", [])

    def _follow_rewinds(self) -> None:
        if self._rewinds():
            scale_rate(self.loop.state, self.records.factor_at(self.step))

    def _compare(self, first: int, call: Call) -> None:
        point = self.records.point_at(first)
        if point is None or (point.first, point.last) != (first, call.step):
            return
        self.compared += 1
        if not _is_recorded(point, call):
            self.differing.append((point, call))

    def whole_call(self) -> tuple[Point, Call] | None:
        """(the recorded call that begins here, what it gives now); it is taken back.

        None where no recorded call begins here.
        """
        point = self.records.point_at(self.step)
        if point is None or point.first != self.step:
            return None
        return point, self.taken_back(point.last)

    def taken_back(self, step: int) -> Call:
        """The call from here until this is the next step; the state is then as it was."""
        loop = self.loop
        loop.warm_up()
        with loop.taken_back():
            loop.stop_at = step
            for record in loop.pending_epoch():
                if isinstance(record, PendingCall):
                    loop.make(record)
                    continue
                return record
        raise UserError(f"step {step}: is not made in one call")

    def back_to(self, values: dict[str, np.ndarray]) -> None:
        """Set the state to values of its variables, by their names in `TrainState.named`."""
        for name, variable in self.loop.state.named().items():
            variable.assign(values[name])
        self._running = None

    def make_one(self) -> None:
        """The next step."""
        self.loop.stop_at = self.step + 1
        next(self._one_by_one())

    def one_step(self) -> OneStep:
        """Loss and gradient norm of the next step, compiled; it is taken back."""
        train = self.taken_back(self.step + 1).train
        return OneStep(train.total, train.gradient_norm or 0.0)

    def losses(self, last: int) -> list[float]:
        """The loss of each step from here until `last` is the next; the state is then as it was.

        A step whose loss is not finite ends them.
        """
        found: list[float] = []
        with self.loop.taken_back():
            try:
                while self.step < last:
                    self.loop.stop_at = self.step + 1
                    found.append(next(self._one_by_one()).train.total)
            except DivergenceError:
                self.loop.state.diverged.assign(False)
                found.append(math.nan)
        return found

    def _one_by_one(self) -> Iterator[Call]:
        for record in self.loop.pending_epoch():
            if isinstance(record, PendingCall):
                self.loop.make(record)
            else:
                yield record

    @functools.cached_property
    def elsewhere(self) -> list[str]:
        """What is not as it was when the run was made; then bits may differ."""
        then, found = self.records.machine, []
        versions = {
            "tfloop": __version__,
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        }
        for name, version in then.get("versions", {}).items():
            if name != "tfloop" and versions.get(name) != version:
                found.append(f"{name} {version} then, {versions.get(name)} now")
        if self._device and then.get("device", self._device) != self._device:
            found.append(f"{then['device']} then, {self._device} now")
        if not getattr(self.loop.data.train, "repeats", True):
            found.append("the data's own order differs each time it is begun")
        stored = self.records.settings
        for name in ("device", "shards", "intra_op_threads", "inter_op_threads", "strategy"):
            old, new = getattr(stored, name), getattr(self.config, name)
            if old != new:
                found.append(f"--{name}={old} then, {new} now")
        return found


def _is_recorded(point: Point, call: Call) -> bool:
    """Are loss and gradient norm those that were written, as 32 bits?"""
    pairs = [(point.loss, call.train.total), (point.gradient_norm, call.train.gradient_norm)]
    return all(
        recorded is None or new is None or np.float32(recorded) == np.float32(new)
        for recorded, new in pairs
    )


def go_to(replay: Replay, step: int, to_the_spike: bool = False) -> int:
    """Take the run to this step; the step it is then at.

    Args:
      replay: of the run.
      step: the number, from 0 on, of the step that is to come next.
      to_the_spike: of the recorded call that begins there, take the step with the largest loss.
    """
    point = replay.records.point_at(step)
    replay.begin_for(step)
    # First to where the recorded call begins: it is made whole there, to be compared.
    if point is not None and point.first > replay.step:
        replay.to(point.first)
    if found := replay.whole_call():
        replay.last_compared = found
    if to_the_spike and point is not None:
        step = replay.step + _largest(replay.losses(point.last))
    replay.to(step)
    return step


def _largest(losses: list[float]) -> int:
    """The place of the largest loss, or of the first that is not finite."""
    for place, loss in enumerate(losses):
        if not math.isfinite(loss):
            return place
    return max(range(len(losses)), key=losses.__getitem__)


def told(replay: Replay) -> Iterator[str]:
    """What the replay found: the step's loss, and whether it is the run that was recorded."""
    state = replay.loop.state
    where = f"step {replay.step} (epoch {int(state.epoch) + 1}, batch {int(state.batch_index)})"
    try:
        one = replay.one_step()
        yield f"{where}: loss {one.loss:.9g}, gradient norm {one.gradient_norm:.9g}"
    except DivergenceError as error:
        state.diverged.assign(False)
        yield f"{where}: {error.as_flags.partition(';')[0].partition(': ')[2]}"
    if replay.elsewhere:
        yield f"agrees with the run to rounding only: {'; '.join(replay.elsewhere)}"
    pairs, compared = list(replay.differing), replay.compared
    if replay.last_compared:
        compared += 1
        point, call = replay.last_compared
        steps = f"steps {point.first} to {point.last - 1}"
        yield f"{steps}, recorded: {_figures(point.loss, point.gradient_norm)}"
        yield f"{steps}, here:     {_figures(call.train.total, call.train.gradient_norm)}"
        if not _is_recorded(point, call):
            pairs.append(replay.last_compared)
    if pairs:
        point, call = pairs[0]
        yield (
            f"{len(pairs)} of {compared} recorded calls differ, the first at steps {point.first} "
            f"to {point.last - 1}: loss {np.float32(point.loss)!s} recorded, "
            f"{np.float32(call.train.total)!s} here"
        )
    elif compared:
        every = "all " if compared > 1 else ""
        yield f"{every}{counted(compared, 'recorded call')} on the way: the same, bit for bit"
    else:
        yield "no recorded call lies on the way: nothing to compare with"


def _figures(loss: float, norm: float | None) -> str:
    text = f"loss {np.float32(loss)!s}"
    return text if norm is None else f"{text}, gradient norm {np.float32(norm)!s}"
