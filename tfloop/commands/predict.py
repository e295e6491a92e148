"""What a trained model gives for new inputs."""

import csv
from collections.abc import Iterator
from typing import Any

from tfloop.commands.command import BEST, CODE_OPTIONS, WHERE, Command, output, start, warn
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.wording import counted


def predict(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    if len(arguments) != 2:
        found = counted(len(arguments), "argument")
        raise UserError(
            f"predict: expected RUN and INPUTS (a folder or an .npz file), found {found}"
        )
    start(config)
    from tfloop.data import spec
    from tfloop.training import predictions, saved_run

    folder, source = arguments
    _, state, manifest = saved_run.open_run(folder, options["best"], warn, options)
    of_data = saved_run.spec_of(manifest)
    ranges = manifest.get("ranges", {})
    names, inputs = predictions.read_inputs(source, of_data, ranges, warn)
    spec.check_inputs(of_data, inputs, source)
    for note in spec.notes_on_ranges(ranges, inputs):
        warn(f"{source}: {note}")
    outputs = predictions.predict(state, inputs)
    columns = list(_columns(state.objective, outputs))
    with output(options["out"]) as file:
        writer = csv.writer(file, lineterminator="\n")
        first = "image" if of_data.has_images else "row"
        writer.writerow([first, *(title for title, _ in columns)])
        for row, name in enumerate(names):
            writer.writerow([name, *(values[row] for _, values in columns)])
    return 0


def _columns(objective: Any, outputs: Any) -> Iterator[tuple[str, list]]:
    """(title, a value for each example): of classes the class, then its numbers one by one."""
    from tfloop.nests import leaves
    from tfloop.scores import as_shares

    terms = {term.places[1]: term for term in objective.terms}
    for place, values in enumerate(leaves(outputs)):
        name, term = objective.names[place], terms.get(place)
        target = term.target if term and term.accuracy else None
        flat, prefix = values.reshape(len(values), -1), f"{name}/" if name else ""
        if target and target.is_one_class:
            shares = as_shares(target, flat)
            guesses = shares.argmax(axis=1) if flat.shape[1] > 1 else (shares[:, 0] > 0.5) * 1
            title = f"{prefix}class"
            yield title, [target.name_of(int(guess)) for guess in guesses]
        letter = "p" if term and term.as_logits else "y"
        numbers = [""] if flat.shape[1] == 1 else range(flat.shape[1])
        for column, number in enumerate(numbers):
            yield f"{prefix}{letter}{number}", [_number(x, letter) for x in flat[:, column]]


def _number(value: Any, letter: str) -> str:
    return f"{value:.6f}" if letter == "p" else f"{value:.7g}"


COMMAND = Command(
    predict,
    "class and probabilities of each image, or what else the model gives, as CSV",
    topic="use",
    arguments="RUN INPUTS",
    settings=WHERE,
    options={
        "out": ("", "the CSV file; unset: standard output"),
        "best": BEST,
        **CODE_OPTIONS,
    },
)
