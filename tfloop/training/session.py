"""The runs that one command trains, from beginning to end.

A run that was stopped, by whatever, goes on where its newest checkpoint is.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfloop import criterion, models, scratch
from tfloop.assembly import load_data, make_loop
from tfloop.config import Config
from tfloop.data.dataset import Dataset
from tfloop.errors import DivergenceError, UserError
from tfloop.inspection.progress import Display
from tfloop.loop import Loop
from tfloop.machine.replicas import Replicas
from tfloop.nests import leaves, named_leaves
from tfloop.records import Epoch
from tfloop.state import TrainState
from tfloop.training import code, folders, keras_import, manifests, saved_run
from tfloop.training.ensemble import Calls, End, SideBySide, Together, judge_together
from tfloop.training.folders import reached_text
from tfloop.training.run import Run, may_end
from tfloop.vectors import count_elements
from tfloop.wording import counted, listed, names_text, plural, shape_text


def train(
    config: Config,
    device: str = "",
    started: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    resume: Sequence[Path] = (),
    replicas: Replicas | None = None,
    override: bool = False,
) -> list[dict[str, Any]]:
    """Train once for each seed in one process, each into a folder of its own.

    Runs that are finished are left as they are. Of several workers the chief alone writes folders
    and has results; the others train along.

    Args:
      config: the settings.
      device: the device's name, for the record.
      started: time.perf_counter() when the program began, from which set-up is counted.
      stop: asked before the first run, after every record and amid what takes long; true ends the
        run with a checkpoint.
      resume: the folders of the runs to go on with, one for each seed, in place of new ones.
      replicas: what to train on, in place of one device.

    Returns:
      The result of each run, as written to its result.json, and its folder.

    Raises:
      UserError: settings that do not go together, data that cannot be read, a folder that cannot be
        written, is held by another process, or has no checkpoint that is whole.
      DivergenceError: as Loop.run; the run's folder keeps the last good weights.
      WorkerLost: another worker is gone.
    """
    started = time.perf_counter() if started is None else started
    with replicas.watched() if replicas else contextlib.nullcontext():
        if replicas and not replicas.is_chief:
            _follow(config, stop, replicas)
            return []
        session = Session(config, device, started, stop, resume, replicas, override)
        with session, contextlib.closing(session.calls()) as all_calls:
            for calls in all_calls:
                with calls:
                    if session.side_by_side:
                        session.side_by_side.make(calls)
                    else:
                        calls[0].loop.make(calls[0])
        return session.results


def _check_same_data(resume: Sequence[Path], data: Dataset) -> None:
    """Raises UserError where a run that is to go on had other examples, or other names of them."""
    for folder in resume:
        if not manifests.all_in(folder / "checkpoints"):
            continue
        manifest = manifests.newest(folder / "checkpoints")[1]
        if difference := saved_run.difference_of_data(manifest, data):
            raise UserError(
                f"--resume={folder}: {data.name} {difference}; put the data back, or go on with "
                "what they are now: --override"
            )


def _as_computed(config: Config, loop: Loop) -> Config:
    """The settings with what was left open about shards and threads as it is: bits follow of it."""
    threads = tf.config.threading
    found = {
        "shards": loop.shards,
        "intra_op_threads": threads.get_intra_op_parallelism_threads(),
        "inter_op_threads": threads.get_inter_op_parallelism_threads(),
    }
    unset = {name: value for name, value in found.items() if not getattr(config, name)}
    return config.replace(**unset)


class _Planned(NamedTuple):
    """A run that the command asks for."""

    config: Config
    folder: Path
    is_done: bool  # all its epochs are trained already


class Session:
    """The runs of one command. Use it in a `with` block.

    Attributes:
      results: of the runs that have ended so far.
      side_by_side: makes the calls of several models at once; None where one trains at a time.
    """

    def __init__(
        self,
        config: Config,
        device: str,
        started: float,
        stop: Callable[[], bool],
        resume: Sequence[Path],
        replicas: Replicas | None,
        override: bool = False,
    ) -> None:
        """Arguments as those of `train`."""
        for folder in resume:
            if not folders.is_finished(folder):
                folders.check_writable(folder, "--resume")
        if not resume:
            folders.check_writable(Path(config.logdir))
        self.results: list[dict[str, Any]] = []
        self._device, self._started, self._stop = device, started, stop
        self._resume, self._replicas = resume, replicas
        self._agree: Callable[[bool], bool] = replicas.agree if replicas else bool
        self._members = min(config.ensemble, len(config.all_seeds))
        first = make_loop(config, replicas=replicas)
        self._config = config = _as_computed(config, first)
        if not override:
            _check_same_data(resume, first.data)
        self._configs = [config.of_one_run(seed) for seed in config.all_seeds]
        if replicas:
            replicas.check_same(first.data.fingerprint, "data")
        others = [make_loop(config, first.data) for _ in range(self._members - 1)]
        self._loops = [first, *others]
        self.side_by_side = SideBySide(self._loops) if self._members > 1 else None
        self._display = Display(config.epochs, first.steps, config.quiet)
        self._locks = contextlib.ExitStack()

    def __enter__(self) -> "Session":
        self._display.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._locks.close()
        self._display.__exit__(kind, error, traceback)

    def calls(self) -> Generator[Calls, None, None]:
        """The calls that the runs are ready for; as many runs at a time as an ensemble has members.

        Raises:
          DivergenceError: a run diverged; those beside it have gone on to their end.
        """
        self._say_what_trains()
        several = self._replicas is not None and self._replicas.workers > 1
        if self._stop() and not several:  # several end at the same place, later
            return
        planned = self._plan()
        for first in range(0, len(planned), self._members):
            group = planned[first : first + self._members]
            places = [plan.folder for plan in group]
            if self._agree(all(plan.is_done for plan in group) and folders.all_finished(places)):
                self._leave(places)
                continue
            loops = self._loops[: len(group)]  # the last group may have fewer members
            runs = [self._run(plan, loop) for plan, loop in zip(group, loops, strict=True)]
            together = Together([run.train(self._started, self._stop) for run in runs])
            with contextlib.closing(together):
                yield from together
            if not self._close(runs, places, together.ends):
                break
            self._started = time.perf_counter()
        self._say_the_mean()

    def _plan(self) -> list[_Planned]:
        """All runs of the command; those that are to be trained are locked."""
        places = list(self._resume) or folders.create_all(self._config)
        planned = []
        for config, folder in zip(self._configs, places, strict=True):
            planned.append(_Planned(config, folder, bool(folders.epochs_done(folder, config))))
        for plan in planned:
            if plan.is_done:  # it is judged with the others, and its result written again
                folders.check_holds_no_links(plan.folder)
            else:
                self._locks.enter_context(folders.locked(plan.folder))
        return planned

    def _run(self, plan: _Planned, loop: Loop) -> Run:
        label = f"seed {plan.config.seed}" if self._members > 1 else ""
        return Run(
            plan.config,
            loop,
            plan.folder,
            self._display,
            self._device,
            self._replicas,
            label,
            plan.is_done,
        )

    def _leave(self, places: list[Path]) -> None:
        """These runs are finished: they are left as they are."""
        for folder in places:
            self._display.say(f"{folder}: is finished")
            self.results.append({**folders.result(folder), "folder": str(folder)})

    def _close(self, runs: list[Run], places: list[Path], ends: list[End]) -> bool:
        """Say how these runs ended, and judge them together; did all of them finish?

        Raises:
          DivergenceError: one of them diverged.
        """
        for folder, end in zip(places, ends, strict=True):
            if isinstance(end, dict):
                self.results.append({**end, "folder": str(folder)})
                self._display.say(f"{_closing_line(end)}\n{folder}{_not_all(end, folder)}")
        is_complete = all(isinstance(end, dict) and end["finished"] for end in ends)
        if is_complete and len(runs) > 1 and len(self._loops[0].data.test):
            self._judge(runs, places, ends)
        for end in ends:
            if isinstance(end, DivergenceError):
                raise end
        return is_complete

    def _judge(self, runs: list[Run], places: list[Path], ends: list[End]) -> None:
        """The test accuracy of several models' mean probabilities, after their last epoch."""
        test, loops = self._loops[0].data.test, self._loops[: len(runs)]
        outputs = [
            loop.evaluate_with_outputs(test)[1] if run.outputs is None else run.outputs
            for loop, run in zip(loops, runs, strict=True)
        ]
        found = judge_together(loops, outputs, test)
        self._display.say(f"{len(runs)} together: {found.text('test ')}, by the mean of {found.of}")
        names = [path.name for path in places]
        judged = {"together": {**found.to_json("test_"), "folders": names}}
        # The first comes last: it is the one that is looked at.
        for folder, end in reversed(list(zip(places, ends, strict=True))):
            assert isinstance(end, dict)
            folders.write_json(folder / folders.RESULT, {**end, **judged})

    def _say_what_trains(self) -> None:
        config, loop = self._config, self._loops[0]
        data, auto = loop.data, " (auto)" if config.pipeline == "auto" else ""
        weights = count_elements(loop.state.weights.values())
        self._display.say(
            f"{len(data.train)} training and {len(data.test)} test {data.noun} of "
            f"{_of_data(data)}; {weights:,} weights; "
            f"{self._device or 'default device'}, {loop.pipeline.name} pipeline{auto}"
        )
        self._display.say(_settings_line(config, loop.state, loop.pipeline.batch_size))
        if config.model or config.loss:
            self._display.say(
                f"{_scaled_text(data)}; loss: {loop.state.objective.text}{_hint(data)}"
            )
        if loop.shards > 1 and models.graph_of(loop.state.model) is None:
            self._display.say(
                "the model shows no graph, so it is computed whole, each operation on one core; "
                "--shards=1 lets operations share the cores"
            )
        if not getattr(data.train, "repeats", True):
            self._display.warn(
                f"{data.name}: its order differs each time it is begun, so a run does not repeat; "
                "shuffle with a seed, and let a function make the dataset"
            )
        for note in data.notes:
            self._display.warn(f"{data.name}: {note}")
        if count := len(data.left_out):
            records = f"{counted(count, 'damaged record')} {'is' if count == 1 else 'are'}"
            self._display.warn(f"{records} left out; the first: {data.left_out[0]}")

    def _say_the_mean(self) -> None:
        results = self.results
        if len(results) < 2 or not all(result["epochs"] for result in results):
            return
        last = [result["epochs"][-1] for result in results]
        part = next(part for part in ("test", "validation", "train") if part in last[0])
        name = "total" if last[0][part].get("accuracy") is None else "accuracy"
        found = [
            100 * entry[part][name] if name == "accuracy" else entry[part][name] for entry in last
        ]
        what, digits = (f"{part} accuracy", 2) if name == "accuracy" else (f"{part} loss", 4)
        percent = " %" if name == "accuracy" else ""
        traces = self._loops[0].traces["train"]
        self._display.say(
            f"{len(results)} runs: {what} {np.mean(found):.{digits}f}{percent} on average, "
            f"standard deviation {np.std(found, ddof=1):.{digits}f}, from {min(found):.{digits}f} "
            f"to {max(found):.{digits}f}; the step was traced {traces} {plural('time', traces)}"
        )


