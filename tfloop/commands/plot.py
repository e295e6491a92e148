"""Curves of any runs."""

import math
import os
from pathlib import Path
from typing import Any

from tfloop.commands.command import Command, run_folders, start
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.training.folders import CONFIG
from tfloop.wording import counted


def plot(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    folders, reference = run_folders(arguments), _reference(options["reference"])
    if not options["out"]:
        raise UserError("--out: expected a PNG file, found nothing")
    for folder in folders:
        _check_is_one(folder)
    start(config)
    from tfloop.inspection import event_files, plots

    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    runs = {}
    for name, folder in zip(names, folders, strict=True):
        label = name if names.count(name) == 1 else folder
        fits = plots.by_epoch(event_files.read_scalars(folder), folder)
        for fit, series in fits.items():
            runs[f"{label}, {fit}" if fit and len(fits) > 1 else label] = series
    plots.save(plots.curves(runs, reference, metric=_metric(options, runs)), options["out"])
    print(options["out"])
    return 0


def _check_is_one(folder: str) -> None:
    """Raises UserError, at once, for a folder that holds many runs and is none."""
    path = Path(folder)
    if (path / CONFIG).is_file() or not path.is_dir():
        return
    if runs := sorted(found.parent.name for found in path.glob(f"*/{CONFIG}")):
        raise UserError(
            f"{folder}: holds {counted(len(runs), 'run')}; name those to plot, such as "
            f"{path / runs[0]}"
        )


def _metric(options: dict[str, Any], runs: dict[str, Any]) -> str:
    """What is drawn beside the loss.

    Raises:
      UserError: no run has it.
    """
    name = options["metric"]
    known = {key.partition("/")[2]: None for series in runs.values() for key in series}
    if name and name not in known:
        raise UserError(f"--metric={name}: no run has it; there are {', '.join(known)}")
    return name


def _reference(text: str) -> float | None:
    if not text:
        return None
    try:
        reference = float(text)
    except ValueError:
        reference = math.nan
    if not 0 < reference <= 1:
        raise UserError(f"--reference={text}: expected an accuracy between 0 and 1")
    return reference


COMMAND = Command(
    plot,
    "accuracy and loss over epochs, several runs overlaid, as PNG",
    topic="look",
    arguments="RUN…",
    settings=(),
    options={
        "out": ("curves.png", "the PNG file"),
        "metric": ("", "what to draw beside the loss; unset: accuracy, or else another metric"),
        "reference": ("", "an accuracy to draw a line at, such as 0.99"),
    },
)
