"""Runs from beginning to end: records go to files and to the screen, the state to checkpoints, and a run that was
stopped, by whatever, goes on where its newest checkpoint is."""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tfloop import ensemble, export, folders
from tfloop.config import Config
from tfloop.distribution import Replicas
from tfloop.errors import DivergenceError
from tfloop.loop import Epoch, Loop
from tfloop.progress import Display
from tfloop.run import Run, may_end
from tfloop.runs import load_data, make_loop
from tfloop.state import TrainState


def train(config: Config, device: str = "", started: float | None = None, stop: Callable[[], bool] = lambda: False,
          resume: Sequence[Path] = (), replicas: Replicas | None = None) -> list[dict]:
    """Train once for each seed in one process, each into a folder of its own; the results. Runs that are finished are left
    as they are.

    Of several workers the chief alone writes folders and has results; the others train along.

    Args:
      config: the settings.
      device: the device's name, for the record.
      started: time.perf_counter() when the program began, from which set-up is counted.
      stop: asked after every record; true ends the run with a checkpoint.
      resume: the folders of the runs to go on with, one for each seed, in place of new ones.
      replicas: what to train on, in place of one device.

    Raises:
      UserError: settings that do not go together, data that cannot be read, a folder that cannot be written, is held by
        another process, or has no checkpoint that is whole.
      DivergenceError: as Loop.run; the run's folder keeps the last good weights.
      WorkerLost: another worker is gone.
    """
    started = time.perf_counter() if started is None else started
    if not replicas:
        return _train(config, device, started, stop, resume, None)
    with replicas.watched():
        if replicas.is_chief:
            return _train(config, device, started, stop, resume, replicas)
        _follow(config, stop, replicas)
        return []


def _train(config: Config, device: str, started: float, stop: Callable[[], bool], resume: Sequence[Path],
           replicas: Replicas | None) -> list[dict]:
    for folder in resume:
        if not folders.is_finished(folder):
            folders.check_writable(folder, "--resume")
    if not resume:
        folders.check_writable(Path(config.logdir))
    loop = make_loop(config, replicas=replicas)
    if replicas:
        replicas.check_same(loop.data.fingerprint, "data")
    with Display(config.epochs, loop.steps, config.quiet) as display:
        display.say(f"{len(loop.data.train)} training and {len(loop.data.test)} test images of "
                    f"{'×'.join(map(str, loop.data.image_shape))}, {loop.data.classes} classes; "
                    f"{sum(w.shape.num_elements() for w in loop.state.weights.values()):,} weights; "
                    f"{device or 'default device'}, {loop.pipeline.name} pipeline"
                    f"{' (auto)' * (config.pipeline == 'auto')}")
        display.say(_settings_line(config, loop.state))
        if left_out := loop.data.left_out:
            display.warn(f"{len(left_out)} damaged record{'s are' if len(left_out) > 1 else ' is'} left out; the first: {left_out[0]}")
        results = _train_all(config, loop, display, device, started, stop, resume, replicas)
        if len(results) > 1 and all(result["epochs"] for result in results):
            final = 100 * np.array([result["epochs"][-1]["test"]["accuracy"] for result in results])
            display.say(f"{len(results)} runs: test accuracy {final.mean():.2f} % on average, standard deviation "
                        f"{final.std(ddof=1):.2f}, from {final.min():.2f} to {final.max():.2f}; the step was traced "
                        f"{loop.traces['train']} time{'s' * (loop.traces['train'] != 1)}")
    return results


def _train_all(config: Config, loop: Loop, display: Display, device: str, started: float, stop: Callable[[], bool],
               resume: Sequence[Path], replicas: Replicas | None) -> list[dict]:
    """The results of all runs that `config` asks for, as many at a time as the ensemble has members."""
    group = [config.of_one_run(seed) for seed in config.all_seeds]
    members, agree = min(config.ensemble, len(group)), replicas.agree if replicas else bool
    loops = [loop, *(make_loop(config, loop.data) for _ in range(members - 1))]
    make, results = ensemble.SideBySide(loops).make if members > 1 else ensemble.alone, []
    with contextlib.ExitStack() as locks:
        places = list(resume) or folders.create_all(config)
        finished = [bool(folders.epochs_done(folder, own)) for folder, own in zip(places, group, strict=True)]
        for folder, done in zip(places, finished):
            if not done:
                locks.enter_context(folders.locked(folder))
        for first in range(0, len(group), members):
            batch = slice(first, first + members)
            if agree(all(finished[batch]) and folders.all_finished(places[batch])):
                for folder in places[batch]:
                    display.say(f"{folder}: is finished")
                    results.append({**folders.result(folder), "folder": str(folder)})
                continue
            runs = [Run(own, one, folder, display, device, replicas, f"seed {own.seed}" if members > 1 else "", done)
                    for own, one, folder, done in zip(group[batch], loops, places[batch], finished[batch])]
            ends = ensemble.finish([run.train(started, stop) for run in runs], make)
            for folder, end in zip(places[batch], ends):
                if isinstance(end, dict):
                    results.append({**end, "folder": str(folder)})
                    display.say(f"{_closing_line(end)}\n{folder}{_not_all(end, folder)}")
            complete = all(isinstance(end, dict) and end["finished"] for end in ends)
            if complete and len(runs) > 1:
                together = _together(loops, runs)
                display.say(f"{len(runs)} together: test accuracy {100 * together:.2f} %, by the mean of their probabilities")
                for folder, end in reversed(list(zip(places[batch], ends))):  # the first last, which is looked at
                    folders.write_json(folder / folders.RESULT, {
                        **end, "together": {"test_accuracy": together, "folders": [path.name for path in places[batch]]}})
            if diverged := next((end for end in ends if isinstance(end, DivergenceError)), None):
                raise diverged
            started = time.perf_counter()
            if not complete:
                break
    return results