def _follow(config: Config, stop: Callable[[], bool], replicas: Replicas) -> None:
    """What a worker does that is not the chief: the same steps, from the chief's state on."""
    loop = make_loop(config, replicas=replicas)
    replicas.check_same(loop.data.fingerprint, "data")
    warned: set[str] = set()
    for _ in config.all_seeds:
        if replicas.agree(False):  # the chief has it finished already
            continue
        again = True
        while again:
            diverged = _follow_once(config, loop, stop, replicas, warned)
            again = bool(diverged) and replicas.agree(False)
        finished = replicas.agree(False)  # the chief has written all
        if diverged:
            raise diverged
        if not finished:
            break


def _follow_once(
    config: Config, loop: Loop, stop: Callable[[], bool], replicas: Replicas, warned: set[str]
) -> DivergenceError | None:
    """Train along, until all epochs are done or one of the workers is asked to stop."""
    replicas.share(loop.state)
    if replicas.agree(False):
        return None
    try:
        for record in loop.run(config.epochs):
            if isinstance(record, Epoch):
                for name in getattr(loop.data.train.inputs, "skipped", ()):
                    if name not in warned:
                        warned.add(name)
                        print(f"tfloop: {name} is damaged: left out", file=sys.stderr)
            if may_end(record, loop) and replicas.agree(stop()):
                break
    except DivergenceError as error:
        return error
    return None


