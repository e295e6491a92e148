"""A run as a model that needs no tfloop."""

import os
from typing import Any

from tfloop.commands.command import (
    BEST,
    CODE_OPTIONS,
    WHERE,
    Command,
    one_argument,
    one_of,
    start,
    warn,
)
from tfloop.config import Config


def export(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    folder = one_argument(arguments, "RUN", "the folder of a run")
    format = one_of(options, "format", ("keras", "saved_model", "tflite", "weights"))
    start(config)
    from tfloop.training import export, saved_run

    _, state, _ = saved_run.open_run(folder, options["best"], warn, options)
    name = os.path.basename(os.path.abspath(folder))
    path = options["out"] or f"{name}{export.FORMATS[format] or '-saved_model'}"
    export.export(state, format, path)
    print(path)
    return 0


COMMAND = Command(
    export,
    "a run as a plain Keras, SavedModel or TFLite model that takes raw pixels",
    topic="use",
    arguments="RUN",
    settings=WHERE,
    options={
        "format": ("keras", "keras, saved_model, tflite, or weights: the layers' weights alone"),
        "out": ("", "the file, or the folder of a saved_model; unset: named after the run"),
        "best": BEST,
        **CODE_OPTIONS,
    },
)
