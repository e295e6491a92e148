"""The layers of a model."""

import sys
from typing import Any

from tfloop.commands.command import MODEL, WHERE, Command, start
from tfloop.config import Config
from tfloop.wording import names_text


def model(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    start(config)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tfloop import assembly, models
    from tfloop.data.spec import of_data

    data = assembly.load_data(config.replace(standardize=False))
    built = assembly.make_model(config, of_data(data))[0]
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("layer", footer="total")
    table.add_column("output")
    table.add_column("weights")
    table.add_column("parameters", justify="right", footer=f"{_count(built):,}")
    for layer, shape, weights, parameters in models.table(built):
        table.add_row(layer, shape, weights, f"{parameters:,}")
    print(f"input {data.inputs_text}; a dense kernel is (inputs, units): y = x·W + b, row by row")
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
    penalised = models.penalized(built, config.penalize, models.named_variables(built)[0])
    print(f"l1 and l2 count {names_text(penalised)} (--penalize={config.penalize})")
    return 0


def _count(model: Any) -> int:
    """Of its weights and averages, whether they are trained or not."""
    from tfloop import models

    return sum(
        v.shape.num_elements() for group in models.named_variables(model) for v in group.values()
    )


COMMAND = Command(
    model,
    "the model's layers, shapes and parameters",
    topic="look",
    settings=(*MODEL, "penalize", *WHERE),
)
