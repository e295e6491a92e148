"""A folder to start from, with a model and data of one's own."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from tfloop.commands.command import Command, one_argument
from tfloop.config import Config
from tfloop.errors import UserError

TEMPLATE = Path(__file__).parent.parent / "template"


def new(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    folder = Path(one_argument(arguments, "FOLDER", "the folder to make"))
    files = sorted(path for path in TEMPLATE.iterdir() if path.suffix in (".py", ".txt"))
    if taken := [path.name for path in files if (folder / path.name).exists()]:
        raise UserError(f"{folder}: has a {taken[0]} already; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            shutil.copyfile(path, folder / path.name)
    except OSError as error:
        for path in files:
            (folder / path.name).unlink(missing_ok=True)
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    place = shlex.quote(str(folder))
    program = f"{shlex.quote(sys.executable)} -m tfloop"
    names = ", ".join(path.name for path in files)
    print(f"{folder}: {names}\ntrain it:\n\n  cd {place} && {program} train --flagfile=flags.txt\n")
    return 0


COMMAND = Command(
    new,
    "a folder to start from: model.py, data.py and flags.txt, commented, which train at once",
    topic="use",
    arguments="FOLDER",
    settings=(),
)
