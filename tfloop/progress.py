"""What a person sees of a run: a bar per epoch on a terminal, a line per epoch elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tfloop.loop import Call, Epoch


class Display:
    """Shows records as they come; `quiet` shows none. Use it in a `with` block."""

    def __init__(self, epochs: int, steps: int, quiet: bool = False):
        self._epochs, self._steps = epochs, steps
        self._console, self._errors = Console(quiet=quiet, highlight=False), Console(stderr=True)
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"),
                             TimeRemainingColumn(compact=True), console=self._console, transient=True,
                             auto_refresh=False, disable=not self._console.is_terminal or quiet)
        self._task = self._bar.add_task("", total=steps, text="")

    def say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)

    def warn(self, line: str) -> None:
        """Say it even when quiet, on standard error."""
        self._errors.print(f"tfloop: {line}", soft_wrap=True, markup=False, highlight=False)

    def write(self, record: Call | Epoch, label: str = "") -> None:
        """Args: the record; which of several runs it is of."""
        if isinstance(record, Call):
            train = record.train
            self._bar.update(self._task, completed=record.batch, description=f"{label}  " * bool(label) + f"epoch {record.epoch}/{self._epochs}",
                             text=f"loss {train.total:.4f}  accuracy {100 * train.accuracy:.2f} %  rate "
                                  f"{record.rate:.3g}  step {record.step}  {1000 * record.seconds / record.steps:.1f} ms/step")
            self._bar.refresh()
            return
        self.say(f"{label}  " * bool(label) + epoch_line(record, self._epochs))
        self._bar.reset(self._task, total=self._steps, text="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()


def epoch_line(record: Epoch, epochs: int) -> str:
    """One epoch in one line."""
    parts = [f"epoch {record.epoch}/{epochs}", f"loss {record.train.total:.4f}",
             f"accuracy {100 * record.train.accuracy:.2f} %"]
    if record.test:
        parts += [f"test loss {record.test.total:.4f}", f"test accuracy {100 * record.test.accuracy:.2f} %"]
    if record.validation:
        parts.append(f"validation accuracy {100 * record.validation.accuracy:.2f} %")
    speed = [f"{1000 * record.seconds / record.steps:.1f} ms/step"] * (record.steps > 0)
    return "  ".join([*parts, f"rate {record.rate:.3g}", *speed])
