"""A stretch of a run trained again, with summaries, a profile and checks of its own."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from tfloop import scratch
from tfloop.config import Config
from tfloop.errors import DivergenceError, UserError
from tfloop.history.records import Records
from tfloop.history.replay import Replay
from tfloop.inspection.event_files import REPLAYS
from tfloop.inspection.progress import epoch_line
from tfloop.inspection.summaries import Summaries
from tfloop.records import Call, Epoch
from tfloop.training.profile import Profile
from tfloop.wording import counted


def train_again(
    records: Records,
    config: Config,
    first: int,
    last: int,
    say: Callable[[str], None],
    out: str = "",
    histograms: bool = False,
    device: str = "",
) -> bool:
    """Train the steps from `first` until `last` is the next one; were they those of the run?

    Args:
      records: of the run, whose folder gets nothing but the new one.
      config: its settings, with those of what is written.
      first, last: global steps.
      say: is told what is found.
      out: the folder that is written; "": RUN/replay-FIRST-LAST.
      device: as of Replay.
      histograms: write those of weights, gradients and activations after every call.

    Raises:
      UserError: the folder is not empty, the data are others, or the steps cannot be reached.
    """
    folder = Path(out) if out else records.folder / f"{REPLAYS}{first}-{last}"
    with _made_whole(records, folder) as partial:
        replay = Replay(records, config, say, device)
        replay.begin_for(first)
        replay.to(first)
        for line in _judged(replay, "before the stretch"):
            say(line)
        is_same, before = not replay.differing, replay.compared
        is_same &= _write(replay, partial, last, say, histograms)
        compared = counted(replay.compared - before, "call")
        say(f"{folder}: steps {first} to {replay.step - 1}, {compared} compared")
        for line in _judged(replay, "in all"):
            say(line)
        return _compare_end(replay, say) and is_same and not replay.differing


@contextlib.contextmanager
def _made_whole(records: Records, folder: Path) -> Iterator[Path]:
    """A folder that gets this name at the end of the block.

    Raises:
      UserError: the name is taken, or would be taken for part of the run; it cannot be written.
    """
    own, inside = records.folder.resolve(), folder.resolve()
    within = inside.relative_to(own).parts if own in (inside, *inside.parents) else (REPLAYS,)
    if not within or not within[0].startswith(REPLAYS):
        raise UserError(
            f"--out={folder}: lies in the run's own folder, where only names that begin with "
            f"{REPLAYS} are not taken for the run's"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is not empty; name another folder: --out=FOLDER")
    try:
        with scratch.folder(folder.absolute().parent, f"{REPLAYS}unfinished-") as partial:
            yield partial
            scratch.open_up(partial)
            partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


def _write(
    replay: Replay, folder: Path, last: int, say: Callable[[str], None], histograms: bool
) -> bool:
    """Train until `last` is the next step, and write what the summaries ask for.

    Returns:
      Are the weights after each epoch those of the run?
    """
    loop, config, is_same = replay.loop, replay.config, True
    settings = dataclasses.asdict(config)
    with (
        Summaries(folder, loop, config.summaries, settings) as summaries,
        Profile(config, folder, say) as profile,
    ):
        profile.move_to(replay.step)
        try:
            for record in replay.items(last, evaluates=True):
                profile.write(record)
                summaries.write(record)
                if histograms and isinstance(record, Call):
                    summaries.histograms(record.step)
                if isinstance(record, Epoch):
                    say(epoch_line(record, config.epochs))
                    is_same &= _is_recorded(replay.records, record, say)
            summaries.finish()
        except DivergenceError as error:
            say(error.as_flags)
            summaries.end(succeeded=False)
    return is_same


def _judged(replay: Replay, when: str) -> list[str]:
    if not replay.compared:
        return []
    calls = counted(replay.compared, "recorded call")
    if not replay.differing:
        return [f"{when}: {calls}, all the same, bit for bit"]
    point = replay.differing[0][0]
    reason = f" ({'; '.join(replay.elsewhere)})" if replay.elsewhere else ""
    return [
        f"{when}: {len(replay.differing)} of {calls} differ{reason}, the first at steps "
        f"{point.first} to {point.last - 1}"
    ]


def _is_recorded(records: Records, epoch: Epoch, say: Callable[[str], None]) -> bool:
    known = records.digests().get(epoch.step)
    if known is None or known == epoch.digest:
        return True
    say(f"the weights after epoch {epoch.epoch} are not those of the run")
    return False


def _compare_end(replay: Replay, say: Callable[[str], None]) -> bool:
    """Is the state at the end that of the run's own checkpoint, or what result.json says of it?"""
    step, state = replay.step, replay.loop.state
    paths = [path for at, path in replay.records.checkpoints() if at == step]
    if paths:
        here = state.digest()
        replay.begin(step, paths[0])
        state.diverged.assign(False)  # a note beside the values; the step after it was not made
        is_same = state.digest() == here
        says = "equals" if is_same else "differs from"
        say(f"the state at step {step} {says} the run's checkpoint {paths[0].name}")
        return is_same
    known = replay.records.digests().get(step)
    if known:
        is_same = known == state.digest("weights", "moving")
        says = "equal" if is_same else "differ from"
        say(f"the weights at step {step} {says} those of the run's evaluation there")
        return is_same
    say(f"the run kept no checkpoint of step {step}, and nothing else to compare the state with")
    return True
