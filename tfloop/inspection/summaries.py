"""What TensorBoard shows of a run, from the records that the loop yields.

The step knows nothing of it. `train`, `test` and `validation` are runs over one axis, the global
step; the run's own folder holds its settings (HParams) and the layout of Custom Scalars. How much
is written:

  none      nothing
  scalars   curves, the run's settings, and texts
  default   histograms after every epoch as well; pictures, precision and recall, embeddings and
            graphs at the end
  full      all of that after every epoch, and feature maps

What is written stands in `dashboards`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfloop.errors import UserError
from tfloop.inspection import dashboards
from tfloop.inspection.event_files import EventFile, own_events
from tfloop.inspection.moments import LEVELS, REGISTERED, Context, Moment
from tfloop.loop import Loop
from tfloop.records import Call, Evaluation, Record


class Summaries:
    """Writes the records of a run into a folder.

    Example:
      >>> with Summaries("runs/mine", loop) as summaries:
      ...     for record in loop.run(epochs=5): summaries.write(record)
      ...     summaries.finish()
    """

    def __init__(
        self,
        folder: str | Path,
        loop: Loop,
        level: str = "default",
        settings: Mapping[str, object] | None = None,
        resumed: bool = False,
    ) -> None:
        """Make one.

        Args:
          folder: the run's own.
          loop: whose records they are.
          level: how much is written, one of LEVELS.
          settings: what the text and HParams tell of the run, beside the numbers in `state.hyper`;
            unset, it is the optimizer, the schedule and the batch size. Of a Config's fields
            HParams gets those that shape the run.
          resumed: its first events are written already.

        Raises:
          UserError: an unknown level; the folder holds event files of another time.
        """
        if level not in LEVELS:
            known = ", ".join(LEVELS)
            raise UserError(f"summaries: level {level!r} is unknown; choose from {known}")
        if settings is None:
            settings = {
                "optimizer": loop.state.optimizer.name,
                "schedule": loop.state.schedule.name,
                "batch_size": loop.pipeline.batch_size,
            }
        self._folder, self._level = Path(folder), level
        if not resumed and own_events(self._folder):
            raise UserError(
                f"{folder}: holds event files already, and curves of two runs in one folder cannot "
                "be told apart; name a new folder, or give resumed=True to go on with them"
            )
        self._files: dict[str, EventFile] = {}
        self._context = Context(loop, self._folder, settings)
        if not resumed:
            self._write_all("start", 0)

    def write(self, record: Record) -> None:
        """A Call is a point of the training curves, an Epoch one of the test curves.

        So is an Evaluation within an epoch.
        """
        if isinstance(record, Call):
            self._context.call = record
            self._write_all("call", record.step)
        elif isinstance(record, Evaluation):
            self._context.evaluation = record
            self._write_all("evaluation", record.step)
        else:
            self._context.epoch = self._context.evaluation = record
            self._write_all("epoch", record.step)

    def histograms(self, step: int) -> None:
        """Those of weights, gradients and activations, at this step."""
        self._context.step = step
        self._file("train").write(step, *dashboards.weight_histograms(self._context))
        if len(self._context.loop.data.test):
            self._file("test").write(step, *dashboards.activation_histograms(self._context))

    def finish(self) -> None:
        """What is written once, after the last epoch; HParams then has the run as a success."""
        state, graph = self._context.loop.state, self._context.loop.graph
        self._write_all("end", int(state.global_step))
        has_test = bool(len(self._context.loop.data.test))
        if graph is not None and self._level in dashboards.HISTOGRAMS and has_test:
            self._file("train").write_graph(graph)
        self.end(succeeded=True)

    def end(self, succeeded: bool) -> None:
        """Tell HParams that the run has ended, and how."""
        if self._level != "none":
            self._file("").write(0, dashboards.session_end(succeeded))

    def sync(self) -> dict[str, int]:
        """Wait until all is on disk; the size of every event file, by its path in the folder."""
        for file in self._files.values():
            file.sync()
        paths = own_events(self._folder)
        return {str(path.relative_to(self._folder)): path.stat().st_size for path in paths}

    def _write_all(self, moment: Moment, step: int) -> None:
        """The registered summaries of this moment, one event for each run."""
        self._context.step = step
        has_test = bool(len(self._context.loop.data.test))
        by_run: dict[str, list[Any]] = {}
        for each in REGISTERED:
            is_due = each.moment == moment and self._level in each.levels
            if is_due and (has_test or not each.needs_test):
                by_run.setdefault(each.run, []).extend(each.make(self._context))
        for run, messages in by_run.items():
            if messages:
                self._file(run).write(step, *messages)

    def _file(self, run: str) -> EventFile:
        if run not in self._files:
            self._files[run] = EventFile(self._folder / run)
        return self._files[run]

    def __enter__(self) -> "Summaries":
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._files.values():
            file.close()
