"""What a person sees of a run: a bar per epoch on a terminal, a line per epoch elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tfloop.metrics import Metrics
from tfloop.records import Call, Epoch, Evaluation, Record
from tfloop.wording import without_controls


class Display:
    """Shows records as they come; `quiet` shows none. Use it in a `with` block."""

    def __init__(self, epochs: int, steps: int, quiet: bool = False) -> None:
        """Make one.

        Args:
          epochs: of the run.
          steps: of an epoch.
          quiet: show nothing but warnings.
        """
        self._epochs, self._steps = epochs, steps
        self._console = Console(quiet=quiet, highlight=False)
        self._errors = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            auto_refresh=False,
            disable=not self._console.is_terminal or quiet,
        )
        self._task = self._bar.add_task("", total=steps, text="")

    def say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)

    def warn(self, line: str) -> None:
        """Say it even when quiet, on standard error."""
        text = f"tfloop: {without_controls(line)}"
        self._errors.print(text, soft_wrap=True, markup=False, highlight=False)

    def write(self, record: Record, label: str = "") -> None:
        """Show a record.

        Args:
          record: of the run.
          label: which of several runs it is of.
        """
        prefix = f"{label}  " if label else ""
        if isinstance(record, Evaluation):
            self.say(prefix + evaluation_line(record, self._epochs))
            return
        if isinstance(record, Epoch):
            self.say(prefix + epoch_line(record, self._epochs))
            self._bar.reset(self._task, total=self._steps, text="")
            return
        self._bar.update(
            self._task,
            completed=record.batch_index,
            description=f"{prefix}epoch {record.epoch}/{self._epochs}",
            text=call_line(record),
        )
        self._bar.refresh()

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()


def call_line(record: Call) -> str:
    """One compiled call, beside the bar."""
    train, ms = record.train, 1000 * record.seconds / record.steps
    parts = [
        f"loss {train.total:.4f}",
        *_accuracy("", train),
        f"rate {record.learning_rate:.3g}",
        f"step {record.step}",
        f"{ms:.1f} ms/step",
    ]
    return "  ".join(parts)


def _accuracy(of: str, metrics: Metrics) -> list[str]:
    """The accuracy in words, where there is one."""
    return [] if metrics.accuracy is None else [f"{of}accuracy {100 * metrics.accuracy:.2f} %"]


def evaluation_line(record: Evaluation, epochs: int) -> str:
    """An evaluation within an epoch in one line."""
    parts = [f"epoch {record.epoch}/{epochs}", f"step {record.step}", *_held_out(record)]
    return "  ".join(parts)


def _held_out(record: Epoch | Evaluation) -> list[str]:
    """What the evaluations gave."""
    parts = []
    if record.test:
        parts.append(f"test loss {record.test.total:.4f}")
        parts += [*_accuracy("test ", record.test), *_more("test ", record.test)]
    if record.validation:
        found = _accuracy("validation ", record.validation)
        parts += found or [f"validation loss {record.validation.total:.4f}"]
        parts += _more("validation ", record.validation)
    return parts


def _more(of: str, metrics: Metrics) -> list[str]:
    """The metrics of several outputs and of the user's own, where they could be computed."""
    return [f"{of}{name} {value:.4f}" for name, value in metrics.more.items() if value is not None]


def epoch_line(record: Epoch, epochs: int) -> str:
    """One epoch in one line."""
    parts = [
        f"epoch {record.epoch}/{epochs}",
        f"loss {record.train.total:.4f}",
        *_accuracy("", record.train),
    ]
    parts += _held_out(record)
    parts.append(f"rate {record.learning_rate:.3g}")
    if record.steps:
        parts.append(f"{1000 * record.seconds / record.steps:.1f} ms/step")
    return "  ".join(parts)