def adopt(config: Config, path: str | Path) -> Path:
    """A new run whose first checkpoint has the weights in a file that Keras wrote; its folder.

    Raises:
      UserError: as `train`, and as `keras_import.import_weights`.
    """
    config = config.replace(ensemble=1)
    folders.check_writable(Path(config.logdir))
    loop = make_loop(config)
    some = loop.data.test if len(loop.data.test) else loop.data.train
    keras_import.import_weights(loop.state, path, some.rows(slice(64)))
    display = Display(config.epochs, loop.steps, config.quiet)
    with folders.made_whole(config) as folder:
        code.store(folder, config)
        with display:
            Run(config, loop, folder, display, "").save({})
        return folders.placed(folder, config)


def dry_run(config: Config, device: str = "", replicas: Replicas | None = None) -> None:
    """One step of everything, in a folder that is removed afterwards.

    Training, evaluation, summaries, checkpoint.
    """
    logdir = Path(config.logdir)
    folders.check_writable(logdir)
    dataset = load_data(config).head(config.batch_size)
    profile = "0:1" if config.profile else ""
    own = config.replace(epochs=1, seeds=(), runs=1, ensemble=1, profile=profile)
    loop = make_loop(own, dataset, replicas)
    new = [path for path in (logdir, *logdir.parents) if not path.exists()]
    display = Display(1, loop.steps, config.quiet)
    try:
        with scratch.folder(logdir, "dry_run-") as folder, display:
            folders.write(folder / folders.CONFIG, own.to_json())
            run = Run(own, loop, folder, display, device, replicas)
            group = Together([run.train(time.perf_counter(), lambda: False)])
            for calls in group:
                with calls:
                    loop.make(calls[0])
            [result] = group.ends
            if isinstance(result, DivergenceError):
                raise result
            assert result
            if not result["final"]:  # it was asked to end
                return
            loss = result["final"]["train"]["total"]
            display.say(
                f"dry run: one step of {config.batch_size} {dataset.noun}, evaluation, "
                f"summaries and checkpoint work; loss {loss:.4f}; nothing is kept"
            )
    finally:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()


