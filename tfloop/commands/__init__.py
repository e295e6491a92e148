"""The commands of the command line: each a function (settings, its own options, arguments) → exit code."""

from tfloop.commands import checking, launching, looking, running, searching
from tfloop.commands.command import Command

_ALL = running.COMMANDS | launching.COMMANDS | looking.COMMANDS | checking.COMMANDS | searching.COMMANDS
_ORDER = ("train", "launch", "sweep", "lr_find", "report", "evaluate", "predict", "export", "import", "pack", "model", "tensorboard", "scalars", "plot", "debug", "check_gradients",
          "parity", "overfit", "schedule")
COMMANDS: dict[str, Command] = {name: _ALL[name] for name in _ORDER}