def _together(loops: list[Loop], runs: list[Run]) -> float:
    """The accuracy of several models' mean probabilities on the test images, after their last epoch."""
    test = loops[0].data.test
    outputs = [loop.evaluate_with_outputs(test)[1] if run.outputs is None else run.outputs for loop, run in zip(loops, runs)]
    return float(np.mean(ensemble.mean_probabilities(loops, outputs).argmax(axis=1) == test.labels))


def _follow(config: Config, stop: Callable[[], bool], replicas: Replicas) -> None:
    """What a worker does that is not the chief: the same steps, with the chief's state to begin with."""
    loop = make_loop(config, replicas=replicas)
    replicas.check_same(loop.data.fingerprint, "data")
    told = 0
    for _ in config.all_seeds:
        if replicas.agree(False):  # the chief has it finished already
            continue
        again = True
        while again:
            replicas.share(loop.state)
            diverged, stopped = None, replicas.agree(False)
            try:
                for record in () if stopped else loop.run(config.epochs):
                    if isinstance(record, Epoch):
                        for name in list(getattr(loop.data.train.images, "skipped", ()))[told:]:
                            print(f"tfloop: {name} is damaged: left out", file=sys.stderr)
                            told += 1
                    if may_end(record, loop) and (stopped := replicas.agree(stop())):
                        break
            except DivergenceError as error:
                diverged = error
            again = bool(diverged) and replicas.agree(False)
        finished = replicas.agree(False)  # the chief has written all
        if diverged:
            raise diverged
        if not finished:
            break


def adopt(config: Config, path: str | Path) -> Path:
    """A new run whose first checkpoint has the weights in a file that Keras wrote; its folder.

    Raises:
      UserError: as `train`, and as `export.import_weights`.
    """
    config = config.replace(ensemble=1)
    folders.check_writable(Path(config.logdir))
    loop = make_loop(config)
    export.import_weights(loop.state, path, loop.data.test.images[:64])
    folder = folders.create(config)
    with folders.locked(folder), Display(config.epochs, loop.steps, config.quiet) as display:
        Run(config, loop, folder, display, "").save({})
    return folder


def dry_run(config: Config, device: str = "", replicas: Replicas | None = None) -> None:
    """One step of everything, training, evaluation, summaries, checkpoint, in a folder that is removed afterwards."""
    logdir = Path(config.logdir)
    folders.check_writable(logdir)
    dataset = load_data(config).head(config.batch_size)
    own = config.replace(epochs=1, seeds=(), runs=1, ensemble=1, profile="0:1" if config.profile else "")
    loop = make_loop(own, dataset, replicas)
    made = not logdir.exists()
    logdir.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=logdir, prefix="dry_run-") as folder, \
                Display(1, loop.steps, config.quiet) as display:
            run = Run(own, loop, Path(folder), display, device, replicas)
            [result] = ensemble.finish([run.train(time.perf_counter(), lambda: False)], ensemble.alone)
            if isinstance(result, DivergenceError):
                raise result
            display.say(f"dry run: one step of {config.batch_size} images, evaluation, summaries and checkpoint work; "
                        f"loss {result['final']['train']['total']:.4f}; nothing is kept")
    finally:
        if made:
            logdir.rmdir()


def _settings_line(config: Config, state: TrainState) -> str:
    usual = {"warmup_steps": 0.0, "unit_steps": 1.0}  # not worth a word
    show = lambda hyper: ", ".join(f"{name} {','.join(f'{number:.7g}' for number in np.atleast_1d(variable.numpy()))}"
                                   for name, variable in hyper.items() if usual.get(name) != variable.numpy().tolist())
    return (f"{config.optimizer}: {show(state.optimizer.hyper)}; {config.schedule}: {show(state.schedule.hyper)}; "
            f"l1 {config.l1:g}, l2 {config.l2:g} on {config.penalize} kernels; batch {config.batch_size}, "
            f"{_count(config.epochs)}")


def _count(epochs: int) -> str:
    return f"{epochs} epoch{'s' * (epochs != 1)}"


def _not_all(result: dict, folder: Path) -> str:
    """Why a run has not made all its epochs, where it has not."""
    if not result["finished"]:
        return f"\nstopped after {result['steps']} steps; go on with --resume={folder}"
    if len(result["epochs"]) == result["config"]["epochs"]:
        return ""
    best = result["best_by_validation"]
    return (f"\nstopped early: no better validation accuracy for {_count(result['config']['early_stopping'])}; the best, "
            f"{100 * best['accuracy']:.2f} %, was that of epoch {best['epoch']}: evaluate {folder} --best")


def _closing_line(result: dict) -> str:
    seconds, final = result["seconds"], result["final"]
    tested = final and next(part for part in ("test", "validation", "train") if part in final)
    reached = f"{tested} accuracy {100 * final[tested]['accuracy']:.2f} %" if final else "no epoch finished"
    return (f"{reached} after {result['steps']} steps: {seconds['training']:.1f} s of training "
            f"({result['ms_per_step']:.1f} ms/step), {seconds['setup']:.1f} s set-up, {seconds['tracing']:.1f} s tracing, "
            f"{seconds['evaluation']:.1f} s evaluation, {seconds['summaries'] + seconds['pictures']:.1f} s summaries")