def _hint(data: Dataset) -> str:
    """What may have been meant otherwise: floats that are all 0 and 1."""
    for name, array in named_leaves(data.train.targets):
        is_value = data.kinds[name].kind == "values" and isinstance(array, np.ndarray)
        if is_value and len(array) and bool(((array == 0) | (array == 1)).all()):
            of = f" {name}" if name else ""
            return f"; the targets{of} are 0.0 and 1.0: as whole numbers they would be classes"
    return ""


def _of_data(data: Dataset) -> str:
    """ "28×28×1, 10 classes": of images the shape alone, since the type is known."""
    inputs = shape_text(data.image_shape) if data.train.has_images else data.inputs_text
    return f"{inputs}, {data.targets_text}"


def _scaled_text(data: Dataset) -> str:
    """What of the inputs is standardised."""
    is_changed = [
        name or "inputs"
        for (name, mean), scale in zip(
            named_leaves(data.standardizer.mean), leaves(data.standardizer.scale), strict=True
        )
        if mean is not None and (np.any(mean) or np.any(scale != 1))
    ]
    rest = [name or "inputs" for name, _ in named_leaves(data.train.inputs)]
    left = [name for name in rest if name not in is_changed]
    parts = [f"standardised: {', '.join(is_changed)}"] if is_changed else []
    return "; ".join(parts + ([f"as they are: {', '.join(left)}"] if left else []))


