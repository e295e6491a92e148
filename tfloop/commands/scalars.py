"""What event files hold, as CSV or JSON."""

import csv
import json
from pathlib import Path
from typing import Any

from tfloop.commands.command import Command, one_of, output, run_folders, start
from tfloop.config import GROUPS, Config
from tfloop.errors import UserError
from tfloop.training.folders import config_of, finite, runs_in
from tfloop.training.folders import result as result_of
from tfloop.wording import listed, without_controls


def scalars(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    folders = run_folders(arguments)
    format = one_of(options, "format", ("csv", "json"))
    if options["hparams"]:
        if options["tags"]:
            raise UserError("--hparams and --tags exclude each other: choose one")
        _hparams(folders, format, options["out"])
        return 0
    start(config)
    from tfloop.inspection import event_files

    rows = []
    for folder in folders:
        base = event_files.base_of(folder)
        for scalar in event_files.read_scalars(folder):
            rows.append((str(base / scalar.run), *scalar[1:]))
    wanted = [tag for line in csv.reader([options["tags"]]) for tag in line if tag]
    if any(row[1] == options["tags"] for row in rows):  # one whose name has commas
        wanted = [options["tags"]]
    rows = [row for row in rows if not wanted or row[1] in wanted]
    for tag in wanted:
        if not any(row[1] == tag for row in rows):
            raise UserError(
                f"--tags={options['tags']}: there is no tag {tag!r}; without --tags all are printed"
            )
    names = event_files.Scalar._fields
    with output(options["out"]) as file:
        if format == "csv":
            shown = str if not file.isatty() else without_controls  # a tag may hold what it acts on
            lines = [
                [shown(cell) if isinstance(cell, str) else cell for cell in row] for row in rows
            ]
            csv.writer(file, lineterminator="\n").writerows([names, *lines])
            return 0
        objects = [dict(zip(names, (*row[:-1], finite(row[-1])), strict=True)) for row in rows]
        file.write("[\n" + ",\n".join(map(json.dumps, objects)) + "\n]\n")
    return 0


def _hparams(paths: list[str], format: str, out: str) -> None:
    """A line for each run: its settings, and what it reached; unset cells are empty.

    Raises:
      UserError: there are no runs.
    """
    found = [run for path in paths for run in runs_in(Path(path))]
    rows: list[dict[str, Any]] = []
    for run in found:
        settings, result = config_of(run), result_of(run)
        row: dict[str, Any] = {"run": str(run)}
        row |= {name: getattr(settings, name) for name in _SHOWN}
        for name, value in result.get("hyper", {}).items():  # what a rule chose by itself
            row[name] = value if row.get(name) is None else row[name]
        final = result.get("final") or {}
        for part in ("train", "validation", "test"):
            row |= {f"{part}/{name}": value for name, value in (final.get(part) or {}).items()}
        row |= {name: result.get(name) for name in ("steps", "ms_per_step", "finished", "device")}
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: _plain(row.get(name)) for name in names} for row in rows]
    with output(out) as file:
        if format == "csv":
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


_SHOWN = [
    name
    for group in ("start from", "data", "augmentation", "model", "loss", "optimizer", "schedule")
    for name in GROUPS[group]
] + ["batch_size", "epochs", "seed"]


def _plain(value: Any) -> Any:
    return listed(value) if isinstance(value, (tuple, list)) else value


COMMAND = Command(
    scalars,
    "print what event files hold, of any writer, or the settings and results of runs",
    topic="look",
    arguments="RUN…",
    settings=(),
    options={
        "format": ("csv", "csv or json"),
        "tags": ("", "these tags only, comma-separated; in double quotes where they hold commas"),
        "hparams": (False, "a line for each run in the folders: its settings and last metrics"),
        "out": ("", "the file; unset: standard output"),
    },
)
