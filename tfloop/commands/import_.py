"""A run that begins with the weights of others."""

from typing import Any

from tfloop.commands.command import Command, one_argument, start, without
from tfloop.config import FIELDS, Config


def import_(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    path = one_argument(arguments, "FILE", "a .keras or .weights.h5 file")
    config, _ = start(config)
    from tfloop.training import session

    print(session.adopt(config, path))
    return 0


COMMAND = Command(
    import_,
    "a new run with the weights in a file that Keras wrote",
    topic="use",
    arguments="FILE",
    settings=without(tuple(FIELDS), "seeds", "runs", "ensemble"),
)
