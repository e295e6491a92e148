"""The command line: flags make a Config, a command runs with it, and every mistake is one line and an exit code.

Exit codes: 0 done, 1 a check failed, 2 bad input, 3 diverged, 130 interrupted, 143 terminated. Only this module knows
absl; TensorFlow is imported when a command needs it.
"""

import time

STARTED = time.perf_counter()

import csv  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

from absl import flags  # noqa: E402

from tfloop import __version__, folders  # noqa: E402
from tfloop.config import FIELDS, GROUPS, PRESETS, Config, kind  # noqa: E402
from tfloop.errors import DivergenceError, UserError  # noqa: E402

FAILED, BAD_INPUT, DIVERGED, INTERRUPTED = 1, 2, 3, 130


def train(config: Config, options: dict, arguments: list[str]) -> int:
    stop, folder = _Stop(), None
    if options["resume"]:
        config, folder = _resumed(config, options)
    if folder and folders.is_finished(folder) and folders.epochs_done(folder) >= config.epochs:
        print(f"{folder}: is finished, all {config.epochs} epochs are done")
        return 0
    config, device = _start(config)
    from tfloop import training

    if options["dry_run"]:
        training.dry_run(config, device)
        return 0
    training.train(config, device, STARTED, stop.asked, folder)
    return stop.code()


def _resumed(config: Config, options: dict) -> tuple[Config, Path | None]:
    """(settings, folder) of the run that --resume names; with auto, of the newest that is not finished, or of a new one."""
    if config.seeds or config.runs > 1:
        raise UserError("--resume goes on with one run: leave --seeds and --runs out")
    if options["dry_run"]:
        raise UserError("--resume and --dry_run exclude each other: one goes on with a run, the other keeps nothing")
    folder = folders.newest_unfinished(config) if options["resume"] == "auto" else Path(options["resume"])
    return (config, None) if folder is None else (folders.resumed(folder, options["given"], options["override"]), folder)


def evaluate(config: Config, options: dict, arguments: list[str]) -> int:
    folder = _one(arguments, "RUN", "the folder of a finished run")
    config, _ = _start(config)
    from tfloop import runs
    from tfloop.loop import Loop

    trained, state, manifest = runs.open_run(folder, options["best"], _warn)
    if options["dataset"]:
        trained = trained.replace(dataset=options["dataset"])
    data = runs.load_data(trained)
    runs.check_fit(data.test.images, state, manifest, f"--dataset={trained.dataset}")
    metrics = Loop(state, data, batch_size=min(trained.batch_size, len(data.train)),
                   shards=config.shards).evaluate(data.test)
    print(f"{len(data.test)} test images of {trained.dataset}: loss {metrics.total:.4f} (data {metrics.data:.4f}, "
          f"l1 {metrics.l1:.4f}, l2 {metrics.l2:.4f})  accuracy {100 * metrics.accuracy:.2f} %")
    return 0


def predict(config: Config, options: dict, arguments: list[str]) -> int:
    if len(arguments) != 2:
        raise UserError(f"predict: expected RUN and IMAGES (a folder or an .npz file), found {len(arguments)} arguments")
    _start(config)
    from tfloop import predictions, runs

    _, state, manifest = runs.open_run(arguments[0], options["best"], _warn)
    names, images = predictions.read_images(arguments[1], state.model.input_shape[1:])
    runs.check_fit(images, state, manifest, arguments[1])
    probabilities = predictions.predict(state, images)
    with _output(options["out"]) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "class", *(f"p{k}" for k in range(probabilities.shape[1]))])
        for name, row in zip(names, probabilities):
            writer.writerow([name, int(row.argmax()), *(f"{p:.6f}" for p in row)])
    return 0