def _settings_line(config: Config, state: TrainState, batch_size: int) -> str:
    """The optimizer, the schedule, the penalties and their numbers, in one line."""
    optimizer, schedule = _numbers_text(state.optimizer.hyper), _numbers_text(state.schedule.hyper)
    return (
        f"{config.optimizer}: {optimizer}; {config.schedule}: {schedule}; l1 {config.l1:g}, l2 "
        f"{config.l2:g} on {names_text(state.kernels)}; batch {batch_size}, "
        f"{counted(config.epochs, 'epoch')}"
    )


def _numbers_text(hyper: dict[str, Any]) -> str:
    usual = {"warmup_steps": 0.0, "unit_steps": 1.0}  # not worth a word
    shown = []
    for name, variable in hyper.items():
        if usual.get(name) != variable.numpy().tolist():
            numbers = np.atleast_1d(variable.numpy())
            shown.append(f"{name} {listed(f'{number:.7g}' for number in numbers)}")
    return ", ".join(shown)


def _not_all(result: dict[str, Any], folder: Path) -> str:
    """Why a run has not made all its epochs, where it has not."""
    if not result["finished"]:
        limit = result["config"]["max_time"]
        why = f", by --max_time={limit}" if result["out_of_time"] else ""
        return f"\nstopped after {result['steps']} steps{why}; go on with --resume={folder}"
    config, best = result["config"], result["best"]
    if len(result["epochs"]) == config["epochs"]:
        return ""
    if result["reached"]:
        return f"\nstopped: {result['reached']} is reached"
    if not best:  # as where a manifest names fewer epochs than were made
        return ""
    by = criterion.parse(best.get("metric", "accuracy"))  # what 0.3 went by
    patience = counted(config["early_stopping"], "epoch")
    return (
        f"\nstopped early: no better {by.text} for {patience}; the best, "
        f"{by.shown(folders.value_of(best))}, was that of epoch {best['epoch']}: evaluate {folder} "
        "--best"
    )


def _arithmetic_text(result: dict[str, Any]) -> str:
    """How much a step multiplies, and how near the machine's matmul that is."""
    flop, share = result.get("flop_per_step"), result.get("of_floor")
    if not flop or not share:
        return ""
    return f", {flop / 1e9:.3g} GFLOP at {100 * share:.0f} % of matmul's speed"


def _closing_line(result: dict[str, Any]) -> str:
    """What a run reached, and in what time."""
    seconds, final = result["seconds"], result["final"]
    reached = "no epoch finished"
    if final:
        part = next(part for part in ("test", "validation", "train") if part in final)
        reached = f"{part} {reached_text(final[part])}"
    summaries = seconds["summaries"] + seconds["pictures"]
    step = f"{result['ms_per_step']:.1f} ms/step{_arithmetic_text(result)}"
    return (
        f"{reached} after {result['steps']} steps: {seconds['training']:.1f} s of training "
        f"({step}), {seconds['setup']:.1f} s set-up, "
        f"{seconds['tracing']:.1f} s tracing, {seconds['evaluation']:.1f} s evaluation, "
        f"{summaries:.1f} s summaries"
    )
