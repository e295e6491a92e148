"""Class and probabilities of new images."""

import csv
from typing import Any

from tfloop.commands.command import BEST, WHERE, Command, output, start, warn
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.wording import counted


def predict(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    if len(arguments) != 2:
        found = counted(len(arguments), "argument")
        raise UserError(
            f"predict: expected RUN and IMAGES (a folder or an .npz file), found {found}"
        )
    start(config)
    from tfloop.training import predictions, saved_run

    folder, source = arguments
    _, state, manifest = saved_run.open_run(folder, options["best"], warn)
    names, images = predictions.read_images(source, state.model.input_shape[1:])
    saved_run.check_fit(images, state, manifest, source)
    probabilities = predictions.predict(state, images)
    with output(options["out"]) as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = [f"p{k}" for k in range(probabilities.shape[1])]
        writer.writerow(["image", "class", *columns])
        for name, row in zip(names, probabilities, strict=True):
            writer.writerow([name, int(row.argmax()), *(f"{p:.6f}" for p in row)])
    return 0


COMMAND = Command(
    predict,
    "class and probabilities of each image, as CSV",
    topic="use",
    arguments="RUN IMAGES",
    settings=WHERE,
    options={"out": ("", "the CSV file; unset: standard output"), "best": BEST},
)
