"""What event files hold, as CSV or JSON."""

import csv
import json
from pathlib import Path
from typing import Any

from tfloop.commands.command import Command, one_of, output, run_folders, start
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.training.folders import finite


def scalars(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    folders = run_folders(arguments)
    format = one_of(options, "format", ("csv", "json"))
    start(config)
    from tfloop.inspection import event_files

    wanted = [tag for tag in options["tags"].split(",") if tag]
    rows = []
    for folder in folders:
        for scalar in event_files.read_scalars(folder):
            if not wanted or scalar.tag in wanted:
                rows.append((str(Path(folder, scalar.run)), *scalar[1:]))
    for tag in wanted:
        if not any(row[1] == tag for row in rows):
            raise UserError(
                f"--tags={options['tags']}: there is no tag {tag!r}; without --tags all are printed"
            )
    names = event_files.Scalar._fields
    with output(options["out"]) as file:
        if format == "csv":
            csv.writer(file, lineterminator="\n").writerows([names, *rows])
            return 0
        objects = [dict(zip(names, (*row[:-1], finite(row[-1])), strict=True)) for row in rows]
        file.write("[\n" + ",\n".join(map(json.dumps, objects)) + "\n]\n")
    return 0


COMMAND = Command(
    scalars,
    "print what event files hold, of any writer",
    topic="look",
    arguments="RUN…",
    settings=(),
    options={
        "format": ("csv", "csv or json"),
        "tags": ("", "these tags only, comma-separated"),
        "out": ("", "the file; unset: standard output"),
    },
)
