"""Look at a model, a schedule, or what runs have written."""

import csv
import json
import math
import os
import sys
from pathlib import Path

from tfloop.commands.command import HOW, MODEL, WHERE, Command, one, output, some, start
from tfloop.config import Config
from tfloop.errors import UserError


def model(config: Config, options: dict, arguments: list[str]) -> int:
    start(config)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tfloop import models, runs

    data = runs.load_data(config.replace(standardize=False))
    built = models.build(config, data.image_shape, data.classes)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    for title, justify, footer in (("layer", "left", "total"), ("output", "left", ""), ("weights", "left", ""),
                                   ("parameters", "right", f"{built.count_params():,}")):
        table.add_column(title, justify=justify, footer=footer)
    for layer, shape, weights, parameters in models.table(built):
        table.add_row(layer, shape, weights, f"{parameters:,}")
    print(f"input {'×'.join(map(str, data.image_shape))}; a dense kernel is (inputs, units): y = x·W + b, row by row")
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
    return 0


def schedule(config: Config, options: dict, arguments: list[str]) -> int:
    if not options["plot"] and not options["print"]:
        raise UserError("schedule: choose --print, or --plot=FILE.png")
    start(config)
    from tfloop import runs

    steps = -(-len(runs.load_data(config.replace(standardize=False)).train) // config.batch_size)
    rate_at = runs.make_schedule(config, steps)
    total = config.epochs * steps
    if options["print"]:
        print(f"{'epoch':>8} {'step':>8}  rate")
        for step in sorted({round(share * (total - 1) / 20) for share in range(21)}):
            print(f"{step / steps:8.2f} {step:8d}  {float(rate_at(step)):.8g}")
    if options["plot"]:
        from tfloop import plots

        plots.schedule(rate_at, steps, total, f"{config.schedule}, {config.epochs} epochs of {steps} steps",
                       options["plot"])
        print(options["plot"])
    return 0


def tensorboard(config: Config, options: dict, arguments: list[str]) -> int:
    import socket
    import threading

    folder = one(arguments, "LOGDIR", "the folder with the runs") if arguments else "runs"
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; train first, or name the folder with the runs")
    port = options["port"]
    if port and not (port.isdecimal() and int(port) < 65536):
        raise UserError(f"--port={port}: expected a number from 0 to 65535; 0 takes any that is free")
    start(config)  # TensorBoard imports TensorFlow too, with all its messages
    from tensorboard import default, program
    from tensorboard.program import TensorBoardServerException

    board = program.TensorBoard(default.get_plugins())
    board.configure(logdir=folder, host=options["host"], load_fast="false", **({"port": int(port)} if port else {}))
    if not options["host"]:
        raise UserError("--host: expected the address to listen on, found nothing")
    try:
        socket.getaddrinfo(options["host"], None)
        url = board.launch()
    except (OSError, SystemExit) as error:
        raise UserError(f"--host={options['host']}: cannot listen there: {getattr(error, 'strerror', '') or error}") from None
    except TensorBoardServerException as error:
        raise UserError(f"tensorboard: {str(error).splitlines()[0].removeprefix('TensorBoard ')}") from None
    print(f"TensorBoard shows {folder} at {url} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    return 0


def scalars(config: Config, options: dict, arguments: list[str]) -> int:
    folders = some(arguments)
    if options["format"] not in ("csv", "json"):
        raise UserError(f"--format={options['format']} is unknown; choose from csv, json")
    start(config)
    from tfloop import events

    wanted = [tag for tag in options["tags"].split(",") if tag]
    rows = [(str(Path(folder, scalar.run)), *scalar[1:]) for folder in folders for scalar in events.read_scalars(folder)
            if not wanted or scalar.tag in wanted]
    if missing := [tag for tag in wanted if not any(row[1] == tag for row in rows)]:
        raise UserError(f"--tags={options['tags']}: there is no tag {missing[0]!r}; without --tags all are printed")
    names = ("run", *events.Scalar._fields[1:])
    with output(options["out"]) as file:
        if options["format"] == "csv":
            csv.writer(file, lineterminator="\n").writerows([names, *rows])
        else:
            found = [dict(zip(names, (*row[:-1], events.finite(row[-1])))) for row in rows]
            file.write("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
    return 0


def plot(config: Config, options: dict, arguments: list[str]) -> int:
    folders = some(arguments)
    reference = options["reference"]
    try:
        reference = float(reference) if reference else None
    except ValueError:
        reference = math.nan
    if reference is not None and not 0 < reference <= 1:
        raise UserError(f"--reference={options['reference']}: expected an accuracy between 0 and 1")
    start(config)
    from tfloop import events, plots

    if not options["out"]:
        raise UserError("--out: expected a PNG file, found nothing")
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    found = {name if names.count(name) == 1 else folder: plots.by_epoch(events.read_scalars(folder), folder)
             for name, folder in zip(names, folders)}
    plots.save(plots.curves(found, reference), options["out"])
    print(options["out"])
    return 0


COMMANDS = {
    "model": Command(model, "the model's layers, shapes and parameters", settings=MODEL + WHERE),
    "schedule": Command(schedule, "the learning rate over a run", "", HOW, {
        "print": (False, "print a table"), "plot": ("", "write a plot to this PNG file")}),
    "tensorboard": Command(tensorboard, "open TensorBoard on the runs", "[LOGDIR]", (), {
        "port": ("", "its port; unset: 6006 or the next free one"), "host": ("127.0.0.1", "the address to listen on")}),
    "scalars": Command(scalars, "print what event files hold, of any writer", "RUN…", (), {
        "format": ("csv", "csv or json"), "tags": ("", "these tags only, comma-separated"),
        "out": ("", "the file; unset: standard output")}),
    "plot": Command(plot, "accuracy and loss over epochs, several runs overlaid, as PNG", "RUN…", (), {
        "out": ("curves.png", "the PNG file"), "reference": ("", "an accuracy to draw a line at, 0.99 say")}),
}