def export(config: Config, options: dict, arguments: list[str]) -> int:
    folder = _one(arguments, "RUN", "the folder of a run")
    if options["format"] not in ("keras", "saved_model", "tflite", "weights"):
        raise UserError(f"--format={options['format']} is unknown; choose from keras, saved_model, tflite, weights")
    _start(config)
    from tfloop import export, runs

    _, state, _ = runs.open_run(folder, options["best"], _warn)
    name = os.path.basename(os.path.abspath(folder))
    path = options["out"] or f"{name}{export.FORMATS[options['format']] or '-saved_model'}"
    export.export(state, options["format"], path)
    print(path)
    return 0


def model(config: Config, options: dict, arguments: list[str]) -> int:
    _start(config)
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
    _start(config)
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

    folder = _one(arguments, "LOGDIR", "the folder with the runs") if arguments else "runs"
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; train first, or name the folder with the runs")
    port = options["port"]
    if port and not (port.isdecimal() and int(port) < 65536):
        raise UserError(f"--port={port}: expected a number from 0 to 65535; 0 takes any that is free")
    _start(config)  # TensorBoard imports TensorFlow too, with all its messages
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
    folders = _some(arguments)
    if options["format"] not in ("csv", "json"):
        raise UserError(f"--format={options['format']} is unknown; choose from csv, json")
    _start(config)
    from tfloop import events

    wanted = [tag for tag in options["tags"].split(",") if tag]
    rows = [(str(Path(folder, scalar.run)), *scalar[1:]) for folder in folders for scalar in events.read_scalars(folder)
            if not wanted or scalar.tag in wanted]
    if missing := [tag for tag in wanted if not any(row[1] == tag for row in rows)]:
        raise UserError(f"--tags={options['tags']}: there is no tag {missing[0]!r}; without --tags all are printed")
    names = ("run", *events.Scalar._fields[1:])
    with _output(options["out"]) as file:
        if options["format"] == "csv":
            csv.writer(file, lineterminator="\n").writerows([names, *rows])
        else:
            found = [dict(zip(names, (*row[:-1], events.finite(row[-1])))) for row in rows]
            file.write("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
    return 0


def plot(config: Config, options: dict, arguments: list[str]) -> int:
    folders = _some(arguments)
    reference = options["reference"]
    try:
        reference = float(reference) if reference else None
    except ValueError:
        reference = math.nan
    if reference is not None and not 0 < reference <= 1:
        raise UserError(f"--reference={options['reference']}: expected an accuracy between 0 and 1")
    _start(config)
    from tfloop import events, plots

    if not options["out"]:
        raise UserError("--out: expected a PNG file, found nothing")
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    found = {name if names.count(name) == 1 else folder: plots.by_epoch(events.read_scalars(folder), folder)
             for name, folder in zip(names, folders)}
    plots.save(plots.curves(found, reference), options["out"])
    print(options["out"])
    return 0


def debug(config: Config, options: dict, arguments: list[str]) -> int:
    at = options["break_at"]
    if sum(map(bool, (at, options["break_if"], options["break_on_nan"]))) > 1:
        raise UserError("--break_at, --break_if and --break_on_nan exclude each other: choose one")
    if at and not at.isdecimal():
        raise UserError(f"--break_at={at}: expected the number of a step, 0 or more")
    try:
        compile(options["break_if"] or "0", "--break_if", "eval")
    except (SyntaxError, ValueError) as error:
        raise UserError(f"--break_if={options['break_if']}: is no Python expression: {error}") from None
    config, _ = _start(config.replace(eager=True, fast=False, shards=1, steps_per_call=1))
    from tfloop import debug, runs

    if debug.under_another_debugger():
        if at or options["break_if"] or options["break_on_nan"]:
            raise UserError("--break_at, --break_if and --break_on_nan are pdb's: in an editor, set a breakpoint in train_step")
        runs.make_loop(config, differentiate=debug.stop_once(debug.forward_and_backward)).fit(config.epochs)
        return 0
    loop = runs.make_loop(config, differentiate=debug.forward_and_backward)
    finished = debug.run(loop, config.epochs, int(at) if at else None, options["break_if"], options["break_on_nan"])
    print(f"{'done' if finished else 'quit'} after {int(loop.state.global_step)} steps; nothing was written")
    return 0


def check_gradients(config: Config, options: dict, arguments: list[str]) -> int:
    _start(config)
    from tfloop import checks, runs

    data = runs.load_data(config.replace(standardize=False))
    found = []
    print(f"{'':28} {'weight':22} {'worst entry':>16} {'GradientTape':>15} {'difference':>15}  error")
    for check in checks.check_gradients(config, data.image_shape, data.classes, config.seed):
        found.append(check)
        print(f"{check.what:28} {check.weight:22} {str(list(check.entry)):>16} {check.tape:15.8g} {check.difference:15.8g}  "
              f"{check.error:.1e}{'' if check.passed else '  WRONG'}", flush=True)
    worst, wrong = max(found, key=lambda check: check.error), sum(not check.passed for check in found)
    print(f"{len(found)} gradients, {wrong} wrong; the worst error is {worst.error:.1e} "
          f"({worst.what}, {worst.weight} {list(worst.entry)}; allowed: {checks.TOLERANCE:g})")
    return FAILED if wrong else 0


def parity(config: Config, options: dict, arguments: list[str]) -> int:
    steps = options["steps"]
    if not (steps.isdecimal() and int(steps)):
        raise UserError(f"--steps={steps}: expected a number of steps, 1 or more")
    _start(config)
    from tfloop import checks

    print(f"weights after each of {steps} steps, compared with: compiled, plain forward pass, resident pipeline, CPU")
    for found in checks.parity(config, int(steps)):
        print(f"  {found.mode:24} " + ("the same, bit for bit" if found.step is None else
              f"differs after step {found.step}, first in {found.layer}, by {found.ulps} units in the last place; after "
              f"the last step by at most {found.largest:.1e} of a weight's largest entry"), flush=True)
    return 0


def overfit(config: Config, options: dict, arguments: list[str]) -> int:
    most = options["steps"]
    if not (most.isdecimal() and int(most)):
        raise UserError(f"--steps={most}: expected a number of steps, 1 or more")
    config, _ = _start(config)
    from tfloop import checks

    for record in checks.overfit(config, int(most)):
        if record.step & (record.step - 1) == 0:
            print(f"step {record.step:5}  loss {record.loss:.4f}  accuracy {100 * record.accuracy:6.2f} %", flush=True)
    print(f"{config.batch_size} images {'memorised' if record.done else 'NOT memorised'} after {record.step} steps: loss "
          f"{record.loss:.4f}, accuracy {100 * record.accuracy:.2f} %")
    return 0 if record.done else FAILED


class Command(NamedTuple):
    function: Callable[[Config, dict, list[str]], int]
    help: str
    arguments: str = ""
    settings: tuple[str, ...] = tuple(FIELDS)  # the fields of Config that it takes as flags
    options: dict[str, tuple] = {}  # flags of its own: name → (default, help)


WHERE = ("device", "intra_op_threads", "inter_op_threads", "memory_growth", "memory_limit", "log_device_placement",
         "tensorflow_log")
HOW = tuple(name for name in FIELDS if name not in GROUPS["looking inside"] + GROUPS["what is written"])  # and how it learns
MODEL = tuple(name for group in ("start from", "data", "model") for name in GROUPS[group])
BEST = "the checkpoint that did best on the validation images, not the newest"
COMMANDS = {
    "train": Command(train, "train a model; the default is the article's CNN on MNIST", options={
        "dry_run": (False, "do one step of everything, keep nothing, and stop"),
        "resume": ("", "go on with a run: its folder; auto: the newest unfinished one of its name, or a new one"),
        "override": (False, "with --resume: allow settings that change the mathematics of the run")}),
    "evaluate": Command(evaluate, "loss and accuracy of a finished run on its test images", "RUN", WHERE, {
        "dataset": ("", "other data than the run's own: its test images"),
        "best": (False, BEST)}),
    "predict": Command(predict, "class and probabilities of each image, as CSV", "RUN IMAGES", WHERE, {
        "out": ("", "the CSV file; unset: standard output"), "best": (False, BEST)}),
    "export": Command(export, "a run as a plain Keras, SavedModel or TFLite model that takes raw pixels", "RUN", WHERE, {
        "format": ("keras", "keras, saved_model, tflite, or weights: the layers' weights alone"),
        "out": ("", "the file, or the folder of a saved_model; unset: named after the run"), "best": (False, BEST)}),
    "model": Command(model, "the model's layers, shapes and parameters", settings=MODEL + WHERE),
    "tensorboard": Command(tensorboard, "open TensorBoard on the runs", "[LOGDIR]", (), {
        "port": ("", "its port; unset: 6006 or the next free one"), "host": ("127.0.0.1", "the address to listen on")}),
    "scalars": Command(scalars, "print what event files hold, of any writer", "RUN…", (), {
        "format": ("csv", "csv or json"), "tags": ("", "these tags only, comma-separated"),
        "out": ("", "the file; unset: standard output")}),
    "plot": Command(plot, "accuracy and loss over epochs, several runs overlaid, as PNG", "RUN…", (), {
        "out": ("curves.png", "the PNG file"), "reference": ("", "an accuracy to draw a line at, 0.99 say")}),
    "debug": Command(debug, "train eagerly and stop in pdb at the step", "", tuple(
        name for name in HOW if name not in ("eager", "jit_compile", "fast", "shards", "steps_per_call", "seeds", "runs", "on_nan")), {
        "break_at": ("", "stop at this step only"),
        "break_if": ("", "stop before the update where this holds: 'gradients.norm > 10'"),
        "break_on_nan": (False, "stop before the update where a value is not finite")}),
    "check_gradients": Command(check_gradients, "GradientTape against central differences in float64",
                               settings=MODEL + ("seed",) + WHERE),
    "parity": Command(parity, "the first steps in every mode: where do they differ first, and by how much?", "", HOW, {
        "steps": ("5", "how many steps")}),
    "overfit": Command(overfit, "train on one batch until it is memorised", "", HOW, {
        "steps": ("1000", "give up after so many")}),
    "schedule": Command(schedule, "the learning rate over a run", "", HOW, {
        "print": (False, "print a table"), "plot": ("", "write a plot to this PNG file")}),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _main(argv)
    except UserError as error:
        print(f"tfloop: {error}", file=sys.stderr)
        return BAD_INPUT
    except DivergenceError as error:
        print(f"tfloop: {error}", file=sys.stderr)
        return DIVERGED
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader, `head` say, has seen enough
            sys.stderr.close()
            return 0
        print(f"tfloop: {error.filename or 'writing'}: {error.strerror or error}", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "ResourceExhaustedError":  # TensorFlow's
            raise
        print("tfloop: out of memory; try a smaller model or --batch_size", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("tfloop: interrupted", file=sys.stderr)
        return INTERRUPTED


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help", "--helpfull"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"tfloop {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(f"'{name}' is no command; choose from {', '.join(COMMANDS)}, or see --help")
    command = COMMANDS[name]
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in rest):
        print(_help(name, command))
        return 0
    parsed = _flags(command)
    try:
        arguments = parsed([name, *rest])[1:]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    except UnicodeDecodeError:
        raise UserError("--flagfile: not a text file") from None
    if arguments and not command.arguments:
        raise UserError(f"{name} takes flags only, found '{arguments[0]}'; a flag begins with --")
    given = {field: parsed[field].value for field in command.settings if parsed[field].present}
    values = Config.read(parsed["config"].value) if "config" in parsed and parsed["config"].present else {}
    config = Config.make(**{**values, **given})
    return command.function(config, {option: parsed[option].value for option in command.options} | {"given": given}, arguments)


def _flags(command: Command) -> flags.FlagValues:
    """The command's flags, every one unset. Values stay text: Config.make checks them, wherever they come from."""
    values = flags.FlagValues()
    flags.DEFINE_string("flagfile", None, "a file of flags, one a line", flag_values=values)
    for name in command.settings:
        define = flags.DEFINE_boolean if kind(name)[0] is bool else flags.DEFINE_string
        define(name, None, FIELDS[name].metadata["help"], flag_values=values)
    if "preset" in command.settings:
        flags.DEFINE_string("config", None, "a config.json to start from", flag_values=values)
    for name, (default, help) in command.options.items():
        define = flags.DEFINE_boolean if isinstance(default, bool) else flags.DEFINE_string
        define(name, default, help, flag_values=values)
    return values


def _overview() -> str:
    lines = [f"tfloop {__version__}: a TensorFlow 2 training loop that one can read, step through, reset and measure.", "",
             "usage: tfloop COMMAND [--flag=value …]", ""]
    lines += [f"  {name:16} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(lines + ["", "tfloop COMMAND --help lists its flags. Presets: " + ", ".join(PRESETS) + "."])


def _help(name: str, command: Command) -> str:
    lines = [f"usage: tfloop {name} {command.arguments}{' ' * bool(command.arguments)}[--flag=value …]",
             f"  {command.help}"]
    for option, (default, help) in command.options.items():
        lines += ["", "this command"] if option == next(iter(command.options)) else []
        lines.append(_flag_line(option, default, help))
    for group, names in GROUPS.items():
        names = [field for field in names if field in command.settings]
        lines += ["", group] if names else []
        lines += [_flag_line(field, FIELDS[field].default, help_text(field)) for field in names]
    lines += ["", "files", _flag_line("flagfile", "", "a file of flags, one a line")]
    if "preset" in command.settings:
        lines.append(_flag_line("config", "", "start from a config.json"))
    return "\n".join(lines)


def help_text(name: str) -> str:
    """A setting's help with the values it may take."""
    metadata = FIELDS[name].metadata
    choices = ", ".join(PRESETS) if name == "preset" else ", ".join(metadata["choices"])
    return metadata["help"] + (f" ({choices})" if choices else "")


def flag(name: str, default) -> str:
    """`--name=default` as one would type it."""
    if isinstance(default, bool):
        return f"--[no]{name}"
    return f"--{name}={','.join(map(str, default)) if isinstance(default, tuple) else '' if default is None else default}"


def _flag_line(name: str, default, help: str) -> str:
    suffix = f" [{'on' if default else 'off'}]" if isinstance(default, bool) else ""
    return f"  {flag(name, default):28} {help}{suffix}"


def _start(config: Config) -> tuple[Config, str]:
    """(the settings with what they leave to the machine decided, the device's name), and TensorFlow set up for them."""
    from tfloop import devices

    return devices.start(config)


def _warn(message: str) -> None:
    print(f"tfloop: {message}", file=sys.stderr)


def _one(arguments: list[str], name: str, what: str) -> str:
    if len(arguments) != 1:
        raise UserError(f"expected {name}, {what}; found {len(arguments)} arguments")
    return arguments[0]


def _some(arguments: list[str]) -> list[str]:
    if not arguments or "" in arguments:
        raise UserError("expected RUN, one or several folders with event files; found none")
    return arguments


def _output(path: str):
    import contextlib

    if not path:
        return contextlib.nullcontext(sys.stdout)
    try:
        return open(path, "w", encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"--out={path}: cannot be written: {error.strerror}") from None


class _Stop:
    """Ctrl-C or SIGTERM once asks the run to end after its current call, with a checkpoint; twice ends the program."""

    def __init__(self):
        self._signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _) -> None:
        self._signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def asked(self) -> bool:
        return bool(self._signal)

    def code(self) -> int:
        """The exit code, as shells have it: 128 and the signal's number; 0 where nobody asked."""
        return 128 + self._signal if self._signal else 0
