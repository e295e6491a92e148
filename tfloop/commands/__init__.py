"""The commands of the command line, a module each, named after the command.

To add a command, add a module with a `COMMAND` here. Where the command's name is a word of Python,
the module's ends in an underscore.
"""

import importlib
import pkgutil

from tfloop.commands.command import TOPICS, Command


def find() -> dict[str, Command]:
    """Every command by name: by topic, and in a topic by name."""
    commands = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name != "command":
            imported = importlib.import_module(f"{__name__}.{module.name}")
            commands[module.name.rstrip("_")] = imported.COMMAND
    order = sorted(commands, key=lambda name: (TOPICS.index(commands[name].topic), name))
    return {name: commands[name] for name in order}


COMMANDS: dict[str, Command] = find()
